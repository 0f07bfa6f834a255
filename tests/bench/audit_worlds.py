"""Who answers in the study of audits: honest boxes and cheats, and what is asked of them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pinaivu_box.engine.messages import Add, LoadModel, Output
from pinaivu_box.gateway.engine_process import EngineProcess, Item
from tests.support.engine_harness import add, sampling

Json = dict[str, Any]
CONTEXT = 512
NO_CUTS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
HEAD = 16 << 20  # bytes that contain the header of each file used
PROMPTS = (
    "Write a short story about a fox and a hen.",
    "Explain how a bicycle stays upright, in simple words.",
    "List ten things to pack for a week in the mountains, and say why.",
    "What happened in the French Revolution? Tell it year by year.",
    "How is bread made, from the field to the table?",
    "Write a dialogue of two old friends who meet at a station.",
    "Why is the sky blue and the evening red?",
    "Give advice to somebody who has to speak before many people.",
    "Describe the rules of chess to a child.",
    "What should a small town do against floods?",
    "Write a poem about rain in the night.",
    "Compare trains and aeroplanes: cost, time and comfort.",
)
LONG = "You are a helpful assistant. Answer at length, with examples, and mind the facts. "
COMMON = (28, 30, 260, 284, 281)  # tokens of full stops, commas and small words


@dataclass(frozen=True)
class World:
    """Who answers: with which file (a type that llama.cpp makes of the true one, or one of
    `SWAPPED`), variant, batch and threads, and what it does beside what was asked (`sampling`:
    other parameters; `seeds`: is added to each seed; `cut`: it leaves the system prompt out)."""

    file: str = ""
    variant: str = "haswell"
    exact: bool = False
    together: int = 12
    threads: int = 1
    sampling: Json = field(default_factory=dict)
    heat: float = 0.0
    seeds: int = 0
    cut: bool = False


WORLDS = {
    "honest, the same bits promised": World(exact=True),
    "honest, the same variant": World(),
    "honest, one at a time": World(together=1),
    "honest, batch 32, 2 threads": World(together=32, threads=2),
    "honest, sse42": World(variant="sse42"),
    "honest, zen4": World(variant="zen4"),
    "honest, zen4, batch 32, 2 threads": World(variant="zen4", together=32, threads=2),
    "honest, zen4, batch 8": World(variant="zen4", together=8),
    "honest, zen4, batch 1": World(variant="zen4", together=1),
    "Q8_0": World(file="q8_0"),
    "Q4_0": World(file="q4_0"),
    "Q2_K": World(file="q2_k"),
    "two norms swapped": World(file="norms"),
    "two layers swapped": World(file="layers"),
    "a cut prompt": World(cut=True),
    "another seed": World(seeds=1000),
    "warmer by 0.1": World(heat=0.1),
    "warmer by 0.3": World(heat=0.3),
    "a biased sampler": World(sampling={"logit_bias": {str(token): 1.0 for token in COMMON}}),
}
SWAPPED = {  # names of tensors that change places: another model of that vocabulary
    "norms": (b"blk.14.ffn_norm.weight", b"blk.15.ffn_norm.weight"),
    "layers": (b"blk.14.", b"blk.15."),
}


def load_of(path: Path, world: World, **more: Any) -> LoadModel:
    sizes = CONTEXT, max(world.together, 1) * CONTEXT, world.together, 512, world.threads
    given = {"drafting": False, "exact": world.exact, "cpu_variant": world.variant, **more}
    return LoadModel(str(path), 0, *sizes, **given)


def file_of(kind: str, source: Path, folder: Path) -> Path:
    """What `kind` of file a world has, made of `source`."""
    target = folder / f"{source.stem}-{kind}.gguf"
    if not kind or target.exists():
        return target if kind else source
    if kind in SWAPPED:
        target.write_bytes(_swapped(source.read_bytes(), *SWAPPED[kind]))
    else:
        _quantize(source, kind, target)
    return target


def _swapped(data: bytes, one: bytes, other: bytes) -> bytes:
    assert one in data and other in data and len(one) == len(other)
    between = bytes(reversed(one))
    head, tail = data[:HEAD], data[HEAD:]  # the header with all names, and hardly a tensor
    return head.replace(one, between).replace(other, one).replace(between, other) + tail


def _quantize(source: Path, kind: str, target: Path) -> None:
    import llama_cpp.llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.allow_requantize = True
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise SystemExit(f"llama.cpp cannot make {kind} of {source}")


def asked(name: str, text: str, temperature: float, seed: int, tokens: int, **more: Any) -> Add:
    """A request; its name is its tenant too, so that all have their turn at once."""
    drawn = sampling(temperature, seed=seed, ignore_eos=True, **more.pop("sampling", {}))
    before = more.pop("before", [{"role": "system", "content": LONG}])
    return add(name, text, tokens, sampling=drawn, before=before, tenant=name, **more)


def requests(
    tokens: int, temperatures: list[float], prompts: int, cuts: Json, world: World | None = None
) -> list[Add]:
    """What was asked; with a world, what it computes instead.  `cuts` are parameters of both."""
    world = world or World()
    more: Json = {"before": []} if world.cut else {}
    made = []
    for temperature in temperatures:
        for number, text in enumerate(PROMPTS[:prompts]):
            name, seed = f"{temperature:g}/{number}", 100 + number + world.seeds
            heat, other = temperature + world.heat, {**cuts, **world.sampling}
            made.append(asked(name, text, heat, seed, tokens, sampling=other, **more))
    return made


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    numbers: bytes | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, item: Item) -> None:
        if isinstance(item, Output):
            self.tokens += item.tokens
            if item.finish_reason:
                self.numbers = item.numbers
                self.ended.set()


async def answers(process: EngineProcess, asked: list[Add]) -> dict[str, Answer]:
    """What the engine answers, as many at once as it can."""
    heard = {request.id: Answer() for request in asked}
    for request in asked:
        process.submit(request, heard[request.id].take)
    for answer in heard.values():
        await answer.ended.wait()
    return heard
