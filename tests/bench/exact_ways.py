"""A process of tests/bench/exact_paths: one model on one CPU variant of ggml."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from tests.bench.exact_products import table

Row = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted
Logits = npt.NDArray[np.float32]
ANSWER, BATCH = 12, 1024


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(*_: object) -> None:
    pass


class Context:
    """Batches of a model's tokens, as they are asked for."""

    def __init__(self, model: Any, cache: int, **asked: int) -> None:
        params = llama.llama_context_default_params()
        params.n_batch, params.n_ubatch, params.no_perf = BATCH, 512, True
        params.type_k = params.type_v = cache
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_threads = params.n_threads_batch = asked.pop("threads", 2)
        for name, value in asked.items():
            setattr(params, name, value)
        self._context = llama.llama_init_from_model(model, params)
        assert self._context
        self._memory = llama.llama_get_memory(self._context)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def decode(self, rows: Sequence[Row]) -> Logits:
        batch = self._batch
        batch.n_tokens = len(rows)
        for number, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = wanted
        assert llama.llama_decode(self._context, batch) == 0
        shape = (sum(row[3] for row in rows), self._vocabulary)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=shape).copy()

    def remove(self, sequence: int, start: int = -1, end: int = -1) -> None:
        llama.llama_memory_seq_rm(self._memory, sequence, start, end)

    def use_threads(self, count: int) -> None:
        llama.llama_set_n_threads(self._context, count, count)

    def prompt(
        self,
        tokens: Sequence[int],
        sequence: int = 0,
        part: int = 512,
        beside: Callable[[int], list[Row]] = lambda number: [],
    ) -> Logits:
        """In batches of so many tokens, the n-th of them before the rows `beside(n)`, which give no
        logits; returns the last token's."""
        made = np.empty(0, np.float32)
        cuts = [*range(0, len(tokens), part), len(tokens)]
        for number, (start, end) in enumerate(pairwise(cuts)):
            last = end == len(tokens)
            rows = [(tokens[n], n, sequence, last and n == end - 1) for n in range(start, end)]
            made = self.decode([*rows, *beside(number)])
        last_row: Logits = made[0]
        return last_row

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """For `products` those of each type of weights (`exact_products.table`), for `time` the
    milliseconds of each part; else for each way how its logits differ from the
    first's, "" if they do not.  Raises AssertionError if the variant does not run here."""
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    if asked.get("products"):
        return table(Path(asked["libraries"]), asked["variant"])
    load = llama._lib.ggml_backend_load
    load.argtypes, load.restype = (ctypes.c_char_p,), ctypes.c_void_p
    assert load(f"{asked['libraries']}/libggml-cpu-{asked['variant']}.so".encode())
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(asked["model"].encode(), params)
    assert model
    if asked.get("time"):
        return _times(model, asked["lengths"])
    return _differences(model, asked["tokens"], asked["cache"])


def _tokens(seed: int, count: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(10, 4000, count)]


def _differences(model: Any, count: int, cache: int) -> dict[str, str]:
    prompt, answer = _tokens(1, count), _tokens(2, ANSWER)
    room = max(1024, count + 256)

    def context(sequences: int = 1, **more: int) -> Context:
        return Context(model, cache, n_seq_max=sequences, n_ctx=room * sequences, **more)

    def alone(part: int = 512, **more: int) -> list[Logits]:
        made = context(**more)
        found = [made.prompt(prompt, part=part)]
        found += [made.decode([(answer[n], count + n, 0, True)])[0] for n in range(ANSWER)]
        made.close()
        return found

    def together() -> list[Logits]:
        made = context()
        found = [made.prompt(prompt)]
        found += list(made.decode([(answer[n], count + n, 0, True) for n in range(ANSWER)]))
        made.close()
        return found

    def beside(unified: bool) -> list[Logits]:
        """Its prompt is computed with the next tokens of two others and a third one's prompt."""
        made = context(4, kv_unified=unified)
        for other in (1, 2):
            made.prompt(_tokens(10 + other, 100 * other + 33), other)
        third = _tokens(13, 333)

        def rows(number: int) -> list[Row]:
            steps = [(7, 100 * other + 33 + number, other, False) for other in (1, 2)]
            at = range(111 * number, min(111 * number + 111, 333))
            return [*steps, *((third[n], n, 3, False) for n in at)]

        parts = max(3, -(-count // 200))
        found = [made.prompt(prompt, part=-(-count // parts), beside=rows)]
        for other in (1, 2):
            made.remove(other, 100 * other + 33)
        for n in range(ANSWER):
            others = [(5, 100 * other + 33 + n, other, True) for other in (1, 2, 3)]
            found.append(made.decode([*others[:2], (answer[n], count + n, 0, True), others[2]])[2])
        made.close()
        return found

    def out_of_order() -> list[Logits]:
        """Others come and go in the pool, so that its cells are not in the order of positions."""
        made = context(4, kv_unified=True, threads=1)
        for other in (1, 2, 3):
            made.prompt(_tokens(10 + other, 100 * other + 33), other)

        def leave(number: int) -> list[Row]:
            if number == 1:
                made.remove(2)
            if number == 2:
                made.remove(1, 40, 60)
                made.remove(3)
            return []

        found = [made.prompt(prompt, part=70, beside=leave)]
        made.remove(1)
        for n in range(ANSWER):
            if n == ANSWER // 2:
                made.use_threads(2)
            found.append(made.decode([(answer[n], count + n, 0, True)])[0])
        made.close()
        return found

    ways: dict[str, Callable[[], list[Logits]]] = {
        "alone": alone,
        "one thread": lambda: alone(threads=1),
        "parts of 64": lambda: alone(64),
        "parts of 37": lambda: alone(37),
        "parts of 2": lambda: alone(2),
        "single rows": lambda: alone(1),
        "the answer in one batch": together,
        "in streams beside three": lambda: beside(False),
        "in a pool beside three": lambda: beside(True),
        "cells out of order, threads change": out_of_order,
    }
    first = ways["alone"]()
    return {name: _difference(first, way()) for name, way in ways.items()}


def _difference(first: list[Logits], other: list[Logits]) -> str:
    for number, (one, two) in enumerate(zip(first, other, strict=True)):
        if not np.array_equal(one, two):
            where = f"answer's token {number}" if number else "prompt"
            return f"{where} by {np.abs(one - two).max():.2g}"
    return ""


def _times(model: Any, lengths: Sequence[int]) -> dict[str, float]:
    """Milliseconds of CPU time on one thread."""
    made = Context(model, 1, n_seq_max=16, n_ctx=max(lengths) + 6000, kv_unified=True, threads=1)
    tokens = _tokens(1, max(lengths) + 64)

    def least(times: int, run: Callable[[int], None]) -> float:
        found = []
        for number in range(times):
            began = time.process_time()
            run(number)
            found.append(1000 * (time.process_time() - began))
        return min(found)

    def prompt(_: int) -> None:
        made.remove(0)
        made.decode([(tokens[n], n, 0, n == 447) for n in range(448)])

    found = {"prompt of 448": least(2, prompt)}
    done = 448
    for length in lengths:
        made.remove(0, min(length, done))
        while done < length:
            end = min(done + 512, length)
            made.decode([(tokens[n], n, 0, False) for n in range(done, end)])
            done = end
        done = length

        def step(number: int, length: int = length) -> None:
            made.decode([(tokens[number], length + number, 0, True)])

        found[f"1 row, {length} cells"] = least(8, step)
    for other in range(16):
        made.remove(other)
        made.decode([(tokens[n], n, other, False) for n in range(300)])

    def steps(number: int) -> None:
        made.decode([(tokens[number], 300 + number, other, True) for other in range(16)])

    found["16 rows, 300 cells"] = least(5, steps)
    made.close()
    return found
