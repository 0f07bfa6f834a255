"""Models that are GGUF files with names of their own: the files of one model, and its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pinaivu_box.models import splits
from pinaivu_box.models.caches.cache import CachedModel, inside
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.names import RULE, is_model_id
from pinaivu_box.models.record import ModelRecord
from pinaivu_box.text import END

# As llama.cpp finds the quantisation in a name: gemma-3-4b-it-Q4_K_M.
_QUANTISATION = re.compile(rf"[-.]([A-Za-z0-9_]+){END}")


def models(
    root: Path,
    files: Sequence[Path],
    not_served: dict[Path, str],
    name_of: Callable[[Path, str], str],
    projector_of: Callable[[Path], Path | None] = lambda _: None,
) -> list[CachedModel]:
    """The models in these files; `name_of` the first file and its name without ending is the id,
    `projector_of` the first file the projector.  Files that are links are taken where those lead:
    all of one model into the same folder."""
    found = []
    for count, paths in splits.grouped(files, not_served):
        first = paths[min(paths)]
        try:
            model_id = name_of(first, splits.stem_of(first.name))
            if not is_model_id(model_id):
                raise BadGguf(f"its name is no model id ({RULE})")
            splits.check_complete(count, list(paths))
            real = tuple(inside(root, paths[number]) for number in sorted(paths))
            projector = projector_of(first)
            record = None
            if projector is not None:
                record = ModelRecord(model_id, projector=inside(root, projector).name)
            found.append(CachedModel(model_id, real, record))
        except BadGguf as error:
            not_served[first] = str(error)
    return found


def of_repository(repository: str, stem: str) -> str:
    """The name of a file of a repository, by its quantisation: OWNER/REPO:Q4_K_M."""
    match = _QUANTISATION.search(stem)
    return f"{repository}:{match[1].upper() if match else stem}"
