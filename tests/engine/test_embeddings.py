"""Texts are embedded in batches: in order, apart from each other, and beside streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pinaivu_box.engine.embeddings import EmbeddingJob, EmbeddingScheduler
from pinaivu_box.engine.fake_runner import N_VOCAB, FakeRunner
from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import Cancel, Embed
from pinaivu_box.engine.runner import TEXT_BATCH, Batch, EmbeddingCapacity, Float32
from pinaivu_box.errors import BoxError
from tests.support.engine_harness import Heard, KVCells, StrictRunner, add, finish, load, make
from tests.support.real_runner import real_runner

CELLS = 600 + TEXT_BATCH


class Reader(FakeRunner):
    """Keeps the cells of each text, and refuses what does not go on where it ended.

    The sum of a part depends on all tokens before it, so a stale cell or a mixed-up text shows.
    """

    def __init__(self, *, whole: bool = False, sequences: int = 8) -> None:
        super().__init__(load(context=600))
        self.batches: list[Batch] = []
        self.rooms: list[int] = []
        self._kv = KVCells()
        self._room = EmbeddingCapacity(0, sequences, CELLS, whole)

    def prepare_embedding(self, size: int) -> EmbeddingCapacity:
        assert self._kv.used == 0 or not self.rooms or size > self.rooms[-1]
        self._kv = KVCells()
        self.rooms.append(max(size, 100))
        return replace(self._room, longest=self.rooms[-1])

    def embed(self, batch: Batch, ended: Sequence[int]) -> Float32:
        self.batches.append(batch)
        for sequence_id in ended:
            self._kv.remove(sequence_id)
        sums: dict[int, Any] = {}
        for token, position, one in zip(
            batch.tokens.tolist(),
            batch.positions.tolist(),
            batch.sequence_ids.tolist(),
            strict=True,
        ):
            assert 0 <= one < self._room.sequences
            self._kv.append(one, position, token)
            before = self._kv.tokens(one)
            row = np.zeros(N_VOCAB)
            row[token] += 1 + sum(before) % 7
            sums[one] = sums.get(one, 0) + row
        assert self._kv.used <= CELLS
        if not self._room.whole:
            assert len(batch.tokens) <= TEXT_BATCH
        return np.array(list(sums.values()), np.float32)


def texts(*lengths: int, first: int = 1) -> list[list[int]]:
    return [[(first + 3 * n + k) % 250 for k in range(size)] for n, size in enumerate(lengths)]


def embed(name: str, inputs: list[list[int]], **more: Any) -> EmbeddingJob:
    return EmbeddingJob(name, inputs, **{"tenant": "t", **more})


def run(
    reader: Reader, *requests: EmbeddingJob, max_tokens: int = TEXT_BATCH
) -> dict[str, list[bytes]]:
    """All of them at once; in the order in which they are complete."""
    embeddings = EmbeddingScheduler(reader)
    for one in requests:
        embeddings.add(one)
    found: dict[str, Any] = {}
    for _ in range(5000):
        if not embeddings:
            return found
        done, tokens = embeddings.step(max_tokens)
        assert tokens > 0
        found |= {one.id: one.vectors for one in done}
    raise AssertionError("it does not come to an end")


def sizes(reader: Reader) -> list[int]:
    return [len(batch.tokens) for batch in reader.batches]


LENGTHS = (5, 1, 70, 600, 3, 255, 256, 257, 90, 600, 2)


@pytest.mark.parametrize("max_tokens", [3, 16, 50, TEXT_BATCH])
def test_each_text_has_the_vector_that_it_has_alone(max_tokens: int) -> None:
    inputs = texts(*LENGTHS)
    alone = [run(Reader(), embed("one", [tokens]))["one"][0] for tokens in inputs]
    reader = Reader()
    assert run(reader, embed("all", inputs), max_tokens=max_tokens)["all"] == alone
    assert max(sizes(reader)) <= max_tokens
    norms = [np.linalg.norm(np.frombuffer(one, "<f4")) for one in alone]
    assert norms == pytest.approx([1] * len(norms), abs=1e-6)


def test_many_texts_are_one_batch() -> None:
    reader = Reader(sequences=64)
    run(reader, embed("all", texts(*[4] * 64)))
    assert sizes(reader) == [256]


def test_a_text_that_fits_one_step_is_not_divided_for_want_of_other_tenants() -> None:
    """The cells of its beginning would make attention larger for all that is computed with it."""
    reader = Reader()
    run(reader, embed("all", texts(100, 100, 100, 90, 200, 300, 56)))
    assert sizes(reader) == [200, 190, 200, 256, 100]
    assert all(batch.positions[0] == 0 for batch in reader.batches[:4])


def test_more_texts_than_sequences_wait_for_one() -> None:
    reader = Reader(sequences=3)
    inputs = texts(*[10] * 10)
    assert len(run(reader, embed("all", inputs))["all"]) == 10
    assert all(len(set(batch.sequence_ids.tolist())) <= 3 for batch in reader.batches)


def test_a_model_that_reads_texts_whole_gets_them_whole() -> None:
    reader = Reader(whole=True)
    alone = [run(Reader(whole=True), embed("one", [one]))["one"][0] for one in texts(*LENGTHS)]
    assert run(reader, embed("all", texts(*LENGTHS)), max_tokens=64)["all"] == alone
    for batch in reader.batches:
        for one in set(batch.sequence_ids.tolist()):
            assert batch.positions[batch.sequence_ids == one][0] == 0
        assert len(batch.tokens) <= 64 or len(set(batch.sequence_ids.tolist())) == 1
    assert sum(sizes(reader)) == sum(LENGTHS)


def test_room_for_longer_texts_is_made_when_one_comes_and_nothing_is_lost() -> None:
    reader = Reader()
    lengths = (90, 80, 500, 30, 600)
    alone = [run(Reader(), embed("one", [tokens]))["one"][0] for tokens in texts(*lengths)]
    assert run(reader, embed("all", texts(*lengths)), max_tokens=40)["all"] == alone
    assert reader.rooms == [100, 500, 600]


# -- tenants ---------------------------------------------------------------------------------------


def test_tenants_share_each_batch() -> None:
    """Who comes later with one text does not wait for the 200 of another, nor for a long one."""
    reader = Reader()
    embeddings = EmbeddingScheduler(reader)
    embeddings.add(embed("many", texts(*[50] * 200), tenant="a"))
    embeddings.add(embed("long", texts(600), tenant="b"))
    embeddings.step(64)
    embeddings.add(embed("one", texts(12), tenant="c"))
    steps = 0
    done: list[EmbeddingJob] = []
    while not done:
        done, _ = embeddings.step(64)
        steps += 1
    assert [one.id for one in done] == ["one"]
    assert steps <= 2


def test_a_tenant_with_less_service_is_not_delayed_by_large_texts() -> None:
    """A text of 600 tokens needs nearly all of it; others keep coming with 500."""
    reader = Reader()
    embeddings = EmbeddingScheduler(reader)
    embeddings.add(embed("many", texts(*[500] * 40), tenant="a"))
    embeddings.step(TEXT_BATCH)
    embeddings.add(embed("long", texts(600), tenant="b"))
    steps = 0
    while all(one.id != "long" for one in embeddings.step(TEXT_BATCH)[0]):
        steps += 1
    assert steps < 12  # of the 80 that the others take


def test_requests_of_one_tenant_take_turns_and_priority_goes_first() -> None:
    reader = Reader()
    first = run(
        reader,
        embed("many", texts(*[60] * 20)),
        embed("few", texts(*[60] * 2)),
        embed("urgent", texts(*[60] * 3), priority=5),
        max_tokens=60,
    )
    assert list(first) == ["urgent", "few", "many"]


def test_a_tenants_weight_is_its_share() -> None:
    reader = Reader()
    embeddings = EmbeddingScheduler(reader)
    embeddings.add(embed("heavy", texts(*[10] * 100, first=1), tenant="a", weight=3.0))
    embeddings.add(embed("light", texts(*[10] * 100, first=9), tenant="b"))
    for _ in range(10):
        embeddings.step(40)
    heavy, light = (len(one.computed) for one in embeddings.jobs)
    assert heavy == pytest.approx(3 * light, abs=4)


# -- who leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_client_that_disconnects_cancels_its_own_request_only(steps: int) -> None:
    reader = Reader()
    inputs = texts(300, 5, 40)
    alone = [run(Reader(), embed("one", [tokens]))["one"][0] for tokens in inputs]
    embeddings = EmbeddingScheduler(reader)
    embeddings.add(embed("leaves", texts(*[200] * 8, first=7), tenant="a"))
    embeddings.add(embed("stays", inputs, tenant="b"))
    done: list[EmbeddingJob] = []
    for _ in range(steps):
        done += embeddings.step(64)[0]
    left = embeddings.end("leaves")
    assert left is not None and embeddings.end("leaves") is None
    computed = len(reader.batches)
    while embeddings:
        done += embeddings.step(64)[0]
    assert [one.id for one in done] == ["stays"]
    assert done[0].vectors == alone
    assert sum(sizes(reader)[computed:]) <= 345


def test_an_engine_says_the_end_of_who_is_cancelled() -> None:
    """It has used something exactly if it has begun."""
    engine, _ = make(context=600)
    engine.receive(Embed("begun", ["x" * 500], tenant="a"))
    engine.receive(Embed("waits", ["y" * 3], tenant="b"))
    heard = Heard()
    heard.take(engine.step())
    engine.receive(Embed("never", ["z" * 3], tenant="c"))
    for name in ("begun", "never"):
        engine.receive(Cancel(name))
    finish(engine, heard)
    assert heard.ends == {"begun": "cancelled", "waits": "stop", "never": "cancelled"}
    assert set(heard.queue_ms) == {"begun", "waits"}


# -- beside streams --------------------------------------------------------------------------------


def test_streams_go_on_while_texts_are_embedded() -> None:
    """Between two batches of texts there is a step for the streams."""
    engine, runner = make(context=600)
    seen: list[str] = []
    decode, embed_ = runner.decode, runner.embed

    def decoded(batch: Batch) -> Any:
        seen.append("step")
        return decode(batch)

    def embedded(batch: Batch, ended: Sequence[int]) -> Any:
        seen.append("texts")
        return embed_(batch, ended)

    runner.decode, runner.embed = decoded, embedded  # type: ignore[method-assign]
    engine.receive(add("stream", max_tokens=100))
    engine.receive(Embed("texts", ["x" * 500] * 20, tenant="b"))
    heard = finish(engine, Heard())
    assert heard.ends == {"stream": "length", "texts": "stop"}
    first = seen.index("texts")
    assert seen.count("texts") >= 10_000 // TEXT_BATCH
    beside = seen[first : first + 40]
    assert ["texts", "texts"] not in [beside[n : n + 2] for n in range(len(beside) - 1)]


class NoRoom(StrictRunner):
    def prepare_embedding(self, size: int) -> EmbeddingCapacity:
        raise BoxError("There is not enough memory to embed texts.")


def test_texts_for_which_there_is_no_memory_are_refused_and_streams_go_on() -> None:
    engine, _ = make(NoRoom)
    engine.receive(add("stream"))
    engine.receive(Embed("texts", ["x"]))
    heard = finish(engine, Heard())
    assert heard.ends == {"stream": "length"}
    assert "memory" in heard.refused["texts"].message


def test_more_vectors_than_a_frame_holds_are_refused_by_their_number() -> None:
    engine, _ = make()
    engine.receive(Embed("texts", ["x"] * 33_000))
    refused = finish(engine, Heard()).refused["texts"]
    assert str(32 * 1024 * 1024 // (4 * N_VOCAB)) in refused.message


# -- the real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaRunner]:
    runner = real_runner(context=512)
    yield runner
    runner.close()


def test_vectors_of_real_texts_do_not_depend_on_the_batch(llama: LlamaRunner) -> None:
    words = "The sea is wide and deep, and the sky above it is blue and full of birds. " * 9
    inputs = [llama.tokenize(words[7 * n : 7 * n + size])
              for n, size in enumerate((12, 30, 60, 90, 400, 20, 8, 650))]  # fmt: skip

    def vectors(*requests: EmbeddingJob, max_tokens: int = TEXT_BATCH) -> dict[str, Any]:
        embeddings, found = EmbeddingScheduler(llama), {}
        for one in requests:
            embeddings.add(one)
        while embeddings:
            for done in embeddings.step(max_tokens)[0]:
                found[done.id] = np.array([np.frombuffer(v, "<f4") for v in done.vectors], float)
        return found

    together = vectors(embed("all", inputs))["all"]
    alone = np.concatenate([vectors(embed("one", [one]))["one"] for one in inputs])
    parts = vectors(embed("all", inputs), max_tokens=48)["all"]
    assert (together * together).sum(axis=1) == pytest.approx(1, abs=1e-5)
    for other in (alone, parts):
        assert (together * other).sum(axis=1).min() > 0.9999
    near = together @ alone.T
    assert (near.argmax(axis=1) == np.arange(len(inputs))).all()
