"""A model whose words depend on how each of its cells was computed: in tiles or row by row, as
ggml's attention would.  So a token that takes another way changes an answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine import llama_exact
from pinaivu_box.engine.exact_path import BLOCK
from pinaivu_box.engine.messages import Add, LoadModel
from pinaivu_box.engine.prefix_store import PrefixStore
from pinaivu_box.engine.runner import Batch, NoSlot
from tests.support.engine_harness import Engine, Fixed, StrictRunner, add, load

SIZES: dict[str, Any] = {"context": 1000, "kv_tokens": 32_000, "max_sequences": 64}
LONG = "A long text that tells of many things, one after another. " * 5
_TILED = 1 << 20  # in the token of a cell that was computed in tiles


class PathRunner(StrictRunner):
    """A `StrictRunner` whose cells remember their way; `pool` as in `llama_exact`."""

    def __init__(self, given_load: LoadModel, *, pool: bool = False, **more: Any) -> None:
        super().__init__(given_load, **more)
        self.facts = replace(self.facts, exactness="bitwise:fake", streams=not pool)
        self.pool = pool
        self.largest = 0  # batch

    def decode(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.calls += 1
        self.largest = max(self.largest, len(batch.tokens))
        if self.used + len(batch.tokens) > self._most_cells or self._no_slot(batch):
            raise NoSlot
        rows: list[npt.NDArray[np.float32]] = []
        for part in llama_exact.parts(batch, pool=self.pool):
            rows += self._compute(part)
        self.computed += len(batch.tokens)
        return np.array(rows, np.float32).reshape(len(rows), self.facts.n_vocab)

    def _compute(self, part: Batch) -> list[npt.NDArray[np.float32]]:
        ids = part.sequence_ids.tolist()
        if part.in_blocks:
            assert len(set(ids)) == 1 and len(ids) % BLOCK == 0 and part.positions[0] % BLOCK == 0
        rows = []
        counts = Counter(ids)
        for token, position, sequence_id, output in zip(
            part.tokens.tolist(), part.positions.tolist(), ids, part.outputs.tolist(), strict=True
        ):
            seen = len(ids) if self.pool else counts[sequence_id]
            self.kv.append(sequence_id, position, token | (_TILED if seen >= BLOCK else 0))
            if output:
                rows.append(self.logits(self.kv.tokens(sequence_id)))
        return rows


def made(
    *,
    budget: int = 512,
    draft: int = 0,
    shift: bool = False,
    store: PrefixStore | None = None,
    pool: bool = False,
    **more: Any,
) -> tuple[Engine, PathRunner]:
    sizes = {**SIZES, "token_budget": budget}
    sizes |= {name: more.pop(name) for name in list(more) if name in sizes}
    runner = PathRunner(load(**sizes), pool=pool, **more)
    policy = Fixed(draft)
    return Engine(runner, token_budget=budget, policy=policy, shift=shift, store=store), runner


def others(count: int) -> list[Add]:
    return [
        add(f"o{n}", f"{n} " + "x y z " * (9 * n % 140), 5 + 7 * n % 50, seed=n, tenant=f"t{n % 5}")
        for n in range(count)
    ]
