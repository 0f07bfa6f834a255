"""Makes the catalog: of the configuration, the models folder, this program and other programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pinaivu_box.config import Config, ModelConfig, ModelSettings
from pinaivu_box.errors import CliError, ModelNotFound
from pinaivu_box.models import aliases as alias_file
from pinaivu_box.models import bundled, gguf, model_scan, splits
from pinaivu_box.models import overrides as override_file
from pinaivu_box.models import record as records
from pinaivu_box.models.adapters import read as read_adapters
from pinaivu_box.models.aliases import Aliases
from pinaivu_box.models.caches.cache import CachedModel
from pinaivu_box.models.catalog import FAKE, Catalog, Model, ModelPart, directory
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.model_scan import ModelScan
from pinaivu_box.models.names import RULE, is_model_id, printable, with_tag
from pinaivu_box.models.projectors import NONE as NO_PROJECTOR
from pinaivu_box.models.projectors import Projectors
from pinaivu_box.models.regular_files import download_mark, expanded, open_regular, stat_regular

RENAME_IT, RENAME_ONE = splits.RENAME_IT, ": rename one of them"  # ends of reasons
_FAKE_DIGEST = hashlib.sha256(b"fake").hexdigest()
_MAX_TEMPLATE_BYTES = 256 * 1024  # the largest of known models have 20,000


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
