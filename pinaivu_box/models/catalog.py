"""The models that this box can serve: names, files, headers and digests."""

from __future__ import annotations

import difflib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import msgspec

from pinaivu_box.config import Config, ModelConfig, SamplingConfig
from pinaivu_box.errors import CliError, ModelNotFound, quoted
from pinaivu_box.models import bundled, folder_scan, gguf, known_models, splits
from pinaivu_box.models import record as records
from pinaivu_box.models.folder_scan import FolderScan
from pinaivu_box.models.gguf import BadGguf, Header
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.names import MAX_NAME, RULE, is_model_id, printable
from pinaivu_box.models.record import NO_PARAMETERS, ModelParameters, ModelRecord
from pinaivu_box.models.regular_files import download_mark, sha256, stat_regular

FAKE = "fake:"  # a runner without a model, for tests and load measurements
_FAKE_DIGEST = hashlib.sha256(b"fake").hexdigest()
RENAME_IT, RENAME_ONE = ": rename it", ": rename one of them"  # ends of reasons
_RECENT_SECONDS = 60.0  # a file that changed since may still be written to


class ModelPart(NamedTuple):
    path: Path
    size: int


@dataclass(frozen=True)
class Model:
    """`size` bytes at `offset` of `path`; `created` is the file's time in Unix seconds.

    A model in several files has them as `parts`, of which `path` is the first and `size` the sum.
    `recorded_digest` is set where the digest is known without reading the file.  A `remote` one
    is at peers only: it has neither file nor header here.
    """

    id: str
    path: Path
    offset: int = 0
    size: int = 0
    created: int = 0
    owner: str = "local"
    header: Header = field(default_factory=Header)
    context: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    recorded_digest: str | None = None
    remote: bool = False
    parts: tuple[ModelPart, ...] = ()
    record: ModelRecord | None = None

    @property
    def parameters(self) -> ModelParameters:
        """The defaults that its publisher recommends."""
        return self.record.parameters if self.record is not None else NO_PARAMETERS

    @property
    def files(self) -> list[Model]:
        """Each of its files as a model of its own: itself, or its parts."""
        if not self.parts:
            return [self]
        return [replace(self, path=path, size=size, parts=()) for path, size in self.parts]

    @property
    def is_fake(self) -> bool:
        return str(self.path).startswith(FAKE)


class Catalog:
    def __init__(self, models: dict[str, Model], not_served: dict[Path, str] | None = None) -> None:
        self._models = models
        self._not_served = not_served or {}

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    @property
    def not_served(self) -> dict[Path, str]:
        """The files in the models folder that are not served, each with the reason as the end of a
        sentence, and whether it may still be written to."""
        return {path: _why_not(path, why) for path, why in self._not_served.items()}

    def matching(self, globs: Sequence[str]) -> Catalog:
        """The models whose ids match one of the globs."""
        fits = {
            model.id: model
            for model in self.models
            if any(fnmatchcase(model.id, glob) for glob in globs)
        }
        return Catalog(fits)

    def without(self, ids: set[str]) -> Catalog:
        """A catalog without those models."""
        left = {model.id: model for model in self.models if model.id not in ids}
        return Catalog(left, self._not_served)

    def with_models(self, more: Iterable[Model]) -> Catalog:
        """A catalog with those models too."""
        return Catalog(self._models | {model.id: model for model in more}, self._not_served)

    def is_written(self, model: Model) -> bool:
        """Whether one of the model's files is being written."""
        whys = [self._not_served.get(file.path) for file in model.files]
        return gguf.BEING_WRITTEN in whys

    def find(self, model_id: str) -> Model:
        """The model of that id; a name without a tag means `:latest`.  Raises ModelNotFound."""
        for candidate in (model_id, f"{model_id}:latest", model_id.removesuffix(":latest")):
            if candidate in self._models:
                return self._models[candidate]
        near = difflib.get_close_matches(model_id[:MAX_NAME], self._models, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        if known_models.known(model_id) is not None:
            hint = f" The operator of this box can download it: 'pinaivu pull {model_id}'."
        served = ", ".join(sorted(self._models)[:20]) or "no model yet"
        raise ModelNotFound(
            f"The model '{quoted(model_id)}' is not served here.{hint} Served here: {served}.",
            param="model",
        )


def load(
    config: Config,
    home: Path,
    headers: HeaderReader | None = None,
    *,
    scan: FolderScan | None = None,
    configured: Mapping[str, Model] | None = None,
) -> Catalog:
    """The configured models, then the files in the models folder, then the bundled model.

    A configured file that cannot be served is the operator's mistake (CliError); one in the folder
    is noted, and stops no other.  This reads files: it is no work for an event loop.  `headers`
    remembers what it has read for the next time.  A `scan` of the folder that was made, and the
    `configured` models if they are known, are not read again.
    """
    headers = headers or HeaderReader()
    try:
        models = _of_config(config.model, headers) if configured is None else dict(configured)
        scan = scan or folder_scan.scan(directory(config, home))
        not_served = scan.not_served
        for (_, count), files in _grouped(scan.files, not_served).items():
            paths = [files[number] for number in sorted(files)]
            try:
                record = records.read(paths[0])
                model_id = record.id if record is not None else _id_of(paths[0])
                if (other := models.get(model_id)) is not None:
                    if other.owner == "local" and _same_file(paths[0], other.path):
                        continue  # this very file: the configuration names it, or a link leads here
                    raise BadGguf(
                        f"another file is served as {model_id} already "
                        f"({printable(str(other.path))}){RENAME_ONE}"
                    )
                splits.check_complete(count, list(files))
                model = _from_files(model_id, paths, headers)
                models[model_id] = replace(model, record=record)
            except (BadGguf, OSError) as error:
                not_served[paths[0]] = _reason(error)
    finally:
        headers.finish()
    location = bundled.find()
    if location and bundled.MODEL_ID not in models:
        try:
            models[bundled.MODEL_ID] = _bundled(location)
        except (BadGguf, OSError) as error:
            not_served[location.path] = f"the bundled model: {_reason(error)}"
    return Catalog(models, not_served)


def _why_not(path: Path, why: str) -> str:
    if not gguf.is_unfinished(why) or why == gguf.BEING_WRITTEN:
        return why
    try:
        young = abs(time.time() - path.stat().st_mtime) < _RECENT_SECONDS
    except OSError:
        return why
    return f"{why}; {gguf.BEING_WRITTEN}" if young else why


def _bundled(location: bundled.Location) -> Model:
    """It belongs to this program: its header is read without the caution that others need.  Raises
    BadGguf, OSError."""
    return Model(
        bundled.MODEL_ID,
        location.path,
        location.offset,
        location.size,
        created=int(stat_regular(location.path).st_mtime),
        owner="bundled",
        header=gguf.read_header(location.path, location.offset, location.size),
        recorded_digest=location.digest,
    )


def _of_config(entries: Sequence[ModelConfig], headers: HeaderReader) -> dict[str, Model]:
    """Raises CliError."""
    models: dict[str, Model] = {}
    for entry in entries:
        if not is_model_id(entry.name):
            raise CliError(f"'{printable(entry.name)}' is not a model name: write it as name:tag.")
        try:
            models[entry.name] = _configured(entry, headers)
        except (OSError, ValueError) as error:
            raise CliError(
                f"The model {entry.name} ({printable(entry.path)}) cannot be served: "
                f"{_reason(error)}."
            ) from error
    return models


def _grouped(
    files: Sequence[Path], not_served: dict[Path, str]
) -> dict[tuple[Path, int], dict[int, Path]]:
    """The files of each model by the number of the part, by the model's path without numbers and
    how many parts it has; a file of its own is part 1 of 1."""
    groups: dict[tuple[Path, int], dict[int, Path]] = {}
    for path in files:
        try:
            part = splits.parse(path.name)
            if part is None:
                groups[path, 1] = {1: path}
                continue
            group = groups.setdefault((path.with_name(part.stem), part.count), {})
            if part.number in group:
                raise BadGguf(f"{printable(group[part.number].name)} is the same part{RENAME_IT}")
            group[part.number] = path
        except BadGguf as error:
            not_served[path] = str(error)
    return groups


def _id_of(path: Path) -> str:
    """What the model in that file is called.  Raises BadGguf."""
    stem = splits.stem_of(path.name)
    model_id = stem if ":" in stem else f"{stem}:latest"
    if not is_model_id(model_id):
        raise BadGguf(f"its name is no model id ({RULE}){RENAME_IT}")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadGguf(f"the name of its folder is not UTF-8{RENAME_IT}") from None
    return model_id


def _same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def remote(model_id: str, digest: str) -> Model:
    """A model of that digest which only peers have."""
    return Model(model_id, Path(), owner="peers", recorded_digest=digest, remote=True)


def directory(config: Config, home: Path) -> Path:
    """Where the files are that are served without being named in the configuration."""
    return _expanded(config.models_dir) if config.models_dir else home / "models"


def _expanded(text: str) -> Path:
    """With the home directory in place of `~`, if there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def digest_of(model: Model, stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of the GGUF in hex, of a model in several files what `splits` makes of theirs; reads
    them whole (about 1 GB/s).  Raises OSError, also if it is `stopped`."""
    if model.recorded_digest:
        return model.recorded_digest
    digests = [sha256(file.path, stopped) for file in model.files]
    return splits.digest_of_parts(digests) if model.parts else digests[0]


def _configured(entry: ModelConfig, headers: HeaderReader) -> Model:
    """Raises BadGguf, OSError, ValueError (of a path that none can be)."""
    if entry.path.startswith(FAKE):
        model = Model(entry.name, Path(entry.path), owner="fake", recorded_digest=_FAKE_DIGEST)
    else:
        path = _expanded(entry.path).absolute()
        str(path).encode()  # it is sent to the engine in UTF-8
        model = _from_files(entry.name, _parts_from(path), headers)
    return replace(model, context=entry.context, sampling=entry.sampling)


def _parts_from(path: Path) -> list[Path]:
    """The files of the model that begins with this one.  Raises BadGguf."""
    part = splits.parse(path.name)
    if part is None:
        return [Path(os.path.realpath(path))]
    if part.number != 1:
        raise BadGguf(f"it is part {part.number} of {part.count}: give the path of part 1")
    paths = [path.with_name(name) for name in part.all_parts]
    present = [number for number, each in enumerate(paths, 1) if os.path.lexists(each)]
    splits.check_complete(part.count, present)
    return paths


def _from_files(model_id: str, paths: Sequence[Path], headers: HeaderReader) -> Model:
    """The model in these files, in the order of its parts.  Raises BadGguf, OSError."""
    facts, read = [], []
    for number, path in enumerate(paths, 1):
        try:
            facts.append(stat_regular(path))
            if os.path.lexists(download_mark(path)):
                raise BadGguf("it is incomplete: aria2 has not finished it")
            read.append(headers.read(path, facts[-1]))
        except (BadGguf, OSError) as error:
            if len(paths) == 1:
                raise
            raise BadGguf(f"part {number} of {len(paths)}: {_reason(error)}") from error
    gguf.check_whole(read[0], splits.check_consistent(read))
    parts = tuple(ModelPart(path, file.st_size) for path, file in zip(paths, facts, strict=True))
    return Model(
        model_id,
        paths[0],
        size=sum(file.st_size for file in facts),
        created=max(int(file.st_mtime) for file in facts),
        header=msgspec.structs.replace(read[0], parameters=sum(each.parameters for each in read)),
        parts=parts if len(parts) > 1 else (),
    )
