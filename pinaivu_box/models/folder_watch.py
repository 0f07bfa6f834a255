"""Notices changes in the folders with models, and files that are still being written."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pinaivu_box.models import gguf, model_scan
from pinaivu_box.models.catalog import Catalog
from pinaivu_box.models.model_scan import ModelScan
from pinaivu_box.models.names import printable
from pinaivu_box.models.regular_files import download_mark

log = logging.getLogger("pinaivu.models")

_MAX_LOGGED_FILES = 20  # files that are not served; `pinaivu ls` tells all
_LOOK_SECONDS = 1.0  # from one look to the next
_MIN_PAUSE_FACTOR = 100  # a look takes at most a hundredth of the time, however large the folder is

_Facts = tuple[int, ...]
_State = tuple[dict[Path, _Facts], dict[Path, str]]


class FolderWatch:
    """For one thread at a time.  `seconds` is the pause before the next look."""

    def __init__(self) -> None:
        self.seconds = _LOOK_SECONDS
        self._before: dict[Path, _Facts] | None = None  # in the look before
        self._taken: _State = {}, {}  # what was returned last

    def look(self, path: Path, model_caches: Sequence[str] = ()) -> ModelScan | None:
        """What is in the folder, and in those of other programs, if that has changed, else None.  A
        file that is not as it was in the look before is not among its files: it is being written.
        """
        began = time.monotonic()
        scan = model_scan.scan(path, model_caches)
        now = {file: _facts(file) for file in scan.all_files}
        before, self._before = self._before, now
        self.seconds = max(_LOOK_SECONDS, _MIN_PAUSE_FACTOR * (time.monotonic() - began))
        if before is None:
            return None
        taken, _ = self._taken
        unchanged = {
            file: facts
            for file, facts in now.items()
            if facts in (before.get(file), taken.get(file))
        }
        scan.not_served |= {file: gguf.BEING_WRITTEN for file in now if file not in unchanged}
        scan.keep(set(unchanged))
        state = unchanged, dict(scan.not_served)
        if state == self._taken:
            return None
        self._taken = state
        return scan


def _facts(file: Path) -> _Facts:
    try:
        facts = file.stat()
    except OSError:
        return ()
    unfinished = os.path.lexists(download_mark(file))
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, unfinished


def report(old: Catalog, new: Catalog) -> bool:
    """Log what is served since then, what is gone, and what cannot be served though it is whole.
    Returns whether other models are served."""
    before, now = ({model.id: model for model in catalog.models} for catalog in (old, new))
    changed = [model_id for model_id in now if before.get(model_id) != now[model_id]]
    gone = [model_id for model_id in before if model_id not in now]
    for model_id in changed:
        log.info("serving %s", model_id)
    for model_id in gone:
        log.info("%s is gone", model_id)
    known = old.not_served
    report_not_served({
        path: why
        for path, why in new.not_served.items()
        if why != known.get(path) and not gguf.is_unfinished(why)
    })  # fmt: skip
    return bool(changed or gone)


def report_not_served(not_served: Mapping[Path, str]) -> None:
    for path, why in list(not_served.items())[:_MAX_LOGGED_FILES]:
        log.warning("not served: %s: %s", printable(str(path)), why)
