"""Large bodies: how the child decodes them, the memory that they take, and what is ignored."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
import rfc8785
from hypothesis import given
from starlette.requests import Request

from pinaivu_box.chat_format import overlap
from pinaivu_box.errors import (
    ApiError,
    BodyTooLarge,
    InvalidBody,
    InvalidJson,
    RateLimited,
    quoted,
)
from pinaivu_box.openai import large_bodies
from pinaivu_box.openai.anthropic import CountTokensRequest, MessagesRequest
from pinaivu_box.openai.completions import CompletionRequest, DetokenizeRequest, TokenizeRequest
from pinaivu_box.openai.decoding import MAX_NUMBERS, MAX_VALUES, SMALL_BODY_BYTES, decode
from pinaivu_box.openai.embeddings import EmbeddingRequest
from pinaivu_box.openai.response_input import as_messages
from pinaivu_box.openai.responses import ResponseRequest
from pinaivu_box.openai.types import ChatRequest, TextPart
from pinaivu_box.receipts.commitment import output_text, prompt_text
from pinaivu_box.server import bodies, paths, responses
from pinaivu_box.server.bodies import Bodies, BodyMemory
from pinaivu_box.server.endpoints import ENDPOINTS
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.store import responses as stored_responses
from tests.support.sandbox_jobs import pids_of

LONG = "word " * 20_000
USER = {"role": "user", "content": LONG}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": 1.5}}}
BODIES: list[tuple[type[msgspec.Struct], dict[str, Any]]] = [
    (ChatRequest, {"messages": [USER], "stop": ["a"], "logit_bias": {"1": 1}, "tools": [TOOL]}),
    (
        ChatRequest,
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": LONG}]},
                {"role": "assistant", "tool_calls": [CALL, {**CALL, "index": 1}]},
                {"role": "tool", "tool_call_id": "c", "content": "x"},
            ],
            "seed": -(2**63),
            "response_format": {"type": "json_object"},
            "pinaivu": {"priority": 3, "timeout": 1.5},
            "functions": [],
        },
    ),
    (CompletionRequest, {"prompt": [[1, 2, 3] * 20_000, [4]], "echo": True}),
    (EmbeddingRequest, {"input": [LONG, "b"], "dimensions": 3}),
    (ResponseRequest, {"input": [{"role": "user", "content": LONG}], "text": {"verbosity": None}}),
    (MessagesRequest, {"messages": [USER], "max_tokens": 3, "thinking": {"type": "adaptive"}}),
    (CountTokensRequest, {"messages": [USER], "system": [{"type": "text", "text": "x"}]}),
    (TokenizeRequest, {"text": LONG}),
    (DetokenizeRequest, {"tokens": [300_000] * 20_000}),
]


def outcome(function: Any, *given: Any, **more: Any) -> Any:
    """What it returns, or all that its error says."""
    try:
        return function(*given, **more)
    except ApiError as error:
        return type(error), error.message, error.param, getattr(error, "loc", None)


def elsewhere(data: bytes, kind: type[msgspec.Struct], *, strict: bool = False) -> Any:
    """As the child does it, without a child."""
    answer = large_bodies.make(b"")(large_bodies.job(data, kind, strict=strict))
    return large_bodies.result(answer, kind)


@pytest.mark.parametrize("change", [{}, {"modle": LONG}, {"model": 3}, {"model": LONG * 2}])
@pytest.mark.parametrize(("kind", "body"), BODIES)
@pytest.mark.parametrize("strict", [False, True])
def test_a_child_makes_the_same_of_it(
    kind: type[msgspec.Struct], body: dict[str, Any], change: dict[str, Any], strict: bool
) -> None:
    data = json.dumps({"model": "a", **body, **change}).encode()
    assert len(data) > SMALL_BODY_BYTES
    here = outcome(decode, data, kind, strict=strict)
    assert outcome(elsewhere, data, kind, strict=strict) == here
    assert isinstance(here[0], kind) == (change.get("model") != 3 and "modle" not in change)


def test_the_number_of_values_is_bounded() -> None:
    def texts(count: int) -> bytes:
        return msgspec.json.encode({"model": "a", "input": ["ab"] * count})

    def numbers(count: int) -> bytes:
        return msgspec.json.encode({"model": "a", "input": [[7] * count]})

    decode(texts(MAX_VALUES - 3), EmbeddingRequest)  # the body, the model and the list are three
    decode(numbers(MAX_NUMBERS), EmbeddingRequest)
    for data in (texts(MAX_VALUES - 2), numbers(MAX_NUMBERS + 1)):
        with pytest.raises(BodyTooLarge):
            decode(data, EmbeddingRequest)


@pytest.mark.parametrize("small", [True, False])
def test_the_number_of_levels_is_bounded(small: bool) -> None:
    def nested(levels: int) -> bytes:
        inner = b"[" * levels + b"]" * levels
        text = b"x" if small else LONG.encode()
        return (
            b'{"model":"a","messages":[{"role":"user","content":"' + text + b'"}],"tools":[{'
            b'"type":"function","function":{"name":"f","parameters":{"x":' + inner + b"}}}]}"
        )

    outside = 5  # body, tools, tool, function, parameters
    decode(nested(200 - outside), ChatRequest)
    for levels in (201 - outside, 900):
        with pytest.raises(InvalidJson, match="nested"):
            decode(nested(levels), ChatRequest)


def test_names_are_cut_before_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:

    compared: list[str] = []

    def compare(name: str, *_: Any) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr("pinaivu_box.openai.fields.difflib.get_close_matches", compare)
    with pytest.raises(InvalidBody) as caught:
        decode(json.dumps({"x\n" * 500_000: 1}).encode(), ChatRequest)
    assert [len(name) for name in compared] == [100]
    said = [caught.value.message, str(caught.value.param), *map(str, caught.value.loc)]
    assert all(len(one) < 300 and one.isprintable() for one in said)


def test_paths_are_cut_before_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty kilobytes would take seconds of the event loop, and need no key."""
    longest: list[int] = []

    def alike(path: str, template: str) -> float:
        longest.append(len(path))
        return 0.0

    monkeypatch.setattr(paths, "_ratio", alike)
    paths.suggestion("POST", "/" + "a" * 60_000, ENDPOINTS)
    assert longest and max(longest) <= 100


def test_names_of_ignored_fields_are_few_and_short() -> None:
    many = {f"field {n}": 1 for n in range(3000)}
    data = json.dumps({"model": "a", "text": "b", "x" * 50_000: 1, **many}).encode()
    _, ignored = decode(data, TokenizeRequest)
    assert len(ignored) == 65 and max(map(len, ignored)) == 101
    assert ignored[-1] == "… and 2937 more"


def test_a_part_of_the_only_type_may_leave_its_type_out() -> None:
    """Its unknown fields are ignored all the same."""
    part = {"text": "hi", "colour": 1}
    body = {"model": "a", "messages": [{"role": "system", "content": [part]}]}
    chat, ignored = decode(json.dumps(body).encode(), ChatRequest)
    assert ignored == ["messages.content.colour"]
    assert chat.messages[0].content == [TextPart("hi")]


@given(st.text(), st.integers(1, 200))
def test_a_quoted_text_is_short_and_printable(text: str, most: int) -> None:
    shown = quoted(text * 50, most)
    assert shown.isprintable()
    assert text.isprintable() <= (len(shown) <= most + 1)


@given(st.text("ab", max_size=12), st.text("ab", max_size=6))
def test_the_longest_end_that_begins_a_mark(text: str, mark: str) -> None:
    ends = [n for n in range(1, len(mark)) if text.endswith(mark[:n])]
    assert overlap(text, mark) == max(ends, default=0)


LETTERS = st.text(max_size=20) | st.sampled_from(["\x00\x1f\x7f\u2028", '"\\/', "é😀\uffff"])


@given(st.lists(st.fixed_dictionaries({"role": LETTERS, "content": LETTERS})), st.lists(LETTERS))
def test_commitments_are_over_canonical_json(
    messages: list[dict[str, Any]], stop: list[str]
) -> None:
    """RFC 8785, by another implementation of it."""
    more: dict[str, Any] = {"tools": "[]", "input": ["a", [1, 2**53 - 1]]}
    canonical = rfc8785.dumps({"messages": messages, "stop": stop, **more}).decode()
    assert prompt_text(messages, stop, **more) == canonical
    assert output_text(["", *stop, ""]) == rfc8785.dumps(["", *stop, ""]).decode()


# -- where it is decoded ---------------------------------------------------------------------------


def request_of(data: bytes, *, announced: bool = True, parts: int = 3) -> Request:
    size = -(-len(data) // parts)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    sent = [
        {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}
        for piece in pieces
    ]

    async def receive() -> Any:
        return sent.pop(0)

    headers = [(b"content-length", str(len(data)).encode())] if announced else []
    return Request({"type": "http", "headers": headers, "state": {}}, receive)


@pytest.mark.parametrize("announced", [True, False])
def test_only_small_bodies_are_decoded_by_the_loop(
    monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    """Nothing else of a large one than what the child has made of it."""
    threads: list[int] = []

    def decoded(data: bytes, *given: Any, **more: Any) -> Any:
        assert len(data) <= SMALL_BODY_BYTES
        threads.append(threading.get_ident())
        return decode(data, *given, **more)

    monkeypatch.setattr(bodies, "decode", decoded)

    async def receive(text: str) -> TokenizeRequest:
        data = json.dumps({"model": "a", "text": text}).encode()
        request = request_of(data, announced=announced)
        body, _ = await both.receive(request, "acct", TokenizeRequest, 2**20, strict=False)
        assert ("release_body" in request.scope["state"]) == (len(data) > SMALL_BODY_BYTES)
        bodies.release_body(request)
        return body

    async def run() -> None:
        assert (await receive("short")).text == "short"
        assert threads == [threading.get_ident()] and not pids_of(both._pool)
        assert (await receive(LONG)).text == LONG
        assert len(threads) == 1 and len(pids_of(both._pool)) == 1

    both = Bodies()
    try:
        asyncio.run(run())
    finally:
        both.close()


def test_a_length_beside_chunks_says_nothing_of_the_room() -> None:
    """The server passes both on: a client that says 3 bytes and sends megabytes takes as much room
    as one that says nothing."""
    request = request_of(b" " * (SMALL_BODY_BYTES + 1), announced=True)
    request.scope["headers"] = [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")]

    async def run() -> None:
        both, taken = Bodies(), []
        reserve = both._memory.reserve

        async def seen(account: str, size: int, most: int) -> Any:
            taken.append(size)
            return await reserve(account, size, most)

        both._memory.reserve = seen  # type: ignore[method-assign, assignment]
        try:
            with pytest.raises(InvalidJson):
                await both.receive(request, "acct", TokenizeRequest, 2**20, strict=False)
        finally:
            both.close()
        assert taken == [2**20]

    asyncio.run(run())


def test_a_long_conversation_is_not_read_before_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The body that asks for it is small, and there may be a thousand of them."""
    read: list[str] = []

    async def size(*_: Any) -> int:
        return 2**20

    async def conversation(_database: Any, previous: str, *_: Any) -> list[tuple[bytes, bytes]]:
        read.append(previous)
        return [(b"[]", b'{"output":[]}')]

    monkeypatch.setattr(stored_responses, "conversation_size", size)
    monkeypatch.setattr(stored_responses, "conversation", conversation)

    async def run() -> None:
        both = Bodies()
        config = SimpleNamespace(server=SimpleNamespace(max_body_bytes=2**20))
        box = SimpleNamespace(config=config, database=None)
        requests, tasks = [], []
        for number in range(6):
            request = request_of(b"{}", announced=True)
            call = InferenceCall.__new__(InferenceCall)
            call.box, call.bodies, call.request = box, both, request  # type: ignore[assignment]
            call.key = SimpleNamespace(account_id="acct")  # type: ignore[assignment]
            body = ResponseRequest(model="a", input="x", previous_response_id=str(number))
            requests.append(request)
            tasks.append(asyncio.create_task(responses._history(call, body)))
        await asyncio.gather(*tasks[:4])
        await asyncio.sleep(0)
        assert read == ["0", "1", "2", "3"]
        bodies.release_body(requests[0])
        await tasks[4]
        assert read == ["0", "1", "2", "3", "4"]
        bodies.release_body(requests[1])
        await tasks[5]
        both.close()

    asyncio.run(run())


def test_a_long_conversation_is_decoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(text: str) -> tuple[bytes, bytes]:
        given = [{"type": "message", "role": "user", "content": text}]
        return msgspec.json.encode(given), msgspec.json.encode({"output": [{"said": text}]})

    async def run() -> None:
        short = await both.history("acct", [stored("a"), stored("b")])
        assert [one.get("said") for one in short] == [None, "a", None, "b"] and not pids_of(
            both._pool
        )
        monkeypatch.setattr(large_bodies, "history", None)
        long = await both.history("acct", [stored(LONG), stored("b")])
        assert long[0]["content"] == long[1]["said"] == LONG and len(long) == 4
        many = msgspec.json.encode([{}] * 40_000)
        with pytest.raises(BodyTooLarge, match="conversation"):
            await both.history("acct", [(many, b'{"output":[]}')] * 2)

    both = Bodies()
    try:
        asyncio.run(run())
    finally:
        both.close()


@pytest.mark.parametrize("kind", [["message"], {}, 3, None, "x" * 1000])
def test_an_item_of_an_invalid_type_is_refused_briefly(kind: Any) -> None:
    with pytest.raises(InvalidBody) as caught:
        as_messages([{"type": kind}])
    assert len(caught.value.message) < 250


# -- memory ----------------------------------------------------------------------------------------


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_an_account_over_its_share_waits_and_no_other() -> None:
    async def run() -> None:
        memory = BodyMemory()
        held = [await memory.reserve("a", 10, 10) for _ in range(4)]
        more = [asyncio.create_task(memory.reserve("a", size, 10)) for size in (10, 1)]
        await settled()
        assert not any(one.done() for one in more)
        (await memory.reserve("b", 10, 10))()
        held[0]()
        held[0]()  # once is enough
        await settled()
        assert more[0].done() and not more[1].done()  # in its order
        more[1].cancel()
        await settled()
        held[1]()
        (await memory.reserve("a", 10, 10))()

    asyncio.run(run())


def test_all_together_are_bounded_and_so_is_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_MAX_WAITING_PER_ACCOUNT", 3)

    async def run() -> None:
        memory = BodyMemory()
        held = [await memory.reserve(f"{n // 4}", 10, 10) for n in range(16)]
        waiting = [asyncio.create_task(memory.reserve("new", 10, 10)) for _ in range(3)]
        await settled()
        assert not any(one.done() for one in waiting)
        with pytest.raises(RateLimited):
            await memory.reserve("new", 10, 10)
        for one in held[:3]:
            one()
        await settled()
        assert all(one.done() for one in waiting)

    asyncio.run(run())
