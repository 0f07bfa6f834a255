"""The models that this box can serve: names, files, headers and digests."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pinaivu_box.config import Config, ModelSettings
from pinaivu_box.errors import ModelNotFound, quoted
from pinaivu_box.models import gguf, known_models, splits
from pinaivu_box.models import overrides as override_file
from pinaivu_box.models.adapters import ModelAdapter, digest_with
from pinaivu_box.models.aliases import Aliases
from pinaivu_box.models.caches import cache as caches
from pinaivu_box.models.gguf import Header
from pinaivu_box.models.names import MAX_NAME, spellings
from pinaivu_box.models.overrides import ModelOverrides
from pinaivu_box.models.record import NO_PARAMETERS, ModelParameters, ModelRecord
from pinaivu_box.models.regular_files import expanded, sha256

FAKE = "fake:"  # a runner without a model, for tests and load measurements
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


def _why_not(path: Path, why: str) -> str:
    if not gguf.is_unfinished(why) or why == gguf.BEING_WRITTEN:
        return why
    try:
        young = abs(time.time() - path.stat().st_mtime) < _RECENT_SECONDS
    except OSError:
        return why
    return f"{why}; {gguf.BEING_WRITTEN}" if young else why


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
