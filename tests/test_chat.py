"""Chat completions as a user of the official SDK sees them, on the real model and on the fake one.

The fake model says one sentence over and over, by position: its text is known beforehand.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from pinaivu_box.engine.fake_runner import SENTENCE
from pinaivu_box.receipts.commitment import prompt_text
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support.process_box import MODEL, UNDRAFTED, Box, StartBox

FAKE = "fake:1"
SLOW = "slow:1"  # 20 ms a step
SMALL = "small:1"  # fake too, with a context of so many tokens:
SMALL_CONTEXT = 128
SEA = "Tell me of the sea."
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def fake_box(module_box: StartBox) -> Box:
    models = ("--model", f"{FAKE}=fake:1", "--model", f"{SLOW}=fake:20")
    config = f'[[model]]\nname = "{SMALL}"\npath = "fake:0"\ncontext = {SMALL_CONTEXT}\n'
    return module_box(*models, config=config)


def ask(box: Box, text: str = "Say hello.", **more: Any) -> Any:
    """One completion through the SDK; eight greedy tokens of the real model unless told."""
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0, **more}
    messages = options.pop("messages", [{"role": "user", "content": text}])
    return box.client.chat.completions.create(messages=messages, **options)


def text_of(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def sentence(prompt_tokens: int, length: int) -> str:
    """What the fake model says after a prompt of that length."""
    said = SENTENCE.decode()
    return "".join(said[(prompt_tokens - 1 + i) % len(said)] for i in range(length))


def check_usage(usage: Any) -> None:
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


# -- plain and streamed --------------------------------------------------------------------------


def test_a_plain_answer_has_what_the_sdk_and_the_documentation_promise(box: Box) -> None:
    raw = box.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=8
    )
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert len(answer.choices) == 1
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content.strip()
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.created > 1_700_000_000
    check_usage(answer.usage)
    body = json.loads(raw.content)
    assert body["request_id"].startswith("req_")
    assert body["request_id"] == raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_a_stream_is_role_then_content_then_finish_reason(box: Box) -> None:
    raw = box.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, stream=True
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["x-accel-buffering"] == "no"
    chunks = list(raw.parse())
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert first.delta.role == "assistant"
    assert not first.delta.content
    assert middle
    assert all(choice.delta.content for choice in middle)
    assert all(choice.finish_reason is None for choice in [first, *middle])
    assert last.finish_reason == "length"
    assert not last.delta.content
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    # SDKs that know OpenAI's API only meet no usage that they did not ask for.
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.model_extra["request_id"] for chunk in chunks} == {raw.headers["x-request-id"]}


def test_the_stream_says_what_the_plain_answer_says(plain_box: Box) -> None:
    plain = ask(plain_box, SEA).choices[0]
    streamed = list(ask(plain_box, SEA, stream=True))
    assert text_of(streamed) == plain.message.content
    assert streamed[-1].choices[0].finish_reason == plain.finish_reason


def test_the_fake_model_says_its_sentence_plain_and_streamed(fake_box: Box) -> None:
    """Not a token is lost, doubled or out of order."""
    plain = ask(fake_box, model=FAKE, max_tokens=60)
    expected = sentence(plain.usage.prompt_tokens, 60)
    assert plain.choices[0].message.content == expected
    assert text_of(list(ask(fake_box, model=FAKE, max_tokens=60, stream=True))) == expected


def test_the_stream_on_the_wire_is_events_that_end_with_done(box: Box) -> None:
    response = box.chat(stream=True, max_tokens=4, temperature=0)
    events = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert json.loads(event[6:])["request_id"] == response.headers["x-request-id"]


def test_include_usage_adds_one_last_chunk_with_the_usage(box: Box) -> None:
    chunks = list(ask(box, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    check_usage(chunks[-1].usage)
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-1].usage.prompt_tokens == ask(box).usage.prompt_tokens
    assert chunks[-1].model_extra["request_id"] == chunks[0].model_extra["request_id"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"


def test_models_are_listed_and_found_by_id(box: Box) -> None:
    listed = box.client.models.list()
    assert MODEL in [model.id for model in listed.data]
    assert all(model.object == "model" for model in listed.data)
    assert listed.model_extra["request_id"].startswith("req_")
    found = box.client.models.retrieve(MODEL)
    assert found.id == MODEL
    assert found.model_extra["request_id"].startswith("req_")


# -- messages ------------------------------------------------------------------------------------


def test_text_parts_are_the_same_as_their_text(box: Box) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    in_parts = ask(box, messages=[{"role": "user", "content": parts}])
    plain = ask(box)
    assert in_parts.usage.prompt_tokens == plain.usage.prompt_tokens
    assert in_parts.choices[0].message.content == plain.choices[0].message.content


def test_every_role_reaches_the_model(box: Box) -> None:
    """Each message adds its tokens to the prompt; a developer is a system message."""
    conversation = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A pirate."},
        {"role": "user", "content": "Which ship?"},
    ]
    lengths = [
        ask(box, messages=conversation[:count], max_tokens=1).usage.prompt_tokens
        for count in range(1, 5)
    ]
    assert lengths == sorted(set(lengths))
    as_system = ask(box, messages=conversation)
    conversation[0]["role"] = "developer"
    as_developer = ask(box, messages=conversation)
    assert as_developer.usage.prompt_tokens == as_system.usage.prompt_tokens
    assert as_developer.choices[0].message.content == as_system.choices[0].message.content


def test_any_language_goes_in_and_comes_out_whole(fake_box: Box, box: Box) -> None:
    """Characters of several bytes are neither cut in the prompt nor refused."""
    text = "Grüße, 世界 🦊 \u0000 é"
    short = ask(fake_box, "", model=FAKE, max_tokens=1).usage.prompt_tokens
    whole = ask(fake_box, text, model=FAKE, max_tokens=1).usage.prompt_tokens
    assert whole - short == len(text.encode())
    assert ask(box, text).choices[0].message.content


# -- parameters ----------------------------------------------------------------------------------


def test_a_stop_string_ends_the_text_before_it(fake_box: Box) -> None:
    for stop in ("fox", ["zebra", "fox"], ["jumps", "fox", "over", "dog"]):
        answer = ask(fake_box, model=FAKE, max_tokens=200, stop=stop)
        text = answer.choices[0].message.content
        start = sentence(answer.usage.prompt_tokens, 200)
        nearest = min(
            at for word in ([stop] if isinstance(stop, str) else stop)
            if (at := start.find(word)) >= 0
        )  # fmt: skip
        assert text == start[:nearest]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(ask(fake_box, model=FAKE, max_tokens=200, stop=stop, stream=True))
        assert text_of(chunks) == text
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_string_that_never_comes_holds_nothing_back(fake_box: Box) -> None:
    """Also where the text ends with a beginning of it."""
    for length in range(40, 50):
        answer = ask(fake_box, model=FAKE, max_tokens=length, stop="The quick red")
        assert answer.choices[0].message.content == sentence(answer.usage.prompt_tokens, length)
        assert answer.choices[0].finish_reason == "length"


def test_a_stop_string_works_on_the_real_model(box: Box) -> None:
    whole = ask(box, max_tokens=16).choices[0].message.content
    stop = whole[len(whole) // 2 :][:4]
    stopped = ask(box, max_tokens=16, stop=stop).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("limits", "made"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 5}, 5),
        ({"max_tokens": 7, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 1}, 1),
    ],
)
def test_the_limit_of_tokens_is_exact(
    box: Box, fake_box: Box, limits: dict[str, int], made: int
) -> None:
    for where, model in ((box, MODEL), (fake_box, FAKE)):
        answer = where.client.chat.completions.create(
            model=model, messages=HELLO, temperature=0, **limits
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == made
        check_usage(answer.usage)


@pytest.fixture(scope="module")
def plain_box(module_box: StartBox) -> Box:
    """Without drafts, which change how many tokens are computed at a time, and with a warm cache:
    kernels for one token and for many round differently, and a close call may then go either way.
    """
    started = module_box(config=UNDRAFTED)
    ask(started, SEA)
    return started


def test_greedy_is_the_same_each_time(plain_box: Box) -> None:
    first, second = (ask(plain_box, SEA, max_tokens=32) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_seed_decides_the_text(plain_box: Box) -> None:
    def say(**more: Any) -> str:
        answer = ask(plain_box, SEA, temperature=1.5, max_tokens=8, **more)
        content: str = answer.choices[0].message.content
        return content

    assert say(seed=7) == say(seed=7)
    assert len({say(seed=seed) for seed in (1, 2, -(2**63))}) > 1
    assert len({say() for _ in range(3)}) > 1


def test_a_tiny_top_p_leaves_only_the_most_likely_token(plain_box: Box) -> None:
    greedy = ask(plain_box, SEA, max_tokens=12).choices[0].message.content
    narrow = ask(plain_box, SEA, max_tokens=12, temperature=2, top_p=1e-6)
    assert narrow.choices[0].message.content == greedy


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(fake_box: Box) -> None:
    """The fake model's tokens are bytes."""
    forced = ask(fake_box, model=FAKE, logit_bias={str(ord("A")): 100})
    assert forced.choices[0].message.content == "A" * 8
    plain = ask(fake_box, model=FAKE).choices[0].message.content
    banned = ask(fake_box, model=FAKE, logit_bias={str(ord(plain[0])): -100})
    said = banned.choices[0].message.content
    assert said[0] != plain[0] and plain[0] not in said


def test_a_penalty_makes_the_real_model_repeat_itself_less(box: Box) -> None:
    """Greedy, so that nothing but the penalty differs."""
    text, options = "Write the word apple ten times.", {"max_tokens": 48, "logprobs": True}

    def repeated(**penalties: float) -> int:
        said = ask(box, text, **options, **penalties).choices[0].logprobs.content
        return len(said) - len({one.token for one in said})

    assert repeated(frequency_penalty=2, presence_penalty=2) < repeated()


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"\uff11\uff12": 1}}, "logit_bias"),
        ({"logit_bias": {"12\n": 1}}, "logit_bias"),
        ({"logit_bias": {"012": 1}}, "logit_bias"),  # 12 has one spelling
        ({"extra_body": {"pinaivu": {"priority": "high"}}}, "priority"),
        ({"extra_body": {"pinaivu": {"priorty": 1}}}, "priorty"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(box: Box, more: Any, field: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(box, **more)
    assert field in caught.value.response.text


@pytest.mark.parametrize(
    "name", ["get\n", "get weather", "\uff47\uff45\uff54", "get\uff11", "", "é", "g" * 129]
)
def test_a_function_has_a_name_that_others_can_say(box: Box, name: str) -> None:
    """Wherever one is named, and at every endpoint."""
    function = {"name": name, "parameters": {"type": "object"}}
    user = [{"role": "user", "content": "x"}]
    model = {"model": MODEL}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": user, "tools": [
            {"type": "function", "function": function}]}),
        ("chat/completions", {"messages": user, "tool_choice": {
            "type": "function", "function": {"name": name}}}),
        ("chat/completions", {"messages": user, "response_format": {
            "type": "json_schema", "json_schema": {"name": name, "schema": {}}}}),
        ("responses", {"input": "x", "tools": [{"type": "function", **function}]}),
        ("responses", {"input": "x", "text": {
            "format": {"type": "json_schema", "name": name, "schema": {}}}}),
        ("messages", {"messages": user, "max_tokens": 1, "tools": [
            {"name": name, "input_schema": {"type": "object"}}]}),
    ]  # fmt: skip
    for path, body in asked:
        refused = box.http("POST", f"/v1/{path}", json={**model, **body})
        assert refused.status_code == 422, (path, body, refused.text)


def test_the_same_prompt_again_is_found_in_the_cache_and_the_receipt_says_so(box: Box) -> None:
    text = "A question that no other test asks: how many legs has a spider, and why so many?"
    first = ask(box, text)
    again = ask(box, text)
    assert again.usage.prompt_tokens == first.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    document = box.http("GET", f"/v1/receipts/{again.request_id}")
    signed = json.loads(document.json()["signed_receipt"])
    proof = json.loads(signed["proofs"][0]["signed"])
    assert signed["usage"]["cached_tokens"] == proof["cached_tokens"]
    assert proof["cached_tokens"] == first.usage.prompt_tokens - 1
    assert all(check.ok for check in verify_receipt(document.content))


def test_an_answer_that_outgrows_its_context_says_so_if_shifting_is_on(
    new_box: Any, tmp_path: Path
) -> None:
    config = tmp_path / "shift.toml"
    config.write_text("[engine]\ncontext = 128\ncontext_shift = true\n")
    box = new_box("--model", "fake:1=fake:0", "--config", str(config))
    asked: dict[str, Any] = {"model": "fake:1", "max_tokens": 200}
    plain = ask(box, **asked)
    assert plain.choices[0].finish_reason == "length"
    assert plain.usage.completion_tokens == 200
    assert plain.context_shift["dropped_tokens"] > 0
    chunks = list(ask(box, **asked, stream=True))
    assert chunks[-1].context_shift == plain.context_shift


def test_a_priority_is_accepted(box: Box) -> None:
    assert ask(box, extra_body={"pinaivu": {"priority": 5}}).choices


def test_user_is_accepted(box: Box) -> None:
    assert ask(box, user="customer-17").choices[0].message.content


def test_without_a_limit_the_context_is_the_limit(fake_box: Box) -> None:
    answer = fake_box.client.chat.completions.create(model=SMALL, messages=HELLO)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == SMALL_CONTEXT


# -- the context ---------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_with_its_numbers(box: Box) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(box, "hello " * 9000, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        body: Any = caught.value.body
        message = body["message"]
        assert "n_prompt_tokens" in message
        assert "n_ctx" in message
        numbers = [int(word) for word in message.replace(",", " ").split() if word.isdigit()]
        context = next(e["context"] for e in box.engines() if e["model"] == MODEL)
        assert context in numbers
        assert any(number > 9000 for number in numbers)
    assert ask(box).choices[0].message.content  # and the engine goes on


def test_a_prompt_that_leaves_room_for_one_token_is_served(fake_box: Box) -> None:
    """The boundary: context - 1 tokens pass and give one token; context tokens do not."""
    overhead = ask(fake_box, "", model=SMALL, max_tokens=1).usage.prompt_tokens
    longest = "x" * (SMALL_CONTEXT - 1 - overhead)
    answer = ask(fake_box, longest, model=SMALL, max_tokens=9)
    assert answer.usage.prompt_tokens == SMALL_CONTEXT - 1
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(fake_box, longest + "x", model=SMALL, max_tokens=9)
    body: Any = caught.value.body
    assert str(SMALL_CONTEXT) in body["message"]


# -- many at once --------------------------------------------------------------------------------


def exchange(box: Box, number: int, model: str) -> tuple[str, str, Any, str]:
    """(prompt, text, usage, request_id) of one request; odd ones stream."""
    prompt = "Tell me about the number" + " one" * number
    options: dict[str, Any] = {"model": model, "max_tokens": 8 + number % 5, "temperature": 0}
    if number % 2 == 0:
        answer = ask(box, prompt, **options)
        text = answer.choices[0].message.content
        return prompt, text, answer.usage, answer.model_extra["request_id"]
    chunks = list(ask(box, prompt, **options, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.model_extra["request_id"] for chunk in chunks}) == 1
    return prompt, text_of(chunks), chunks[-1].usage, chunks[0].model_extra["request_id"]


@pytest.mark.parametrize("model", [MODEL, FAKE])
def test_32_at_once_all_complete_each_with_its_own_answer(fake_box: Box, model: str) -> None:
    """Half of them stream.  Prompts differ in length, so their token counts tell them apart; the
    receipt of each is about its own prompt and answer."""
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda number: exchange(fake_box, number, model), range(32)))
    lengths = [usage.prompt_tokens for _, _, usage, _ in answers]
    step = len(" one") if model == FAKE else 1
    assert lengths == [lengths[0] + number * step for number in range(32)]
    assert len({request_id for *_, request_id in answers}) == 32
    for number, (prompt, text, usage, request_id) in enumerate(answers):
        check_usage(usage)
        assert usage.completion_tokens <= 8 + number % 5
        if model == FAKE:
            assert text == sentence(usage.prompt_tokens, 8 + number % 5)
        document = fake_box.http("GET", f"/v1/receipts/{request_id}").content
        question = prompt_text([{"role": "user", "content": prompt}], [])
        asked = Transcript([question], answer=text.encode())
        failed = [c for c in verify_receipt(document, transcript=asked) if not c.ok]
        assert not failed
        signed = json.loads(json.loads(document)["signed_receipt"])
        assert signed["usage"]["prompt_tokens"] == usage.prompt_tokens
        assert signed["usage"]["completion_tokens"] == usage.completion_tokens


def test_requests_at_the_same_time_share_steps(fake_box: Box) -> None:
    """Continuous batching: 16 requests of 50 tokens take far fewer than 16 x 50 steps."""

    def steps() -> float:
        for line in fake_box.http("GET", "/metrics").text.splitlines():
            if line.startswith(f'pinaivu_engine_steps_total{{model="{SLOW}"}}'):
                return float(line.split()[-1])
        return 0.0

    ask(fake_box, model=SLOW)
    before = steps()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: ask(fake_box, model=SLOW, max_tokens=50), range(16)))
    assert 50 <= steps() - before < 16 * 50 * 0.8


# -- loading -------------------------------------------------------------------------------------


def test_the_first_request_loads_the_model(new_box: Any) -> None:
    """No engine runs before it; its answer waits for the engine; the engine stays for the next."""
    fresh = new_box("--model", f"{FAKE}=fake:1")
    assert fresh.engines() == []
    assert ask(fresh, model=FAKE).choices[0].message.content
    (engine,) = fresh.engines()
    assert engine["model"] == FAKE
    assert text_of(list(ask(fresh, model=FAKE, stream=True)))
    assert [e["pid"] for e in fresh.engines()] == [engine["pid"]]
