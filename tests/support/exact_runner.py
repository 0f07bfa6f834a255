"""Engines over a model whose words depend on all tokens before them and that promises exactness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pinaivu_box.engine.messages import Add, LoadModel
from pinaivu_box.engine.prefix_store import PrefixStore
from tests.support.engine_harness import Engine, Fixed, StrictRunner, add, load

SIZES: dict[str, Any] = {"context": 1000, "kv_tokens": 32_000, "max_sequences": 64}
LONG = "A long text that tells of many things, one after another. " * 5


class ExactRunner(StrictRunner):
    """Its cells are those of streams, or of a `pool`."""

    def __init__(self, given_load: LoadModel, *, pool: bool = False, **more: Any) -> None:
        super().__init__(given_load, **more)
        self.facts = replace(self.facts, exactness="bitwise:fake", streams=not pool)


def made(
    *,
    budget: int = 512,
    draft: int = 0,
    shift: bool = False,
    store: PrefixStore | None = None,
    pool: bool = False,
    **more: Any,
) -> tuple[Engine, ExactRunner]:
    sizes = {**SIZES, "token_budget": budget}
    sizes |= {name: more.pop(name) for name in list(more) if name in sizes}
    runner = ExactRunner(load(**sizes), pool=pool, **more)
    policy = Fixed(draft)
    return Engine(runner, token_budget=budget, policy=policy, shift=shift, store=store), runner


def others(count: int) -> list[Add]:
    return [
        add(f"o{n}", f"{n} " + "x y z " * (9 * n % 140), 5 + 7 * n % 50, seed=n, tenant=f"t{n % 5}")
        for n in range(count)
    ]
