"""Checks of the models: their files and digests, the memory they need, and an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pinaivu_box.config import Config, EngineConfig
from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.doctor.check import Check, State
from pinaivu_box.engine.messages import Output, SamplingParams
from pinaivu_box.errors import ApiError, CliError
from pinaivu_box.gateway.backend import Event, Job, Started
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.placement_plan import Start
from pinaivu_box.graphics_cards import may_have_gpus
from pinaivu_box.models import catalog_loader, fit, gguf, memory
from pinaivu_box.models.caches.cache import NO_FOLDER
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.models.names import printable, spellings
from pinaivu_box.models.regular_files import open_regular, stat_regular
from pinaivu_box.models.splits import digest_of_parts
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.store import integrity
from pinaivu_box.text import megabytes

_PIECE = 1 << 20
_CONTEXT_TOKENS = 512  # little, so that a running server keeps its memory
_Remembered = dict[str, tuple[int, int, str]]  # path -> size, mtime_ns, digest


def find(config: Config, home: Path) -> tuple[Catalog, str]:
    """The catalog, and why the configured models or aliases are not in it (empty if they are)."""
    try:
        return catalog_loader.load(config, home), ""
    except CliError as error:
        message = error.message.removesuffix(".")
    try:
        rest = msgspec.structs.replace(config, model=[], aliases={})
        return catalog_loader.load(rest, home), message
    except CliError:  # the file of the aliases that were made
        return Catalog({}), message


def real(listed: Catalog) -> list[Model]:
    return [model for model in listed.models if not model.is_fake]


def files(config: Config, home: Path) -> Iterator[Check]:
    """Check the model files, which are read completely (about 1 GB/s)."""
    listed, missing = find(config, home)
    if missing:
        yield Check(
            "models",
            "failed",
            missing,
            "correct the entry in the configuration, or replace the file",
        )
    for path, why in listed.not_served.items():
        # Other programs keep projectors and adapters beside their models.
        state: State = "warning" if gguf.is_no_model(why) else "failed"
        todo = "download the file again, or move it out of the folder"
        if state == "warning":
            todo = "nothing, if it belongs to another program"
        if why.endswith(gguf.BEING_WRITTEN):
            state, todo = "warning", "nothing, while it is being written"
        if why.endswith(NO_FOLDER):
            state, todo = "warning", "correct model_caches in the configuration"
        if why.endswith((catalog_loader.RENAME_IT, catalog_loader.RENAME_ONE)):
            why, _, todo = why.rpartition(": ")
        yield Check("models", state, f"not served: {printable(str(path))}: {why}", todo)
    yield from _aliases(listed, config)
    remembered = _remembered(home)
    for model in real(listed):
        yield _file(model, remembered)
    if not real(listed):
        yield Check("models", "warning", "no models", f"put a GGUF file into {home / 'models'}")


def _aliases(listed: Catalog, config: Config) -> Iterator[Check]:
    """Those that lead nowhere."""
    served = {model.id for model in listed.models}
    for alias, target in listed.aliases.items():
        if served.intersection(spellings(target)):
            continue
        found = f"{alias} is an alias of {target}, which is not on this box"
        todo = f"'pinaivu pull {target}', or remove the alias"
        if config.peering.enabled or config.upstream:
            todo += "; nothing, if a peer or an upstream has the model"
        yield Check("aliases", "warning", found, todo)


def _remembered(home: Path) -> _Remembered:
    try:
        with integrity.reading(home / "pinaivu.db") as connection:
            rows = connection.execute("SELECT path, size, mtime_ns, digest FROM model_files")
            return {path: (size, time, digest) for path, size, time, digest in rows}
    except sqlite3.Error:
        return {}  # no database yet, or a damaged one, which its own check reports


def _file(model: Model, remembered: _Remembered) -> Check:
    """The check of a model; of several files, the first that has a problem."""
    name = f"{model.id} ({printable(str(model.path))})"
    again = "download the file again"
    digests, unseen = [], False
    files = [*model.files, *model.adapter_files]
    for file in files:
        if len(files) > 1:
            name = f"{model.id} ({printable(str(file.path))})"
        try:
            digest = _digest(file)
            facts = stat_regular(file.path)
        except OSError as error:
            reason = error.strerror or error
            return Check("models", "failed", f"{name} cannot be read: {reason}", again)
        digests.append(digest)
        size, time, known = remembered.get(str(file.path), (0, 0, ""))
        unchanged = (size, time) == (facts.st_size, facts.st_mtime_ns)
        if file.recorded_digest:
            known, unchanged = file.recorded_digest, True
        unseen = unseen or not known
        if known and known != digest:
            return _changed(name, digest, known, unchanged)
    own, adapters = digests[: len(model.files)], digests[len(model.files) :]
    digest = model.digest_from(digest_of_parts(own) if model.parts else own[0], adapters)
    count = f" in {len(files)} files" if len(files) > 1 else ""
    how = "not served yet" if unseen else "as served before"
    finding = f"{megabytes(sum(file.size for file in files))}{count}, sha256 {digest[:16]}…, {how}"
    return Check("models", "ok", f"{model.id} ({printable(str(model.path))}): {finding}")


def _changed(name: str, digest: str, known: str, unchanged: bool) -> Check:
    """A file with another digest; `unchanged`: it has the same size and time as before."""
    if not unchanged:
        finding = (
            f"{name} was replaced after it was last served: {digest[:16]}…, before {known[:16]}…"
        )
        return Check("models", "warning", finding, "nothing, if you replaced it")
    finding = f"the content of {name} is not what was served: {digest[:16]}…, not {known[:16]}…"
    todo = (
        "download the file again; if you replaced it, 'touch' it, so that receipts name the new "
        "digest"
    )
    return Check("models", "failed", finding, todo)


def _digest(file: Model) -> str:
    """The digest of the file's bytes, even if a digest is recorded."""
    digest, left = hashlib.sha256(), file.size
    with open_regular(file.path) as opened:
        opened.seek(file.offset)
        while left and (piece := opened.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def room(config: Config, home: Path) -> Iterator[Check]:
    total, available = memory.total(), memory.available()
    if total is None or available is None:
        yield Check("memory", "ok", "the memory of this machine is unknown")
        return
    listed = find(config, home)[0]
    if may_have_gpus(os.environ):
        yield from asyncio.run(_planned(config, listed))
        return
    for model in real(listed):
        # The minimum: the cache shrinks to one context before the model is refused.
        context = memory.context_of(model, config.engine.context)
        need = fit.on_cpu(model.header, context, model.settings.kv_type or config.engine.kv_type)
        yield fits(model.id, need, total, available)


async def _planned(config: Config, listed: Catalog) -> list[Check]:
    """The checks of the models' memory on a machine with GPUs: where each would go."""
    devices, checks = DeviceMonitor(), []
    placement = Placement(LiveSettings(BoxSettings(config, listed)), _no_digest, devices)
    try:
        for model in real(listed):
            decision, _ = await placement.would_place(model)
            fits = isinstance(decision, Start)
            finding = f"{model.id}: {decision.why}" if fits else f"{model.id} {decision.why}"
            todo = "" if fits else "close other programs, or set a smaller context"
            checks.append(Check("memory", "ok" if fits else "warning", finding, todo))
    finally:
        await placement.close()
        devices.close()
    return checks


async def _no_digest(_: Model) -> str:
    return ""


def fits(model_id: str, need: int, total: int, available: int) -> Check:
    """The check of one model; sizes in bytes."""
    finding = f"{model_id} needs {megabytes(need)} of {megabytes(available)} available"
    if need > total:
        finding = f"{model_id} needs {megabytes(need)}, and the machine has {megabytes(total)}"
        return Check("memory", "failed", finding, "set a smaller context, or use a smaller model")
    if need > available:
        return Check("memory", "warning", finding, "close other programs, or set a smaller context")
    return Check("memory", "ok", finding)


def engine(config: Config, home: Path) -> Check:
    """Load the smallest model as a server would, and generate one token."""
    models = real(find(config, home)[0])
    if not models:
        return Check("engine", "warning", "no model to start an engine with", "see models, above")
    smallest = min(models, key=lambda model: model.size)
    small = msgspec.structs.replace(
        config.engine, context=_CONTEXT_TOKENS, kv_tokens=_CONTEXT_TOKENS, max_sequences=1
    )
    try:
        own = msgspec.structs.replace(smallest.settings, context=_CONTEXT_TOKENS)
        finding = asyncio.run(_one_token(dataclasses.replace(smallest, settings=own), small))
    except ApiError as error:
        todo = "'pinaivu serve --log-level debug' shows the log of the engine"
        return Check("engine", "failed", error.message.removesuffix("."), todo)
    except TimeoutError:
        finding = f"{smallest.id} generated no token in {small.start_seconds:g} s"
        return Check("engine", "failed", finding, "check whether the machine is overloaded")
    return Check("engine", "ok", f"{smallest.id} {finding}")


async def _one_token(model: Model, config: EngineConfig) -> str:
    """What the engine did, as a clause.  Raises ApiError, TimeoutError."""
    settings = LiveSettings(BoxSettings(Config(engine=config)))
    devices = DeviceMonitor() if may_have_gpus(os.environ) else None
    placement = Placement(settings, _no_digest, devices)
    job = Job(
        request_id="doctor",
        model=model,
        messages=[{"role": "user", "content": "Hello!"}],
        sampling=SamplingParams(),
        max_tokens=1,
        stop=[],
        tenant="doctor",
    )
    where, tokens = "", 0

    def take(event: Event) -> None:
        nonlocal where, tokens
        if isinstance(event, Started):
            where = f"on {event.engine.device} ({event.engine.build})"
        elif isinstance(event, Output):
            tokens += len(event.tokens)

    try:
        async with asyncio.timeout(config.start_seconds):
            await LocalBackend(placement, "", settings).start(job).run(take)
    except ApiError as error:
        if not where or error.status >= 500:
            raise
        return f"was loaded {where}; it generates no text"  # a model for embeddings
    finally:
        await placement.close()
        if devices is not None:
            devices.close()
    if tokens:
        return f"generated a token {where}"
    return f"was loaded {where} and ended its answer immediately"
