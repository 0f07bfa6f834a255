"""The rest of the OpenAI API, through its own SDK: choices, log-probabilities, schemas, tools,
completions, embeddings, responses, tokens; and Anthropic's messages."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.fake_runner import SENTENCE
from pinaivu_box.engine.scheduler import MIN_AWAITED_TOKENS
from pinaivu_box.receipts.commitment import prompt_text
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support.in_process_command import run_command
from tests.support.process_box import MODEL, Box, wait_until

FAKE = "fake:1"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(box: Box, text: str = "Say hello.", **more: Any) -> Any:
    options = {"model": MODEL, "max_tokens": 12, "messages": user(text), **more}
    return box.client.chat.completions.create(**options)


def check_receipt(box: Box, request_id: str, **transcript: Any) -> dict[str, Any]:
    """It verifies; returns what was signed."""
    document = box.http("GET", f"/v1/receipts/{request_id}").content
    checks = verify_receipt(document, transcript=Transcript(**transcript) if transcript else None)
    assert all(check.ok for check in checks), checks
    signed: dict[str, Any] = json.loads(json.loads(document)["signed_receipt"])
    return signed


# -- choices ---------------------------------------------------------------------------------------


def test_choices_differ_and_share_their_prompt(box: Box) -> None:
    more = {"ignore_eos": True}  # or one of them may end early
    # Long enough that the others wait for who computes it, whatever begins as it does is known.
    text = "Tell me about the sea and the sky, the wind and the waves. " * 6
    answer = chat(box, text, n=4, seed=7, temperature=1.0, extra_body=more)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    alone = chat(box, text, seed=7, temperature=1.0)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == 4 * 12
    signed = check_receipt(box, answer.request_id)
    proofs = [json.loads(proof["signed"]) for proof in signed["proofs"]]
    assert [proof["choice"] for proof in proofs] == [0, 1, 2, 3]
    assert len({proof["sampling"]["seed"] for proof in proofs}) == 4
    # One of them has computed the prompt, the others but its end: nobody waits for a short rest.
    cached = sorted(proof["cached_tokens"] for proof in proofs)
    assert cached[1] >= alone.usage.prompt_tokens - 1 - MIN_AWAITED_TOKENS > 0


def test_choices_of_a_stream(fake_box: Box) -> None:
    stream = chat(fake_box, model=FAKE, n=3, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = dict.fromkeys(range(3), "")
    ends: dict[int, Any] = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        assert chunk.system_fingerprint == chunks[0].system_fingerprint
    assert len(set(texts.values())) == 1 and len(texts[0]) == 12
    assert ends == {0: "length", 1: "length", 2: "length"}
    assert chunks[-1].usage.completion_tokens == 36
    assert chunks[0].system_fingerprint.startswith("fp_")


def test_a_client_that_leaves_ends_all_choices(fake_box: Box) -> None:
    stream = chat(fake_box, model=FAKE, n=5, stream=True, max_tokens=3500)
    begun: set[int] = set()
    for chunk in stream:
        begun.update(choice.index for choice in chunk.choices if choice.delta.content)
        if len(begun) == 5:
            break
    stream.close()
    path = f"/v1/receipts/{chunk.request_id}"
    wait_until(lambda: fake_box.http("GET", path).status_code == 200, "the receipt")
    signed = check_receipt(fake_box, chunk.request_id)
    assert signed["finish_reason"] == "cancelled"
    assert len(signed["proofs"]) == 5


# -- log-probabilities -----------------------------------------------------------------------------


def test_log_probabilities_streamed_are_those_of_the_whole(box: Box) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "temperature": 0}
    whole = chat(box, **options).choices[0]
    content = whole.logprobs.content
    assert "".join(entry.token for entry in content) == whole.message.content
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy
        assert entry.logprob <= 0
    streamed = [
        entry
        for chunk in chat(box, stream=True, **options)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert chat(box).choices[0].logprobs is None


# -- schemas and grammars --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_answer_keeps_to_its_schema(box: Box, temperature: float, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    options = {"response_format": form, "temperature": temperature, "max_tokens": 100, "seed": 3}
    if stream:
        chunks = list(chat(box, "Who are you?", stream=True, **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        answer = chat(box, "Who are you?", **options)
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        more = {"constraint": json.dumps(PERSON, separators=(",", ":"))}
        asked = [{"role": "user", "content": "Who are you?"}]
        check_receipt(
            box, answer.request_id, prompts=[prompt_text(asked, [], **more)], answer=text.encode()
        )
    jsonschema.validate(json.loads(text), PERSON)


def test_json_mode_gives_an_object(box: Box) -> None:
    form = {"type": "json_object"}
    answer = chat(box, "A colour in JSON.", response_format=form, max_tokens=200, seed=1)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.startswith("{")


def test_a_grammar_holds(box: Box) -> None:
    extra = {"grammar": 'root ::= "yes" | "no"'}
    said = {chat(box, extra_body=extra, seed=n).choices[0].message.content for n in range(5)}
    assert said <= {"yes", "no"}


# -- stop strings ----------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 12)), min_size=1, max_size=4))
def test_a_stream_stops_where_the_whole_answer_does(
    fake_box: Box, cuts: list[tuple[int, int]]
) -> None:
    """At strings cut out of the answer anywhere, across the borders of tokens."""
    options: dict[str, Any] = {"model": FAKE, "max_tokens": 120}
    text = chat(fake_box, **options).choices[0].message.content
    options["stop"] = [text[at : at + length] for at, length in cuts]
    stopped = chat(fake_box, **options).choices[0].message.content
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in chat(fake_box, stream=True, **options)
    )
    assert streamed == stopped
    assert not any(stop in streamed for stop in options["stop"])
    assert text.startswith(stopped) and len(stopped) < len(text)


# -- tools -----------------------------------------------------------------------------------------


def test_a_required_tool_is_called_and_its_result_is_read(box: Box) -> None:
    question = user("What is the weather in Paris?")
    options: dict[str, Any] = {"tools": [WEATHER], "parallel_tool_calls": False, "seed": 1}
    first = chat(box, messages=question, tool_choice="required", max_tokens=80, **options)
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(
        json.loads(call.function.arguments),
        WEATHER["function"]["parameters"],  # type: ignore[index]
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 degrees."}
    history = [*question, choice.message.model_dump(exclude_none=True), result]
    second = chat(box, messages=history, tools=[WEATHER], tool_choice="none")
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > chat(box, messages=question).usage.prompt_tokens


def test_a_call_is_streamed_as_deltas(box: Box) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = list(
        chat(
            box,
            "Rain in Oslo?",
            stream=True,
            tools=[WEATHER],
            tool_choice=named,
            parallel_tool_calls=False,
            max_tokens=80,
            seed=2,
        )
    )
    deltas = [
        delta
        for chunk in chunks
        if chunk.choices
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert deltas[0].id.startswith("call_") and deltas[0].function.name == "weather"
    assert all(delta.id is None for delta in deltas[1:])
    assert "city" in json.loads("".join(delta.function.arguments or "" for delta in deltas))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(c.choices[0].delta.content for c in chunks if c.choices)


@pytest.mark.timeout(900)  # up to twenty answers of the real model
def test_several_calls_have_numbers_of_their_own(box: Box) -> None:
    for seed in range(20):
        answer = chat(
            box, "x", tools=[WEATHER], tool_choice="required", max_tokens=200, seed=seed,
            temperature=1.5,
        )  # fmt: skip
        calls = answer.choices[0].message.tool_calls
        assert all(call.function.name == "weather" for call in calls)
        if len(calls) > 1:
            assert len({call.id for call in calls}) == len(calls)
            return
    raise AssertionError("the model never called twice")


def test_with_a_schema_and_tools_an_answer_is_one_or_the_other(box: Box) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    kinds = set()
    for seed in range(6):
        answer = chat(
            box, "Who is in Rome?", tools=[WEATHER], response_format=form, max_tokens=120,
            seed=seed, parallel_tool_calls=False,
        ).choices[0]  # fmt: skip
        kinds.add(answer.finish_reason)
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.message.content), PERSON)
        else:
            assert "city" in json.loads(answer.message.tool_calls[0].function.arguments)
    assert kinds <= {"stop", "tool_calls"}


def test_without_need_a_model_may_answer_in_words(fake_box: Box) -> None:
    answer = chat(fake_box, model=FAKE, tools=[WEATHER])
    assert answer.choices[0].message.content.strip()
    assert answer.choices[0].message.tool_calls is None


# -- what is accepted as documented ----------------------------------------------------------------


def test_tier_store_and_metadata(fake_box: Box) -> None:
    answer = chat(
        fake_box, model=FAKE, service_tier="auto", store=True, metadata={"a": "b"}, user="u"
    )
    assert answer.service_tier == "default"
    assert answer.ignored_parameters == ["store", "metadata"]


CHATS = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
THOUGHTS = {"thinking": {"type": "enabled"}}
EFFORT = {"input": "x", "max_output_tokens": 4, "reasoning": {"effort": "high"}}
SAID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("/chat/completions", {**CHATS, "store": True, "metadata": {"a": "b"}}, ["store", "metadata"]),
    # The model has no thoughts.
    ("/chat/completions", {**CHATS, "reasoning_effort": "high", "n": 2}, ["reasoning_effort"]),
    ("/chat/completions", {**CHATS, "colour": 1, "think": True}, ["colour", "enable_thinking"]),
    ("/chat/completions", {**CHATS, "store": False, "metadata": {}, "think": False}, []),
    ("/messages", {**CHATS, **THOUGHTS}, ["thinking"]),
    ("/responses", EFFORT, ["reasoning.effort"]),
]


@pytest.mark.parametrize(("path", "body", "said"), SAID)
@pytest.mark.parametrize("stream", [False, True])
def test_body_and_header_say_the_same(
    fake_box: Box, path: str, body: dict[str, Any], said: list[str], stream: bool
) -> None:
    whole = {"model": FAKE, "stream": stream, **body}
    answer = fake_box.http("POST", f"/v1{path}", json=whole)
    assert answer.status_code == 200, answer.text
    header = answer.headers.get("x-pinaivu-ignored", "")
    assert [name for name in header.split(", ") if name] == said
    text = answer.text
    if stream:
        text = next(line[6:] for line in text.splitlines() if line.startswith("data: "))
    told = json.loads(text)
    told = told.get("message") or told.get("response") or told  # of a stream's first event
    assert (told.get("ignored_parameters") or []) == said


def test_a_strict_request_is_told_that_nothing_is_stored(fake_box: Box) -> None:
    for change, status in ({"store": True}, 422), ({"metadata": {"a": "b"}}, 422), ({}, 200):
        answer = fake_box.http(
            "POST",
            "/v1/chat/completions",
            json={"model": FAKE, **CHATS, **change},
            headers={"x-pinaivu-strict": "1"},
        )
        assert answer.status_code == status, answer.text
        if change:
            assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_a_prediction_changes_nothing_but_the_time(fake_box: Box) -> None:
    options: dict[str, Any] = {"model": FAKE, "max_tokens": 60}
    text = chat(fake_box, **options).choices[0].message.content
    for predicted in (text, text[20:] + "something else", "nothing like it"):
        prediction = {"type": "content", "content": predicted}
        again = chat(fake_box, prediction=prediction, **options)
        assert again.choices[0].message.content == text


def test_llama_cpp_s_parameters_are_recorded(box: Box) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.2}
    answer = chat(box, extra_body={**extra, "cache_prompt": False})
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    signed = check_receipt(box, answer.request_id)
    sampling = json.loads(signed["proofs"][0]["signed"])["sampling"]
    assert {name: sampling[name] for name in extra} == extra


# -- completions -----------------------------------------------------------------------------------


def test_completions_of_several_prompts(fake_box: Box) -> None:
    """The fake model goes on by position: prompts of three lengths are three texts."""
    prompts = ["ab", "abcd", "abcdef"]
    answer = fake_box.client.completions.create(model=FAKE, prompt=prompts, max_tokens=6, n=2)
    said = SENTENCE.decode()
    assert [choice.text for choice in answer.choices] == [
        said[len(prompt) - 1 :][:6] for prompt in prompts for _ in range(2)
    ]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 2 + 4 + 6
    assert answer.usage.completion_tokens == 36
    signed = check_receipt(fake_box, answer.request_id)
    assert signed["usage"]["prompt_tokens"] == 12


def test_a_completion_of_tokens_is_that_of_their_text(box: Box) -> None:
    text = "Once upon a time"
    listed = box.http("POST", "/v1/tokenize", json={"model": MODEL, "text": text}).json()
    assert listed["count"] == len(listed["tokens"])
    back = box.http(
        "POST", "/v1/detokenize", json={"model": MODEL, "tokens": listed["tokens"]}
    ).json()
    assert back["text"] == text
    create = box.client.completions.create
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    of_text = create(prompt=text, **options)
    of_tokens = create(prompt=listed["tokens"], **options)
    assert of_text.choices[0].text == of_tokens.choices[0].text
    assert of_text.usage.prompt_tokens == len(listed["tokens"])
    echoed = create(prompt=text, echo=True, **options)
    assert echoed.choices[0].text == text + of_text.choices[0].text
    chunks = list(create(prompt=text, echo=True, stream=True, **options))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == echoed.choices[0].text
    probed = create(prompt=text, logprobs=2, **options).choices[0]
    assert "".join(probed.logprobs.tokens) == probed.text
    assert all(len(top) == 2 for top in probed.logprobs.top_logprobs)


@pytest.mark.parametrize(
    "change",
    [{"prompt": ""}, {"prompt": []}, {"prompt": ["a", 1]}, {"prompt": [10**9]}, {"suffix": "x"}],
)
def test_a_prompt_that_is_none_is_refused(fake_box: Box, change: dict[str, Any]) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        fake_box.client.completions.create(**{"model": FAKE, "prompt": "x", **change})
    assert caught.value.param in ("prompt", "suffix")


# -- embeddings ------------------------------------------------------------------------------------


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_embeddings_tell_alike_from_different(box: Box) -> None:
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Interest rates rose 3%."]
    answer = box.client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    one, alike, other = (entry.embedding for entry in answer.data)
    assert cosine(one, one) == pytest.approx(1, abs=1e-5)
    assert cosine(one, alike) > cosine(one, other)
    signed = check_receipt(box, answer.request_id)
    assert signed["usage"]["prompt_tokens"] == answer.usage.prompt_tokens > 15
    assert signed["usage"]["completion_tokens"] == 0


def test_embeddings_in_base64_shortened_and_of_tokens(box: Box) -> None:
    create = box.client.embeddings.create
    whole = create(model=MODEL, input="the sea", encoding_format="float").data[0].embedding
    raw = box.http(
        "POST",
        "/v1/embeddings",
        json={"model": MODEL, "input": "the sea", "encoding_format": "base64"},
    ).json()["data"][0]["embedding"]
    assert struct.unpack(f"<{len(whole)}f", base64.b64decode(raw)) == pytest.approx(whole)
    short = create(model=MODEL, input="the sea", dimensions=64, encoding_format="float")
    assert len(short.data[0].embedding) == 64
    assert cosine(short.data[0].embedding, short.data[0].embedding) == pytest.approx(1, abs=1e-5)
    tokens = box.http("POST", "/v1/tokenize", json={"model": MODEL, "text": "the sea"}).json()
    same = create(model=MODEL, input=tokens["tokens"], encoding_format="float")
    assert same.data[0].embedding == pytest.approx(whole, abs=1e-5)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(model=MODEL, input="x", dimensions=100_000)
    assert caught.value.param == "dimensions"


def test_a_text_longer_than_a_batch_has_a_vector(box: Box) -> None:
    long = "The sea is wide and deep and blue. " * 60
    answer = box.client.embeddings.create(model=MODEL, input=[long, "short"])
    assert answer.usage.prompt_tokens > 400
    vector = answer.data[0].embedding
    assert cosine(vector, vector) == pytest.approx(1, abs=1e-4)


# -- responses -------------------------------------------------------------------------------------


def respond(box: Box, **more: Any) -> Any:
    options = {"model": MODEL, "max_output_tokens": 12, "temperature": 0, **more}
    return box.client.responses.create(**options)


def test_a_conversation_goes_on_where_it_was(box: Box) -> None:
    first = respond(box, input="My name is Ada.", instructions="Be brief.")
    assert first.output_text and first.status in ("completed", "incomplete")
    second = respond(box, input="And now?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens
    by_hand = chat(
        box,
        messages=[
            *user("My name is Ada."),
            {"role": "assistant", "content": first.output_text},
            *user("And now?"),
        ],
        temperature=0,
    )
    assert by_hand.usage.prompt_tokens == second.usage.input_tokens
    stored = box.client.responses.retrieve(second.id)
    assert stored.output_text == second.output_text and stored.status == second.status
    listed = box.client.responses.input_items.list(second.id).data
    assert [item.content[0].text for item in listed] == ["And now?"]
    check_receipt(box, second.request_id)


def test_responses_are_deleted_unseen_by_others_and_kept_only_if_wanted(box: Box) -> None:
    kept = respond(box, input="x", max_output_tokens=1)
    other = json.loads(run_command("keys", "create", "--json", home=box.home).stdout)["key"]
    with pytest.raises(openai.NotFoundError):
        box.client_with(other).responses.retrieve(kept.id)
    with pytest.raises(openai.NotFoundError):
        box.client_with(other).responses.delete(kept.id)
    box.client.responses.delete(kept.id)
    for gone in (kept.id, respond(box, input="x", max_output_tokens=1, store=False).id):
        with pytest.raises(openai.NotFoundError):
            box.client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            respond(box, input="x", previous_response_id=gone)


ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.incomplete",
]


def test_the_events_of_a_response_are_in_openai_s_order(box: Box) -> None:
    events = list(respond(box, input="Tell me of the sea.", stream=True))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last = events[-1].response
    assert last.output_text == deltas == box.client.responses.retrieve(last.id).output_text
    assert last.incomplete_details.reason == "max_output_tokens"


def test_a_response_calls_a_tool_and_reads_its_output(box: Box) -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    options = {"tools": [tool], "parallel_tool_calls": False, "max_output_tokens": 80}
    events = list(
        respond(box, input="Weather in Rome?", tool_choice="required", stream=True, **options)
    )
    response = events[-1].response
    (call,) = response.output
    assert call.type == "function_call" and call.name == "weather"
    assert "city" in json.loads(call.arguments)
    kinds = {event.type for event in events}
    assert {
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
    } <= kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    after = respond(box, input=[result], previous_response_id=response.id)
    assert after.output_text


def test_a_response_keeps_to_a_schema(box: Box) -> None:
    form = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    answer = respond(box, input="Who?", text={"format": form}, max_output_tokens=100)
    jsonschema.validate(json.loads(answer.output_text), PERSON)


def test_truncation_auto_removes_the_oldest_messages(fake_box: Box) -> None:
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": f"{number:03} " * 70}
        for number in range(61)
    ]
    options: dict[str, Any] = {"model": FAKE, "instructions": "Be brief."}
    with pytest.raises(openai.BadRequestError, match="context"):
        respond(fake_box, input=turns, **options)
    made = respond(fake_box, input=turns, truncation="auto", max_output_tokens=100, **options)
    assert made.truncation == "auto" and made.output_text
    ends = [turns[-number:] for number in range(1, 61, 2)]  # each begins with the user
    counts = [respond(fake_box, input=end, **options).usage.input_tokens for end in ends[:13]]
    assert made.usage.input_tokens in counts[8:]  # and so does what stayed
    # Of a conversation as well, and what fits loses nothing.
    more: dict[str, Any] = {"input": "And now?", "previous_response_id": made.id, **options}
    assert respond(fake_box, truncation="auto", **more).output_text
    with pytest.raises(openai.BadRequestError, match="context"):
        respond(fake_box, **more)
    for truncation in ("auto", "disabled"):
        short = respond(fake_box, input=ends[0], truncation=truncation, **options)
        assert short.usage.input_tokens == counts[0]
    with pytest.raises(openai.BadRequestError, match="context"):
        respond(fake_box, input="x" * 20_000, truncation="auto", **options)


def test_fields_that_name_state_on_another_server_are_refused_by_name(fake_box: Box) -> None:
    for name, value in (("conversation", "conv_1"), ("prompt", {"id": "pmpt_1"})):
        with pytest.raises(openai.UnprocessableEntityError, match=f"'{name}' is part of OpenAI"):
            respond(fake_box, model=FAKE, input="hi", **{name: value})


# -- tools that may be called ----------------------------------------------------------------------

PAIR = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("a", "b")]
FLAT: list[dict[str, Any]] = [
    {"type": "function", "name": name, "parameters": {}} for name in ("a", "b")
]


def allowed(mode: str, *tools: Any) -> Any:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def test_only_allowed_tools_are_called_and_all_are_told(fake_box: Box) -> None:
    options: dict[str, Any] = {"model": FAKE, "parallel_tool_calls": False, "max_tokens": 100}
    free = chat(fake_box, tools=PAIR, tool_choice="auto", **options)
    for number, name in enumerate(("a", "b")):
        answer = chat(
            fake_box, tools=PAIR, tool_choice=allowed("required", PAIR[number]), **options
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == name
        assert answer.usage.prompt_tokens == free.usage.prompt_tokens
        made = respond(
            fake_box,
            model=FAKE,
            input="Say hello.",
            tools=[*FLAT, {"type": "web_search"}],
            tool_choice={
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": name}, {"type": "web_search"}],
            },
            parallel_tool_calls=False,
            max_output_tokens=100,
        )
        assert [one.name for one in made.output] == [name]
        assert made.tool_choice.type == "allowed_tools"
        assert made.ignored_parameters == ["tools.web_search", "tool_choice.tools.web_search"]
    chosen = chat(fake_box, tools=PAIR, tool_choice=allowed("auto", PAIR[1]), **options)
    assert chosen.choices[0].message.content == free.choices[0].message.content
    for wrong in (allowed("auto", WEATHER), allowed("required")):
        with pytest.raises(openai.UnprocessableEntityError, match="tool"):
            chat(fake_box, tools=PAIR, tool_choice=wrong, **options)


@pytest.mark.parametrize(
    ("space", "beside", "called"),
    [("mcp", [], ("mcp", "b")), ("a", FLAT, (None, "b"))],
    ids=["by its own name", "after a function of its name"],
)
def test_a_tool_of_a_namespace_is_chosen(
    fake_box: Box, space: str, beside: list[Any], called: tuple[str | None, str]
) -> None:
    tools = [{"type": "namespace", "name": space, "tools": FLAT}, *beside]
    named = {"type": "function", "name": "b"}
    options: dict[str, Any] = {"model": FAKE, "input": "hi", "max_output_tokens": 100}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        made = respond(
            fake_box, tools=tools, tool_choice=choice, parallel_tool_calls=False, **options
        )
        assert [(one.namespace, one.name) for one in made.output] == [called]


def test_more_tools_than_there_may_be_are_not_chosen_from(fake_box: Box) -> None:
    """Each namespace has one of that name: what is looked up must not be the product of both."""
    few, many = [FLAT[0]] * 1024, [FLAT[0]] * 1025
    spaces = [{"type": "namespace", "name": f"n{n}", "tools": few[:1]} for n in range(1024)]
    options: dict[str, Any] = {
        "model": FAKE,
        "input": "hi",
        "tools": spaces,
        "max_output_tokens": 2,
    }
    for listed, status in ((few, 400), (many, 422)):  # 400: the prompt is too long
        choice = {"type": "allowed_tools", "mode": "auto", "tools": listed}
        body = {**options, "tool_choice": choice}
        answer = fake_box.http("POST", "/v1/responses", json=body)
        assert answer.status_code == status, answer.text[:300]
    chosen = allowed("auto", *[PAIR[0]] * 1025)
    with pytest.raises(openai.UnprocessableEntityError, match="1024"):
        chat(fake_box, model=FAKE, tools=PAIR, tool_choice=chosen)


DIGITS = "[0-9]{3}-[xy]z"
RUN = {
    "type": "custom",
    "custom": {
        "name": "run",
        "description": "Run it.",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": DIGITS}},
    },
}


def test_a_chat_calls_custom_tools_with_text(fake_box: Box) -> None:
    options: dict[str, Any] = {
        "model": FAKE,
        "tools": [RUN, WEATHER],
        "tool_choice": {"type": "custom", "custom": {"name": "run"}},
        "temperature": 0,
        "max_tokens": 100,
    }
    answer = chat(fake_box, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.custom.name) == ("custom", "run")
    assert re.fullmatch(DIGITS, call.custom.input)
    assert answer.choices[0].finish_reason == "tool_calls"
    chunks = list(chat(fake_box, stream=True, **options))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert (deltas[0].type, deltas[0].id[:5], deltas[0].custom["name"]) == (
        "custom",
        "call_",
        "run",
    )
    assert "".join(one.custom["input"] for one in deltas) == call.custom.input
    assert {one.index for one in deltas} == {0}
    # In the history it is what the model has said.
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    arguments = json.dumps({"input": call.custom.input})
    function = {"name": "run", "arguments": arguments}
    counts = [
        chat(
            fake_box,
            model=FAKE,
            messages=[
                *user("hi"),
                {"role": "assistant", "content": None, "tool_calls": [one]},
                result,
            ],
            tools=options["tools"],
            max_tokens=1,
        ).usage.prompt_tokens
        for one in (call.to_dict(), {"id": call.id, "type": "function", "function": function})
    ]
    assert counts[0] == counts[1]
    made = respond(
        fake_box,
        model=FAKE,
        input="hi",
        tools=[{**RUN["custom"], "type": "custom",  # type: ignore[dict-item]
                "format": {"type": "grammar", "syntax": "regex", "definition": DIGITS}}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
    )  # fmt: skip
    assert [re.fullmatch(DIGITS, one.input) is not None for one in made.output] == [True]


@pytest.mark.parametrize("syntax", ["lark", "regex"])
def test_a_custom_tool_s_grammar_is_looked_at(fake_box: Box, syntax: str) -> None:
    """A regular expression is held to, a grammar is told."""
    rule = {"syntax": syntax, "definition": 'start: "a" "b"' if syntax == "lark" else "(a"}
    tool = {"type": "custom", "custom": {"name": "run", "format": {"type": "grammar",
            "grammar": rule}}}  # fmt: skip
    options: dict[str, Any] = {"model": FAKE, "tools": [tool], "tool_choice": "required"}
    if syntax == "lark":
        without = {"type": "custom", "custom": {"name": "run"}}
        told = chat(fake_box, **options).usage.prompt_tokens
        assert told > chat(fake_box, **{**options, "tools": [without]}).usage.prompt_tokens
    else:
        with pytest.raises(openai.UnprocessableEntityError, match="grammar of these tools"):
            chat(fake_box, **options)


# -- Anthropic -------------------------------------------------------------------------------------


def test_messages_count_and_stop(fake_box: Box) -> None:
    headers = {"x-api-key": fake_box.key, "anthropic-version": "2023-06-01"}
    body = {"model": FAKE, "system": "Be brief.", "messages": user("Hello"), "max_tokens": 90}
    answer = fake_box.http(
        "POST", "/v1/messages", json={**body, "stop_sequences": ["lazy"]}, key="", headers=headers
    ).json()
    assert answer["type"] == "message" and answer["stop_reason"] == "stop_sequence"
    assert answer["stop_sequence"] == "lazy"
    assert "lazy" not in answer["content"][0]["text"]
    counted = fake_box.http(
        "POST",
        "/v1/messages/count_tokens",
        json={name: body[name] for name in ("model", "system", "messages")},
        key="",
        headers=headers,
    ).json()
    usage = answer["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    check_receipt(fake_box, answer["request_id"])


def test_blocks_of_a_history_of_messages_reach_the_model(fake_box: Box) -> None:
    """The fake model's tokens are bytes, so each word that is added is counted."""
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "No."}

    def counted(use_too: Any = None, **more: Any) -> int:
        messages = [
            *user("Hi"),
            {"role": "assistant", "content": [{**use, **(use_too or {})}]},
            {"role": "user", "content": [{**result, **more}]},
        ]
        body = {"model": FAKE, "messages": messages}
        answer = fake_box.http("POST", "/v1/messages/count_tokens", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["input_tokens"])

    usual = counted()
    assert counted(is_error=True) == usual + len("Error: ")
    assert counted(is_error=True, content=None) == usual + len("Error") - len("No.")
    assert counted(content=[{"type": "text", "text": "No."}]) == usual
    empty: tuple[Any, ...] = ("", None, {})
    for none in empty:  # of a call without arguments
        assert counted({"input": none}) == usual + len("{}") - len('{"x": 1}')
    assert counted({"input": '{"x": 1}'}) == usual
    assert counted({"input": ["x"]}) == usual + len('["x"]') - len('{"x": 1}')


def test_an_error_of_messages_is_in_anthropic_s_envelope(fake_box: Box) -> None:
    for key, status in (("", 401), (fake_box.key, 422)):
        answer = fake_box.http("POST", "/v1/messages", json={"model": FAKE}, key=key)
        assert answer.status_code == status
        assert answer.json()["type"] == "error" and answer.json()["error"]["message"]
        kind = {401: "authentication_error", 422: "invalid_request_error"}[status]
        assert answer.json()["error"]["type"] == kind


# -- the document ----------------------------------------------------------------------------------


def test_the_openapi_document_has_every_route(fake_box: Box) -> None:
    from pinaivu_box.server.app import create_app

    document = fake_box.http("GET", "/openapi.json", key="").json()
    described = {(path, method.upper()) for path, ms in document["paths"].items() for method in ms}

    class Nothing:
        def __getattr__(self, _name: str) -> Any:
            return Nothing()

        def __iter__(self) -> Iterator[str]:
            return iter(())

    routes = {
        (route.path.replace(":path", ""), method)  # type: ignore[attr-defined]
        for route in create_app(Nothing()).routes  # type: ignore[arg-type]
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
        if route.path.startswith(("/v1", "/api"))  # type: ignore[attr-defined]
    }
    assert described == routes
    page = fake_box.http("GET", "/docs", key="").text
    assert "openapi.json" in page and "http://" not in page and "https://" not in page


def test_tokens_are_counted_before_they_are_paid(box: Box) -> None:
    body = {"model": MODEL, "messages": user("How many tokens have I?"), "tools": [WEATHER]}
    counted = box.http("POST", "/v1/chat/completions/input_tokens", json=body).json()
    answer = chat(box, messages=body["messages"], tools=[WEATHER], max_tokens=1)
    assert counted["input_tokens"] == answer.usage.prompt_tokens
