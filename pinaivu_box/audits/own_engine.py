"""An engine of one's own for an audit: set up as the node's was, as far as its proofs say."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import get_args

import msgspec

from pinaivu_box.audits.contexts import context_of
from pinaivu_box.config import Config
from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.engine.messages import CPU, KvType
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.models import memory
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.receipts.receipt import BITWISE, Proof
from pinaivu_box.receipts.transcript import RequestTranscript
from pinaivu_box.settings import BoxSettings, LiveSettings

_EXACT_ON = re.compile(f"{BITWISE}([a-z0-9_]+) .*? ([a-z0-9_]+)(?: long)?")
Digest = Callable[[Model], Awaitable[str]]


class NotHere(NoNodesAvailable):
    """Nothing can be computed again here; the message says why."""


async def model_of(catalog: Catalog, proof: Proof, digest: Digest, known: Digest) -> Model:
    """The model with the proof's digest: that of its name, whose files are read for it, or another
    one, if its digest is `known` without that ("" if not).  Raises NotHere, OSError."""
    models = [model for model in catalog.models if not model.remote]
    for model in models:
        if model.id == proof.model and await digest(model) == proof.model_digest:
            return model
    for model in models:
        if await known(model) == proof.model_digest:
            return model
    raise NotHere(f"There is no model with the digest {proof.model_digest} here.")


@asynccontextmanager
async def engine_for(
    config: Config,
    model: Model,
    digest: Digest,
    transcript: RequestTranscript | None,
    proofs: Sequence[Proof],
) -> AsyncIterator[EngineProcess]:
    """An engine of the model for computing the proofs again.  Without a transcript these are of all
    legs.  If this processor cannot compute as the node did, it computes as it can.  Raises
    NotHere."""
    sized, own = _sized(config, model, transcript, proofs)
    devices = DeviceMonitor()
    ways = [*_exact_as(sized, own, proofs), (sized, own)]
    placements = [Placement(LiveSettings(BoxSettings(each)), digest, devices) for each, _ in ways]
    try:
        yield await _first(placements, [each for _, each in ways])
    finally:
        for placement in placements:
            await placement.close()
        devices.close()


async def _first(placements: list[Placement], models: list[Model]) -> EngineProcess:
    """The first engine that can be started."""
    why = ""
    for placement, model in zip(placements, models, strict=True):
        try:
            return await placement.acquire(model)
        except NoNodesAvailable as error:
            why = error.message
    raise NotHere(why)


def _made(transcript: RequestTranscript | None, proofs: Sequence[Proof], choice: int) -> int:
    """How many tokens that choice has."""
    if transcript is not None:
        return sum(len(leg.tokens) for leg in transcript.legs if leg.choice == choice)
    return sum(proof.completion_tokens for proof in proofs if proof.choice == choice)


def contexts_of(
    config: Config, model: Model, transcript: RequestTranscript, proofs: Sequence[Proof]
) -> tuple[int, list[int]]:
    """The usual context of an engine here, and the one that each proof needs to be computed again.
    Those that need a larger one than usual, without being shifted, need that of the largest."""
    usual = memory.context_of(model, config.engine.context)
    needs = [_need(proof, _made(transcript, proofs, proof.choice), usual) for proof in proofs]
    largest = max((need for need, shifted in needs if not shifted), default=usual)
    return usual, [need if shifted or need == usual else largest for need, shifted in needs]


def _need(proof: Proof, made: int, usual: int) -> tuple[int, bool]:
    """The context for a proof whose choice has `made` so many tokens, and whether it shifts."""
    if proof.shifted_tokens:
        found = context_of(proof.prompt_tokens, made, proof.shifted_tokens, usual)
        return found or usual, True
    return max(usual, proof.prompt_tokens + made), False


def _sized(
    config: Config,
    model: Model,
    transcript: RequestTranscript | None,
    proofs: Sequence[Proof],
) -> tuple[Config, Model]:
    """For one sequence at a time, with the context that the answers were made with."""
    usual = memory.context_of(model, config.engine.context)
    context, shifts = 0, config.engine.context_shift
    for proof in proofs:
        need, shifted = _need(proof, _made(transcript, proofs, proof.choice), usual)
        context = need if shifted else max(context, need)
        shifts |= shifted
    context = context or usual
    engine = msgspec.structs.replace(
        config.engine,
        context=context,
        kv_tokens=context,
        max_sequences=1,
        context_shift=shifts,
        drafting=False,
    )
    settings = msgspec.structs.replace(model.settings, context=0, parallel=0)
    own = replace(model, settings=settings, draft=None, projector=None)
    return msgspec.structs.replace(config, engine=engine), own


def _exact_as(
    config: Config, model: Model, proofs: Sequence[Proof]
) -> Iterator[tuple[Config, Model]]:
    """With the variant for the CPU, and the type of cache, of the first proof that names one."""
    found = next(filter(None, (_EXACT_ON.fullmatch(proof.exact_on) for proof in proofs)), None)
    if found is None:
        return
    variant, kv_type = found.groups()
    if kv_type not in get_args(KvType):
        return  # of a later version, or made up
    engine = msgspec.structs.replace(
        config.engine, exact=True, cpu_variant=variant, kv_type=kv_type, devices=(CPU,)
    )
    settings = msgspec.structs.replace(
        model.settings, exact=None, kv_type=None, devices=None, gpu_layers=None
    )
    yield msgspec.structs.replace(config, engine=engine), replace(model, settings=settings)
