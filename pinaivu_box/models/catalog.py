"""Which models this box can serve: names, files, facts and digests."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pinaivu_box.config import Config, ModelConfig, SamplingConfig
from pinaivu_box.errors import CliError, ModelNotFound, quoted
from pinaivu_box.models import bundled
from pinaivu_box.models.gguf import BadGguf, Header, read_header

# name:tag as in Ollama, with an optional owner before it.
WELL_FORMED = re.compile(r"(?:[\w.-]+/)*[\w.-]+(?::[\w.-]+)?", re.ASCII)
LONGEST_ID = 128  # characters
FAKE = "fake:"  # a runner without a model, for tests and load measurements


@dataclass(frozen=True)
class Model:
    """`size` bytes at `offset` of `path`; `created` is the file's time in Unix seconds.

    `recorded_digest` is set where the digest is known without reading the file.  A `remote` one
    is at peers only: it has neither file nor header here.
    """

    id: str
    path: Path
    offset: int
    size: int
    created: int
    owner: str
    header: Header
    context: int
    sampling: SamplingConfig
    recorded_digest: str | None = None
    remote: bool = False

    @property
    def is_fake(self) -> bool:
        return str(self.path).startswith(FAKE)


class Catalog:
    def __init__(self, models: dict[str, Model], broken: dict[str, str]) -> None:
        self._models = models
        self.broken = broken  # file -> why it is not served

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    def only(self, globs: Sequence[str]) -> Catalog:
        """The models whose ids fit one of them."""
        fits = {
            model.id: model
            for model in self.models
            if any(fnmatchcase(model.id, glob) for glob in globs)
        }
        return Catalog(fits, {})

    def find(self, model_id: str) -> Model:
        """The model of that id; a name without a tag means `:latest`.  Raises ModelNotFound."""
        for candidate in (model_id, f"{model_id}:latest", model_id.removesuffix(":latest")):
            if candidate in self._models:
                return self._models[candidate]
        near = difflib.get_close_matches(model_id[:LONGEST_ID], self._models, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        served = ", ".join(sorted(self._models)[:20]) or "no model yet"
        raise ModelNotFound(
            f"The model '{quoted(model_id)}' is not served here.{hint} Served here: {served}.",
            param="model",
        )


def load(config: Config, home: Path) -> Catalog:
    """The configured models, then the files in the models folder, then the bundled model.

    A configured file that cannot be served is the operator's mistake (CliError); a stray file in
    the folder is only noted.
    """
    models: dict[str, Model] = {}
    broken: dict[str, str] = {}
    for entry in config.model:
        if not WELL_FORMED.fullmatch(entry.name):
            raise CliError(f"'{entry.name}' is not a model name: write it as name:tag.")
        try:
            models[entry.name] = _configured(entry)
        except (BadGguf, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CliError(
                f"The model {entry.name} ({entry.path}) cannot be served: {reason}."
            ) from error
    directory = folder(config, home)
    for path in sorted(directory.glob("*.gguf")) if directory.is_dir() else []:
        model_id = path.stem if ":" in path.stem else f"{path.stem}:latest"
        try:
            models.setdefault(model_id, _from_file(model_id, path))
        except (BadGguf, OSError) as error:
            broken[str(path)] = str(error)
    location = bundled.find()
    if location and bundled.MODEL_ID not in models:
        models[bundled.MODEL_ID] = _from_file(
            bundled.MODEL_ID,
            location.path,
            offset=location.offset,
            size=location.size,
            digest=location.digest,
            owner="bundled",
        )
    return Catalog(models, broken)


def remote(model_id: str, digest: str) -> Model:
    """A model of that digest which only peers have."""
    return Model(
        id=model_id,
        path=Path(),
        offset=0,
        size=0,
        created=0,
        owner="peers",
        header=Header({}),
        context=0,
        sampling=SamplingConfig(),
        recorded_digest=digest,
        remote=True,
    )


def folder(config: Config, home: Path) -> Path:
    """Where the files are that are served without being named in the configuration."""
    return Path(config.models_dir).expanduser() if config.models_dir else home / "models"


def digest_of(model: Model) -> str:
    """SHA-256 of the GGUF in hex; reads the whole file (about 1 GB/s)."""
    if model.recorded_digest:
        return model.recorded_digest
    with model.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _configured(entry: ModelConfig) -> Model:
    if entry.path.startswith(FAKE):
        return Model(
            id=entry.name,
            path=Path(entry.path),
            offset=0,
            size=0,
            created=0,
            owner="fake",
            header=Header({}),
            context=entry.context,
            sampling=entry.sampling,
            recorded_digest=hashlib.sha256(b"fake").hexdigest(),
        )
    path = Path(entry.path).expanduser().resolve()
    return _from_file(entry.name, path, context=entry.context, sampling=entry.sampling)


def _from_file(
    model_id: str,
    path: Path,
    *,
    offset: int = 0,
    size: int | None = None,
    digest: str | None = None,
    owner: str = "local",
    context: int = 0,
    sampling: SamplingConfig | None = None,
) -> Model:
    stat = path.stat()
    return Model(
        id=model_id,
        path=path,
        offset=offset,
        size=stat.st_size if size is None else size,
        created=int(stat.st_mtime),
        owner=owner,
        header=read_header(path, offset),
        context=context,
        sampling=sampling or SamplingConfig(),
        recorded_digest=digest,
    )
