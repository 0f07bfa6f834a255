"""Images in an engine, with a tiny model and projector of each kind that llama.cpp computes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from pinaivu_box.engine.image_decoding import DecodedImage, ImageJob
from pinaivu_box.engine.images import FIRST_IMAGE_TOKEN, image_tokens
from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import Add, Cancel
from tests.support.engine_harness import IMAGES, Engine, Heard, add, finish, run, sampling
from tests.support.mtmd_reference import logits_after
from tests.support.real_runner import seeing_runner
from tests.support.tiny_vision import FAMILIES, VisionFiles, image, put

RED, BLUE = image(red=200), image(blue=200)
GREEDY = sampling(temperature=0)
BUDGET = 128


@pytest.fixture(scope="module", params=FAMILIES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionFiles:
    return put(tmp_path_factory.mktemp("vision"), request.param)


@pytest.fixture(scope="module")
def runner(files: VisionFiles) -> Iterator[LlamaRunner]:
    made = seeing_runner(files, context=512, kv_tokens=2048, max_sequences=6, token_budget=BUDGET)
    yield made
    made.close()


@pytest.fixture
def engine(runner: LlamaRunner) -> Iterator[Engine]:
    made = Engine(runner, token_budget=BUDGET)
    yield made
    for sequence_id in range(runner.facts.sequence_ids):
        runner.remove(sequence_id)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seen(name: str, *parts: str | bytes, **more: Any) -> Add:
    """A request whose message is of texts and images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "sha256": digest(part)}
        for part in parts
    ]
    files = {digest(part): part for part in parts if isinstance(part, bytes)}
    more = {"sampling": GREEDY, "images": files, **more}
    one = add(name, **more)
    one.messages[-1]["content"] = content
    return one


def cells_of(prompt: list[int]) -> list[int]:
    return [token for token in prompt if token >= FIRST_IMAGE_TOKEN]


def test_an_answer_depends_on_the_image_and_on_nothing_else(engine: Engine) -> None:
    asked = {
        "red": seen("red", "Look: ", RED, " What is it?", scope=""),
        "again": seen("again", "Look: ", RED, " What is it?", scope=""),
        "blue": seen("blue", "Look: ", BLUE, " What is it?", scope=""),
    }
    heard = run(engine, asked.values())
    assert not heard.refused
    assert heard.answer("red") == heard.answer("again") != heard.answer("blue")
    assert all(len(heard.tokens[name]) == 12 for name in asked)


def test_it_is_computed_as_llama_cpp_s_own_helper_does(engine: Engine, runner: LlamaRunner) -> None:
    one = seen("r", "Look at this: ", RED, " What is it?", logprobs=3, max_tokens=1)
    heard = run(engine, [one])
    for sequence_id in range(runner.facts.sequence_ids):
        runner.remove(sequence_id)
    decoded = msgspec.msgpack.decode(
        IMAGES(msgspec.msgpack.encode(ImageJob(RED, True)), None), type=DecodedImage
    )
    logits = logits_after(
        runner, heard.prompts["r"], decoded.width, decoded.height, decoded.rgb
    ).astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits)
    (scored,) = heard.logprobs["r"]
    likeliest = np.argsort(-logprobs)[:3]
    assert [name for name, _ in scored.top] == [runner.piece(int(token)) for token in likeliest]
    assert [value for _, value in scored.top] == pytest.approx(logprobs[likeliest], abs=0.02)


def test_its_cells_are_tokens_that_follow_from_the_digests(
    engine: Engine, runner: LlamaRunner
) -> None:
    prompt = run(engine, [seen("r", "a", RED, "b", BLUE, "c")]).prompts["r"]
    assert runner.projector is not None
    (piece,) = (each for each in runner.projector.pieces(80, 60) if each.cells)
    expected = [
        token
        for data in (RED, BLUE)
        for token in image_tokens(runner.projector.digest, digest(data), 0, piece.cells)
    ]
    assert cells_of(prompt) == expected
    assert len(set(expected)) == len(expected)


def test_a_prefix_with_an_image_is_shared_within_its_scope_only(engine: Engine) -> None:
    first = run(engine, [seen("a", "Look: ", RED, " one")])
    again = run(engine, [seen("b", "Look: ", RED, " two")])
    other_image = run(engine, [seen("c", "Look: ", BLUE, " two")])
    elsewhere = run(engine, [seen("d", "Look: ", RED, " two", scope="another")])
    through = first.prompts["a"].index(cells_of(first.prompts["a"])[-1]) + 1
    before = first.prompts["a"].index(cells_of(first.prompts["a"])[0])
    assert sum(again.cached["b"]) >= through
    assert sum(other_image.cached["c"]) == before
    assert sum(elsewhere.cached["d"]) == 0
    assert again.answer("b") == elsewhere.answer("d")


def test_two_that_come_together_look_at_the_image_once(engine: Engine) -> None:
    heard = run(engine, [seen("a", RED, " one"), seen("b", RED, " one", seed=2)])
    assert sum(heard.cached["b"]) >= len(cells_of(heard.prompts["b"]))
    assert heard.answer("a") == heard.answer("b")


def test_a_history_with_images_goes_on_where_it_was(engine: Engine) -> None:
    """Positions after an image are those that they were when the answer was made."""
    first = run(engine, [seen("a", "Look: ", RED, " What?")])
    text, tokens, _ = first.answer("a")
    whole = run(engine, [seen("w", "Look: ", RED, " What?", max_tokens=24, scope="")])
    rest = run(
        engine,
        [seen("r", "Look: ", RED, " What?", max_tokens=24, output=tokens, read=first.prompts["a"])],
    )
    assert [*tokens, *rest.tokens["r"]] == whole.tokens["w"]
    assert whole.text["w"].startswith(text)


def test_a_stream_goes_on_while_an_image_is_looked_at(engine: Engine) -> None:
    """The steps do not wait for the projector: a held one stops nobody but its own sequence."""
    held = Held(engine)
    heard = Heard()
    for one in (add("text", max_tokens=30, sampling=GREEDY), seen("image", RED, " What?")):
        engine.receive(one)
    while "text" not in heard.ends:
        heard.take(engine.step())
    assert "image" not in heard.tokens
    held.release()
    finish(engine, heard)
    assert heard.ends == {"text": "length", "image": "length"}


def test_a_cancelled_one_ends_while_its_image_is_looked_at(engine: Engine) -> None:
    held = Held(engine)
    heard = Heard()
    for one in (seen("a", RED, " What?"), seen("b", BLUE, " What?")):
        engine.receive(one)
    for _ in range(3):
        engine_step_without_waiting(engine, heard)
    engine.receive(Cancel("a"))
    engine_step_without_waiting(engine, heard)
    assert heard.ends == {"a": "cancelled"}
    held.release()
    finish(engine, heard)
    assert heard.ends == {"a": "cancelled", "b": "length"}


def test_a_preempted_one_looks_again(runner: LlamaRunner, files: VisionFiles) -> None:
    """With too few cells for all of them each still says what it says alone."""
    names = [f"r{number}" for number in range(4)]
    more: dict[str, Any] = {"max_tokens": 60, "scope": "", "logprobs": 2}
    asked = [
        seen(name, f"{name}: ", RED if number % 2 else BLUE, " What?", **more)
        for number, name in enumerate(names)
    ]
    small = seeing_runner(files, context=256, kv_tokens=256, max_sequences=4, token_budget=BUDGET)
    try:
        engine = Engine(small, token_budget=BUDGET)
        heard = run(engine, asked)
        assert engine.scheduler.preemptions
        for one in asked:
            alone = run(Engine(runner, token_budget=BUDGET), [one])
            assert_same_but_for_ties(alone, heard, one.id)
    finally:
        small.close()
        for sequence_id in range(runner.facts.sequence_ids):
            runner.remove(sequence_id)


def test_an_image_counts_towards_the_context(engine: Engine, runner: LlamaRunner) -> None:
    many = [part for number in range(140) for part in (image(red=number), " ")]
    refused = run(engine, [seen("r", *many, "What?")]).refused["r"]
    assert refused.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "whole JPEG, PNG, WebP or GIF"),
        (b"no image at all", "whole JPEG, PNG, WebP or GIF"),
        (RED[:-40], "cut off"),
    ],
)
def test_what_is_no_image_is_refused_with_a_sentence(
    engine: Engine, data: bytes, words: str
) -> None:
    heard = run(engine, [seen("r", data, " What?"), seen("good", RED, " What?")])
    assert words in heard.refused["r"].message
    assert heard.refused["r"].param == "messages"
    assert heard.ends["good"] == "length"


def test_files_are_what_their_digests_say(engine: Engine) -> None:
    other = seen("r", RED, " What?", images={digest(RED): BLUE})
    assert "not among the files" in run(engine, [other]).refused["r"].message


def test_a_prompt_of_another_projector_is_refused(engine: Engine) -> None:
    prompt = run(engine, [seen("a", RED, " What?")]).prompts["a"]
    changed = [token + (token >= FIRST_IMAGE_TOKEN) for token in prompt]
    refused = run(engine, [seen("r", RED, " What?", read=changed)]).refused["r"]
    assert "another projector" in refused.message


def assert_same_but_for_ties(first: Heard, second: Heard, name: str) -> None:
    """What is computed beside others is rounded in another way, which may decide a near tie."""
    for mine, other in zip(first.logprobs[name], second.logprobs[name], strict=True):
        (_, best), (_, next_best) = mine.top
        if mine.token != other.token:
            assert best - next_best < 0.05
            return
        assert mine.logprob == pytest.approx(other.logprob, abs=0.1)


class Held:
    """Keeps the projector of an engine waiting."""

    def __init__(self, engine: Engine) -> None:
        self._images = engine.images
        self._encode = self._images.encode
        self._gate = threading.Event()
        self._images.encode = self._wait  # type: ignore[assignment, method-assign]

    def _wait(self, picture: Any) -> Any:
        assert self._gate.wait(100)
        return self._encode(picture)

    def release(self) -> None:
        self._gate.set()


def engine_step_without_waiting(engine: Engine, heard: Heard) -> None:
    if engine.computable:
        heard.take(engine.step())
