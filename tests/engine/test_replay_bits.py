"""The same bits of llama.cpp when an answer is computed again by a process of other sizes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.audits.replay import Recomputed, compute_again
from pinaivu_box.engine.messages import Add, Constraint, LoadModel, Output
from pinaivu_box.gateway.engine_process import EngineProcess, Item
from pinaivu_box.models import bundled
from pinaivu_box.receipts.audit import digest_of
from tests.support.bare_engine import engine, ready_of
from tests.support.engine_harness import add, sampling
from tests.support.gguf_files import with_number

pytestmark = pytest.mark.anyio
STORY = "Write a short story about a fox and a hen, in simple words."
VARIANT = "haswell"  # one of which exactness is promised
needs_variant = pytest.mark.skipif(
    " avx2 " not in Path("/proc/cpuinfo").read_text(), reason="a processor without AVX2"
)


def load_of(**more: Any) -> LoadModel:
    location = bundled.find()
    assert location
    sizes = {"context": 512, "kv_tokens": 16 * 512, "max_sequences": 16, "token_budget": 256}
    settings = {"threads": 1, "exact": True, "cpu_variant": VARIANT, **sizes, **more}
    return LoadModel(path=str(location.path), offset=location.offset, **settings)


@dataclass
class Served:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    numbers: bytes | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, item: Item) -> None:
        if isinstance(item, Output):
            self.tokens += item.tokens
            self.text += item.text
            if item.finish_reason:
                self.numbers = item.numbers
                self.ended.set()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def serving() -> AsyncIterator[EngineProcess]:
    async with engine(load_of(drafting=True)) as process:
        yield process


@pytest.fixture(scope="module")
async def auditing() -> AsyncIterator[EngineProcess]:
    """With another context, and a pool."""
    sizes = {"context": 640, "kv_tokens": 1000, "max_sequences": 2, "token_budget": 512}
    async with engine(load_of(**sizes)) as process:
        yield process


async def served(process: EngineProcess, request: Add, beside: int = 0) -> Served:
    others = [
        add(f"o{n}", f"Tell me {n} words.", 20, sampling=sampling(0.9, seed=n), tenant=f"t{n}")
        for n in range(beside)
    ]
    heard = {each.id: Served() for each in [*others, request]}
    for each in [*others, request]:
        process.submit(each, heard[each.id].take)
    await asyncio.gather(*(each.ended.wait() for each in heard.values()))
    return heard[request.id]


def same(first: Served, second: Recomputed) -> bool:
    drawn = [each.drawn for each in second.tokens]
    assert first.numbers is not None and second.text == first.text
    return drawn == first.tokens and digest_of(second.tokens) == first.numbers.hex()


GRAMMAR = Constraint("json_schema", '{"type":"object","properties":{"animal":{"enum":["fox","cat"]}'
                     ',"age":{"type":"integer"}},"required":["animal","age"]}')  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "a chat": {},
    "greedy": {"sampling": sampling(0.0)},
    "a long prompt": {
        "prompt": [1000 + 7919 * n % 20_000 for n in range(270)],
        "sampling": sampling(1.0, top_k=0, ignore_eos=True),
    },
    "penalties and biases": {
        "sampling": sampling(0.9, frequency_penalty=0.7, repeat_penalty=1.2, logit_bias={"28": 2.0})
    },
    "a grammar": {"constraint": GRAMMAR, "text": "Describe an animal in JSON."},
    "a stop string": {"stop": ["."]},
}


@needs_variant
@pytest.mark.parametrize("way", REQUESTS.values(), ids=[*REQUESTS])
async def test_the_numbers_are_the_same(
    serving: EngineProcess, auditing: EngineProcess, way: dict[str, Any]
) -> None:
    """Beside others, and with drafts, when it was served."""
    assert serving.ready.exactness == auditing.ready.exactness != ""
    more = {"text": STORY, "max_tokens": 50, "sampling": sampling(0.8, seed=5), **way}
    request = add("r", **more)
    first = await served(serving, request, beside=4)
    assert same(first, await compute_again(auditing, request, first.tokens))


@needs_variant
async def test_a_context_that_was_made_longer_is_another_exactness(tmp_path: Path) -> None:
    """LongRoPE has other factors beyond the original one, and so other bits."""
    location = bundled.find()
    assert location
    path = tmp_path / "longer.gguf"
    name = "llama.rope.scaling.original_context_length"
    path.write_bytes(with_number(location.path.read_bytes(), name, 1024))
    sizes = {"path": str(path), "offset": 0, "max_sequences": 1}
    for context, is_long in ((1024, False), (1280, True)):
        load = load_of(context=context, kv_tokens=context)
        ready = await ready_of(msgspec.structs.replace(load, **sizes))
        assert ready.exactness.startswith("bitwise:")
        assert ready.exactness.endswith(" long") is is_long


@needs_variant
async def test_another_prompt_has_other_numbers_from_the_first_token_on(
    serving: EngineProcess, auditing: EngineProcess
) -> None:
    request = add("r", STORY, 20, sampling=sampling(0.0))
    first = await served(serving, request)
    right = await compute_again(auditing, request, first.tokens)
    cut = msgspec.structs.replace(request, messages=[{"role": "user", "content": STORY[:-1]}])
    wrong = await compute_again(auditing, cut, first.tokens)
    assert same(first, right) and not same(first, wrong)
    assert wrong.tokens[0].logit != right.tokens[0].logit
