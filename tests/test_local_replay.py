"""Sampled audits with an engine of this box: what a peer claims keeps nothing from its audit that
can be compared."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box import config
from pinaivu_box.audits import local_replay, own_engine
from pinaivu_box.audits.contexts import shifted_with
from pinaivu_box.audits.finding import Finding
from pinaivu_box.audits.local_replay import MAX_SIZES, LocalReplay
from pinaivu_box.audits.own_engine import NotHere
from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.config import ModelConfig
from pinaivu_box.models import catalog_loader
from pinaivu_box.receipts.transcript import LegTranscript, RequestTranscript
from pinaivu_box.settings import BoxSettings, LiveSettings
from tests.support import receipt_vectors
from tests.support.fake_answers import PROMPT, leg_of, said, transcript

pytestmark = pytest.mark.anyio
CONTEXT = 200
LARGEST = 4 * CONTEXT  # for which this box has room


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Machine:
    """Where there is no room for a context of more than LARGEST tokens; `started` are the sizes of
    the engines."""

    def __init__(self, home: Path) -> None:
        read = config.load(
            None,
            environ={},
            overrides={("engine", "context"): CONTEXT},
            extra_models=[ModelConfig(name="audited:1b", path="fake:0")],
        )
        self.settings = LiveSettings(BoxSettings(read, catalog_loader.load(read, home)))
        self.started: list[int] = []

    async def digest(self, _: Any) -> str:
        return receipt_vectors.DIGEST

    @asynccontextmanager
    async def engine(self, *of: Any) -> AsyncIterator[Any]:
        sized, _ = own_engine._sized(*of[:2], *of[3:])
        self.started.append(sized.engine.context)
        if sized.engine.context > LARGEST:
            raise NotHere("There is no room for that.")
        async with own_engine.engine_for(*of) as engine:
            yield engine

    async def replay(self, kept: RequestTranscript, legs: Sequence[LegToAudit]) -> list[Finding]:
        return await LocalReplay(self.settings, self.digest, self.digest)(kept, legs)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(local_replay, "engine_for", made.engine)
    return made


async def found(machine: Machine, kept: RequestTranscript, **more: Any) -> Finding:
    (finding,) = await machine.replay(kept, [leg_of(kept, **more)])
    return finding


async def test_an_honest_leg_takes_one_engine_of_the_usual_size(machine: Machine) -> None:
    assert (await found(machine, transcript(said()))).result == "agreed"
    assert machine.started == [CONTEXT]


async def test_a_prompt_that_is_longer_than_it_was_sent_fails_whatever_there_is_room_for(
    machine: Machine,
) -> None:
    """Its length is the peer's own word: it is compared before anything is computed."""
    claimed = [*PROMPT, *[65] * LARGEST]
    finding = await found(machine, transcript(said(30, len(claimed)), prompt=claimed))
    assert finding.result == "failed" and "prompt" in finding.why
    assert machine.started == [CONTEXT]


async def test_a_leg_that_is_too_long_for_this_box_says_nothing_of_its_peer(
    machine: Machine,
) -> None:
    """Its prompt is the one that was sent, so the output is."""
    kept = transcript(said(LARGEST))
    finding = await found(machine, kept)
    assert (finding.result, finding.evaded) == ("not_auditable", False)
    assert machine.started == [CONTEXT, LARGEST + len(PROMPT)]
    longer = transcript(said(LARGEST, len(PROMPT) + 5), prompt=[*PROMPT, *b"12345"])
    assert (await found(machine, longer)).result == "not_auditable"  # as a template with the date


async def test_a_longer_leg_takes_a_larger_engine(machine: Machine) -> None:
    assert (await found(machine, transcript(said(2 * CONTEXT)))).result == "agreed"
    assert machine.started == [CONTEXT, 2 * CONTEXT + len(PROMPT)]


async def test_who_says_that_the_model_had_begun_to_think_is_found(machine: Machine) -> None:
    """No constraint holds in thoughts."""
    kept = transcript(said())
    asked = [msgspec.structs.replace(kept.prompts[0], thinking=True)]
    assert (await found(machine, msgspec.structs.replace(kept, prompts=asked))).result == "failed"


def choices(*tokens: list[int]) -> RequestTranscript:
    kept = transcript(tokens[0])
    legs = [LegTranscript(n, 0, each, bytes(each).decode()) for n, each in enumerate(tokens)]
    return msgspec.structs.replace(kept, legs=legs)


async def test_legs_of_several_contexts_are_computed_with_an_engine_of_each(
    machine: Machine,
) -> None:
    """Else one leg, with a context of its own, would keep the others from their audit."""
    kept = choices(said(150), said(150), said(20), [*b"something else entirely"])
    shifts = [shifted_with(context, len(PROMPT), 150) for context in (64, 100)]
    legs = [leg_of(kept, n, shifted_tokens=each) for n, each in enumerate(shifts)]
    legs += [leg_of(kept, 2), leg_of(kept, 3)]
    findings = await machine.replay(kept, legs)
    assert [each.result for each in findings[2:]] == ["agreed", "failed"]
    assert len(machine.started) == 3
    assert all("shifted" not in each.why for each in findings)


async def test_more_contexts_than_a_box_has_evade_the_audit(machine: Machine) -> None:
    sizes = (64, 80, 96, 112, 128)
    kept = choices(*[said(150)] * len(sizes))
    legs = [
        leg_of(kept, n, shifted_tokens=shifted_with(context, len(PROMPT), 150))
        for n, context in enumerate(sizes)
    ]
    findings = await machine.replay(kept, legs)
    evaded = [each for each in findings if each.evaded]
    assert evaded and all(each.result == "not_auditable" for each in evaded)
    assert len(machine.started) == MAX_SIZES


@pytest.mark.parametrize(
    "exactness",
    ["bitwise:haswell b1 no_such_type", "bitwise:no_such_variant b1 f16"],
)
async def test_an_exactness_that_does_not_exist_keeps_nothing_from_its_audit(
    machine: Machine, exactness: str
) -> None:
    other = transcript([*b"something else entirely, as it is."])
    assert (await found(machine, other, exactness=exactness)).result == "failed"
