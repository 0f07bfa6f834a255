"""LoRA adapters in the engine, over the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import Adapter
from pinaivu_box.engine.runner import Batch
from pinaivu_box.errors import BoxError
from tests.support import gguf_files, lora_files
from tests.support.engine_harness import Engine, add, run, sampling
from tests.support.gguf_files import Real
from tests.support.lora_files import CHANGED
from tests.support.real_runner import real_runner

# A plain one: the bundled model has so large activations at control tokens that quantising them
# makes much of the smallest difference.
PROMPT = "The three primary colours are"


class Files:
    """A model in which one matrix has 32 bits, an adapter of it, and both merged by hand."""

    def __init__(self, folder: Path) -> None:
        real = Real.read()
        matrix = lora_files.whole_matrix(real)
        rows, columns = matrix.shape
        self.folder = folder
        self.pair = lora_files.low_rank((rows, columns), size=0.2)
        self.base = lora_files.written(folder, "base", lora_files.with_matrix(real, matrix))
        self.adapter = self.write("adapter", lora_files.adapter({CHANGED: self.pair}))
        by_hand = lora_files.with_matrix(real, lora_files.merged(matrix, self.pair, 0.5))
        self.merged = lora_files.written(folder, "merged", by_hand)

    def write(self, name: str, data: bytes) -> str:
        return str(lora_files.written(self.folder, name, data))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("adapters"))


def runner_of(path: Path, adapters: Sequence[Adapter] = ()) -> LlamaRunner:
    return real_runner(path, kv_tokens=256, max_sequences=1, adapters=list(adapters))


SURE = 6  # tokens of the answer: after some more, two are as likely and rounding decides


class Answer:
    """What a model says: its logits after a prompt, a greedy answer, and a vector of a text."""

    def __init__(self, path: Path, *adapters: Adapter) -> None:
        runner = runner_of(path, adapters)
        try:
            tokens = np.array(runner.tokenize(PROMPT), np.int32)
            positions, zeros = np.arange(len(tokens), dtype=np.int32), np.zeros_like(tokens)
            logits = runner.decode(Batch(tokens, positions, zeros, zeros.astype(np.int8) + 1))
            self.logits: npt.NDArray[np.float32] = logits.copy()
            runner.remove(0)
            runner.prepare_embedding(len(tokens))
            self.vector = runner.embed(Batch(tokens, positions, zeros, zeros.astype(np.int8)), [])
            one = add("r", max_tokens=16, prompt=PROMPT, sampling=sampling(0))
            self.tokens = run(Engine(runner, token_budget=256), [one]).tokens["r"]
        finally:
            runner.close()


def are_alike(one: Answer, other: Answer) -> bool:
    """Up to rounding: each processor quantises activations in its own way, and what that makes of
    the smallest difference grows from token to token.  The first ones tell a scale of 0.45 from
    one of 0.5."""
    difference = np.abs(one.logits - other.logits)
    return bool(difference[:2].max() < 0.1 and difference.mean() < 0.1)


def test_an_adapter_changes_what_the_model_says_as_one_that_was_merged_by_hand(
    files: Files,
) -> None:
    base = Answer(files.base)
    adapted = Answer(files.base, Adapter(files.adapter, 0.5))
    merged = Answer(files.merged)
    assert np.abs(adapted.logits - base.logits).max() > 1
    assert adapted.tokens[:SURE] != base.tokens[:SURE]
    assert adapted.tokens[:SURE] == merged.tokens[:SURE]
    assert are_alike(adapted, merged)
    assert not are_alike(Answer(files.base, Adapter(files.adapter, 0.45)), merged)
    # Also where texts are embedded, in a context of its own.
    assert np.abs(adapted.vector - base.vector).max() > 0.01


def test_two_adapters_are_added_up(files: Files) -> None:
    halves = [Adapter(files.adapter, 0.25), Adapter(files.adapter, 0.25)]
    added, merged = Answer(files.base, *halves), Answer(files.merged)
    assert added.tokens[:SURE] == merged.tokens[:SURE]
    assert are_alike(added, merged)


def test_an_adapter_of_scale_0_changes_nothing(files: Files) -> None:
    base, scaled = Answer(files.base), Answer(files.base, Adapter(files.adapter, 0.0))
    assert np.array_equal(base.logits, scaled.logits)
    assert np.array_equal(base.vector, scaled.vector) and base.tokens == scaled.tokens


def activated() -> bytes:
    invocation = gguf_files.array("adapter.alora.invocation_tokens", 4, 1, bytes(4))
    pair = lora_files.low_rank((576, 1536))
    return lora_files.adapter({CHANGED: pair}, more=(invocation,))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (lora_files.adapter({CHANGED: lora_files.low_rank((576, 64))}), "incorrect shape"),
        (
            lora_files.adapter({"blk.99.ffn_down.weight": lora_files.low_rank((576, 1536))}),
            "does not exist in base model",
        ),
        (activated(), "is an activated one"),
        (lora_files.adapter({CHANGED: lora_files.low_rank((576, 1536))})[:-64], "does not fit"),
    ],
    ids=["shape", "tensor", "activated", "cut off"],
)
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(
    files: Files, data: bytes, why: str
) -> None:
    with pytest.raises(BoxError, match=why) as refused:
        runner_of(files.base, [Adapter(files.write("wrong", data))])
    assert refused.value.message.startswith("the adapter wrong.gguf ")
