"""The models that this box can serve: names, files, headers and digests."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pinaivu_box.config import Config, ModelConfig, ModelSettings
from pinaivu_box.errors import CliError, ModelNotFound, quoted
from pinaivu_box.models import aliases as alias_file
from pinaivu_box.models import bundled, gguf, known_models, model_scan, splits
from pinaivu_box.models import overrides as override_file
from pinaivu_box.models import record as records
from pinaivu_box.models.adapters import ModelAdapter, digest_with
from pinaivu_box.models.adapters import read as read_adapters
from pinaivu_box.models.aliases import Aliases
from pinaivu_box.models.caches import cache as caches
from pinaivu_box.models.caches.cache import CachedModel
from pinaivu_box.models.gguf import Header
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.model_scan import ModelScan
from pinaivu_box.models.names import MAX_NAME, RULE, is_model_id, printable, spellings, with_tag
from pinaivu_box.models.overrides import ModelOverrides
from pinaivu_box.models.projectors import NONE as NO_PROJECTOR
from pinaivu_box.models.projectors import Projectors
from pinaivu_box.models.record import NO_PARAMETERS, ModelParameters, ModelRecord
from pinaivu_box.models.regular_files import (
    download_mark,
    expanded,
    open_regular,
    sha256,
    stat_regular,
)

FAKE = "fake:"  # a runner without a model, for tests and load measurements
_FAKE_DIGEST = hashlib.sha256(b"fake").hexdigest()
RENAME_IT, RENAME_ONE = splits.RENAME_IT, ": rename one of them"  # ends of reasons
_MAX_TEMPLATE_BYTES = 256 * 1024  # the largest of known models have 20,000
_RECENT_SECONDS = 60.0  # a file that changed since may still be written to


NO_ALIASES = Aliases()


class ModelPart(NamedTuple):
    path: Path
    size: int


@dataclass(frozen=True)
class Model:
    """`size` bytes at `offset` of `path`; `created` is the file's time in Unix seconds.

    A model in several files has them as `parts`, of which `path` is the first and `size` the sum.
    `recorded_digest` is set where the digest is known without reading the file.  A `remote` one
    is at peers only: it has neither file nor header here.  `template` (Jinja) is configured in
    place of the file's.  With a `projector` it sees images.  With `adapters` it is another model
    than its `base`, of which `recorded_digest` is then.  `draft` is the model that drafts for it.
    `settings` are those in force: the `overrides` in place of what is configured.
    """

    id: str
    path: Path
    offset: int = 0
    size: int = 0
    created: int = 0
    owner: str = "local"
    header: Header = field(default_factory=Header)
    settings: ModelSettings = field(default_factory=ModelSettings)
    recorded_digest: str | None = None
    remote: bool = False
    parts: tuple[ModelPart, ...] = ()
    record: ModelRecord | None = None
    template: str = ""
    projector: ModelPart | None = None
    adapters: tuple[ModelAdapter, ...] = ()
    draft: Model | None = None
    overrides: ModelOverrides = override_file.NONE

    @property
    def parameters(self) -> ModelParameters:
        """The defaults that its publisher recommends."""
        return self.record.parameters if self.record is not None else NO_PARAMETERS

    @property
    def files(self) -> list[Model]:
        """Each of its files as a model of its own: itself, or its parts; without its adapters."""
        base = self.base
        if not base.parts:
            return [base]
        return [replace(base, path=path, size=size, parts=()) for path, size in base.parts]

    @property
    def base(self) -> Model:
        """The model without its adapters."""
        return replace(self, adapters=()) if self.adapters else self

    @property
    def adapter_files(self) -> list[Model]:
        """The files of its adapters, each as if it were a model."""
        return [Model(self.id, adapter.path, size=adapter.size) for adapter in self.adapters]

    @property
    def projector_file(self) -> Model | None:
        """The file of its projector, as if it were a model."""
        if self.projector is None:
            return None
        return Model(self.id, self.projector.path, size=self.projector.size)

    def digest_from(self, base: str, adapters: Sequence[str]) -> str:
        """Its digest, from those of its base and of its adapters' files."""
        if not self.adapters:
            return base
        scales = [adapter.scale for adapter in self.adapters]
        return digest_with(base, list(zip(adapters, scales, strict=True)))

    @property
    def in_cache(self) -> bool:
        """Whether its files are another program's, which this one only reads."""
        return self.owner in caches.PROGRAMS

    @property
    def is_fake(self) -> bool:
        return str(self.path).startswith(FAKE)


class Catalog:
    """`aliases` are other names, which `find` does not know: who may use them is for the gateway to
    say."""

    def __init__(
        self,
        models: dict[str, Model],
        not_served: dict[Path, str] | None = None,
        aliases: Aliases = NO_ALIASES,
    ) -> None:
        self._models = models
        self._not_served = not_served or {}
        self.aliases = aliases

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    def get(self, model_id: str) -> Model | None:
        """The model of exactly that id."""
        return self._models.get(model_id)

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
        return Catalog(left, self._not_served, self.aliases)

    def with_models(self, more: Iterable[Model]) -> Catalog:
        """A catalog with those models too."""
        models = self._models | {model.id: model for model in more}
        return Catalog(models, self._not_served, self.aliases)

    def is_written(self, model: Model) -> bool:
        """Whether one of the model's files is being written."""
        whys = [self._not_served.get(file.path) for file in model.files]
        return gguf.BEING_WRITTEN in whys

    def find(self, model_id: str) -> Model:
        """The model of that id; a name without a tag means `:latest`.  Raises ModelNotFound."""
        for candidate in spellings(model_id):
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
    scan: ModelScan | None = None,
    configured: Mapping[str, Model] | None = None,
) -> Catalog:
    """The configured models, then the files in the models folder, then the bundled model, then the
    models of other programs.

    A configured file that cannot be served is the operator's mistake (CliError); one in the folder
    is noted, and stops no other.  This reads files: it is no work for an event loop.  `headers`
    remembers what it has read for the next time.  A `scan` of the folder that was made, and the
    `configured` models if they are known, are not read again.
    """
    headers = headers or HeaderReader()
    aliases, made = alias_file.read(config.aliases, home), override_file.read(home)
    try:
        entries = [entry for entry in config.model if entry.path]
        models = _of_config(entries, headers, aliases) if configured is None else dict(configured)
        scan = scan or model_scan.scan(directory(config, home), config.model_caches)
        not_served = scan.not_served
        _add_folder(models, scan, headers, aliases)
        if not aliases.named(bundled.MODEL_ID):
            _add_bundled(models, not_served)
        _add_cached(models, scan, headers, aliases)
        projectors = _ProjectorReader(headers, {entry.name: entry for entry in config.model})
        for model in list(models.values()):
            try:
                models[model.id] = projectors.given(model)
            except CliError as error:
                if configured is None and model.id in {entry.name for entry in entries}:
                    raise
                del models[model.id]
                not_served[model.path] = error.message.rstrip(".")
        _leave_out_projectors(models, not_served)
    finally:
        headers.finish()
    _add_settings(models, config.model, not_served, strict=configured is None)
    for name, model in models.items():
        overrides = made.get(name, override_file.NONE)
        settings = overrides.applied_to(model.settings)
        models[name] = replace(model, settings=settings, overrides=overrides)
    _add_drafts(models, config.model, aliases, strict=configured is None)
    return Catalog(models, not_served, aliases)


def _add_folder(
    models: dict[str, Model], scan: ModelScan, headers: HeaderReader, aliases: Aliases
) -> None:
    """Those of the models folder; what cannot be served is noted in the scan."""
    not_served = scan.not_served
    for count, files in splits.grouped(scan.files, not_served):
        paths = [files[number] for number in sorted(files)]
        try:
            record = records.read(paths[0])
            model_id = record.id if record is not None else _id_of(paths[0])
            if (target := aliases.target_of(model_id)) is not None:
                raise BadGguf(f"{model_id} is an alias of {target} here{RENAME_IT}")
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


def _add_settings(
    models: dict[str, Model],
    entries: Sequence[ModelConfig],
    not_served: dict[Path, str],
    *,
    strict: bool,
) -> None:
    """The settings of each model, if it can have them.  Raises CliError if it is `strict`."""
    for entry in entries:
        if (served := models.get(entry.name)) is not None:
            try:
                models[entry.name] = _with_settings(served, entry)
            except CliError as error:
                if strict:
                    raise
                del models[entry.name]
                not_served[served.path] = error.message.rstrip(".")


def _add_drafts(
    models: dict[str, Model], entries: Sequence[ModelConfig], aliases: Aliases, *, strict: bool
) -> None:
    """Find the draft models.  One that is not here is a mistake (CliError) if that is `strict`;
    else, as its file has gone since, the model goes on without it."""
    known = Catalog({name: replace(model, draft=None) for name, model in models.items()})
    for entry in entries:
        if entry.name not in models:
            continue
        try:
            name = aliases.target_of(entry.draft) or entry.draft
            draft = known.find(name) if name else None
        except ModelNotFound as error:
            if strict:
                raise CliError(f"The draft model of {entry.name}: {error.message}") from error
            draft = None
        models[entry.name] = replace(models[entry.name], draft=draft)


def _with_settings(model: Model, entry: ModelConfig) -> Model:
    """Raises CliError."""
    if not entry.template:
        return replace(model, settings=entry)
    try:
        with open_regular(expanded(entry.template)) as file:
            data = file.read(_MAX_TEMPLATE_BYTES + 1)
        if len(data) > _MAX_TEMPLATE_BYTES:
            raise ValueError(f"it has more than {_MAX_TEMPLATE_BYTES:,} bytes")
        return replace(model, settings=entry, template=data.decode())
    except (OSError, ValueError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else _reason(error)
        raise CliError(
            f"The template of model {entry.name} ({printable(entry.template)}) cannot be read: "
            f"{why}."
        ) from error


def _add_bundled(models: dict[str, Model], not_served: dict[Path, str]) -> None:
    location = bundled.find()
    if location and bundled.MODEL_ID not in models:
        try:
            models[bundled.MODEL_ID] = _bundled(location)
        except (BadGguf, OSError) as error:
            not_served[location.path] = f"the bundled model: {_reason(error)}"


def _add_cached(
    models: dict[str, Model], scan: ModelScan, headers: HeaderReader, aliases: Aliases
) -> None:
    """Add the models of other programs, but for those whose names are taken."""
    not_served = scan.not_served
    for cache, files in scan.cached:
        for cached in cache.read(files, not_served):
            try:
                if (target := aliases.target_of(cached.id)) is not None:
                    raise BadGguf(f"{cached.id} is an alias of {target}")
                model = _cached(cache.program, cached, headers)
                other = models.setdefault(model.id, model)
                if other.size != model.size:  # else it is most likely the same file
                    raise BadGguf(f"another file is served as {model.id} already")
            except (BadGguf, OSError) as error:
                not_served[cached.files[0]] = _reason(error)


def _cached(program: str, cached: CachedModel, headers: HeaderReader) -> Model:
    """Raises BadGguf, OSError."""
    model = _from_files(cached.id, cached.files, headers)
    return replace(model, owner=program, record=cached.record)


def _leave_out_projectors(models: Mapping[str, Model], not_served: dict[Path, str]) -> None:
    """Projectors of models are no files that could be served and are not."""
    used = {model.projector.path for model in models.values() if model.projector is not None}
    for path in [path for path in not_served if used and Path(os.path.realpath(path)) in used]:
        del not_served[path]


class _ProjectorReader:
    """Finds the projectors of models, and reads their headers."""

    def __init__(self, headers: HeaderReader, settings: Mapping[str, ModelSettings]) -> None:
        self._headers, self._settings, self._beside = headers, settings, Projectors()

    def given(self, model: Model) -> Model:
        """The model with its projector: the configured one, that of its record, or one that lies
        beside it.  Raises CliError if one of the first two cannot be used."""
        name = self._settings[model.id].projector if model.id in self._settings else ""
        record = model.record.projector if model.record is not None else ""
        if name == NO_PROJECTOR or model.is_fake:
            return model
        if name or record:
            path = expanded(name).absolute() if name else model.path.parent / record
            try:
                return replace(model, projector=self._read(path))
            except (BadGguf, OSError) as error:
                raise CliError(
                    f"The projector of model {model.id} ({printable(str(path))}) cannot be used: "
                    f"{_reason(error)}."
                ) from error
        for path in self._beside.beside(model.path) if model.owner != "bundled" else ():
            with contextlib.suppress(BadGguf, OSError):
                return replace(model, projector=self._read(path))
        return model

    def _read(self, path: Path) -> ModelPart:
        facts = stat_regular(path)
        gguf.check_projector(self._headers.read(path, facts))
        return ModelPart(Path(os.path.realpath(path)), facts.st_size)


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


def _of_config(
    entries: Sequence[ModelConfig], headers: HeaderReader, aliases: Aliases
) -> dict[str, Model]:
    """Raises CliError."""
    models: dict[str, Model] = {}
    for entry in entries:
        if not is_model_id(entry.name):
            raise CliError(f"'{printable(entry.name)}' is not a model name: write it as name:tag.")
        if (target := aliases.target_of(entry.name)) is not None:
            raise CliError(f"{entry.name} is an alias of {target}: give the model another name.")
        try:
            models[entry.name] = _configured(entry, headers)
        except (OSError, ValueError) as error:
            raise CliError(
                f"The model {entry.name} ({printable(entry.path)}) cannot be served: "
                f"{_reason(error)}."
            ) from error
    return models


def _id_of(path: Path) -> str:
    """What the model in that file is called.  Raises BadGguf."""
    stem = splits.stem_of(path.name)
    model_id = with_tag(stem)
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
    return expanded(config.models_dir) if config.models_dir else home / "models"


def digest_of(model: Model, stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of the GGUF in hex, of a model in several files what `splits` makes of theirs, and
    with adapters what `adapters` makes of all; reads them whole (about 1 GB/s).  Raises OSError,
    also if it is `stopped`."""
    if model.adapters:
        adapters = [digest_of(file, stopped) for file in model.adapter_files]
        return model.digest_from(digest_of(model.base, stopped), adapters)
    if model.recorded_digest:
        return model.recorded_digest
    digests = [sha256(file.path, stopped) for file in model.files]
    return splits.digest_of_parts(digests) if model.parts else digests[0]


def _configured(entry: ModelConfig, headers: HeaderReader) -> Model:
    """Raises BadGguf, OSError, ValueError (of a path that none can be)."""
    if entry.path.startswith(FAKE):
        if entry.adapters:
            raise ValueError("a fake model takes no adapters")
        return Model(entry.name, Path(entry.path), owner="fake", recorded_digest=_FAKE_DIGEST)
    path = expanded(entry.path).absolute()
    str(path).encode()  # it is sent to the engine in UTF-8
    model = _from_files(entry.name, _parts_from(path), headers)
    adapters = read_adapters(entry.adapters, model.header.architecture, headers)
    return replace(model, adapters=adapters)


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
        header=gguf.joined(read),
        parts=parts if len(parts) > 1 else (),
    )
