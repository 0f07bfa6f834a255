"""Models of other servers: what is asked of them, what comes of it, and what happens if they fail.

A real box is asked, and a server of this process answers it as vLLM does.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support import gguf_files
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import wait_until
from tests.support.spending import spent
from tests.support.upstream_box import UpstreamBox, events
from tests.support.vllm_server import CONTEXT, MODEL, Exchange, answer, vllm_server
from tests.support.waiting import DEADLINE

NOT_A_BOX = "upstream, not executed by a box"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpstreamBox]:
    made = UpstreamBox(tmp_path_factory.mktemp("upstream"))
    yield made
    made.end()


def code_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def stream(box: UpstreamBox, path: str, **body: Any) -> httpx.Response:
    return box.http("POST", path, json={"model": MODEL, "stream": True, **body})


HELLO = [{"role": "user", "content": "Why?"}]


# -- answers ---------------------------------------------------------------------------------------


def test_an_upstream_answers_and_its_own_usage_is_billed(box: UpstreamBox) -> None:
    with box.upstream(price="0.5") as server:
        done = box.chat().json()
        assert done["choices"][0]["message"]["content"] == "The sky is blue."
        assert (done["usage"]["prompt_tokens"], done["usage"]["completion_tokens"]) == (12, 6)
        assert server.last.body == {
            "model": MODEL, "messages": HELLO,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        receipt = box.receipt(done["request_id"]).json()
        assert Decimal(receipt["payment_amount"]) == Decimal("0.5") * 18 / 1000


def test_a_receipt_says_that_no_box_has_executed_it(box: UpstreamBox) -> None:
    with box.upstream():
        done = box.chat()
        request_id = done.json()["request_id"]
        document = box.receipt(request_id).content
        checks = verify_receipt(document, transcript=Transcript(answer=done.content))
        assert all(check.ok for check in checks), checks
        assert {"answer", "output commitment", "leg 0"} <= {check.name for check in checks}
        assert any(check.meaning.startswith(NOT_A_BOX) for check in checks)
        (leg,) = box.legs(request_id)
        assert (leg["kind"], leg["upstream_model"], leg["v"]) == (NOT_A_BOX, MODEL, 3)
        assert leg["tokens_counted_by"] == "upstream"
        assert json.loads(document)["opening"]["output"].keys() & {"tokens_sha256"} == set()


def test_a_stream_is_passed_on_as_it_comes(box: UpstreamBox) -> None:
    with box.upstream() as server:
        first, rest = threading.Event(), threading.Event()

        def script(exchange: Exchange) -> None:
            exchange.raw(b": ping\n\n")
            exchange.chunk(role="assistant", content="")
            exchange.chunk(content="One")
            first.set()
            rest.wait(DEADLINE)
            exchange.chunk(content=" two")
            exchange.chunk("length", content="")
            exchange.usage(3, 2, cached=2)
            exchange.done()

        server.script = script
        body = {
            "model": MODEL, "messages": HELLO, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {box.key}"}
        url = f"{box.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            for line in lines:
                if "One" in line:
                    break
            assert first.is_set() and not rest.is_set()
            rest.set()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[0]["choices"][0]["delta"] == {"content": " two"}
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        usage = chunks[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 2


def test_thoughts_and_calls_reach_every_api(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        exchange.chunk(role="assistant", content="")
        exchange.chunk(reasoning_content="Look")
        exchange.chunk(reasoning_content=" it up.")
        call = {"index": 0, "id": "chatcmpl-tool-1", "type": "function"}
        exchange.chunk(tool_calls=[{**call, "function": {"name": "weather", "arguments": ""}}])
        for part in ('{"city": ', '"Oslo"}'):
            exchange.chunk(tool_calls=[{"index": 0, "function": {"arguments": part}}])
        second = {"index": 1, "id": "x", "function": {"name": "weather", "arguments": "{}"}}
        exchange.chunk(tool_calls=[second])
        exchange.chunk("tool_calls", content="")
        exchange.usage(10, 20)
        exchange.done()

    with box.upstream() as server:
        server.script = script
        chat = box.chat(tools=[WEATHER], parallel_tool_calls=False).json()
        assert server.last.body["tools"] == [WEATHER]
        assert server.last.body["tool_choice"] == "auto"
        assert server.last.body["parallel_tool_calls"] is False
        choice = chat["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["reasoning_content"] == "Look it up."
        called = [call["function"] for call in choice["message"]["tool_calls"]]
        assert called == [
            {"name": "weather", "arguments": '{"city": "Oslo"}'},
            {"name": "weather", "arguments": "{}"},
        ]

        tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 50, "tools": [tool]}
        message = box.http("POST", "/v1/messages", json=body).json()
        kinds = [block["type"] for block in message["content"]]
        assert kinds == ["thinking", "tool_use", "tool_use"]
        assert message["content"][1]["input"] == {"city": "Oslo"}
        assert message["stop_reason"] == "tool_use"

        flat = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
        body = {"model": MODEL, "input": "Why?", "tools": [flat]}
        response = box.http("POST", "/v1/responses", json=body).json()
        calls = [item for item in response["output"] if item["type"] == "function_call"]
        assert calls[0]["arguments"] == '{"city": "Oslo"}' and len(calls) == 2

        body = {"model": MODEL, "messages": HELLO, "tools": [WEATHER], "stream": False}
        ollama = box.http("POST", "/api/chat", json=body).json()["message"]
        assert ollama["thinking"] == "Look it up."
        assert ollama["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}

        chunks = events(stream(box, "/v1/chat/completions", messages=HELLO, tools=[WEATHER]))
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        parts = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["index"] for call in parts] == [0, 0, 0, 1, 1]


def test_text_that_looks_like_a_call_stays_the_text_that_it_is(box: UpstreamBox) -> None:
    """What the upstream calls content is content: it has told calls apart itself."""
    text = '<think>no</think><tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    with box.upstream() as server:
        server.script = answer([text])
        message = box.chat(tools=[WEATHER]).json()["choices"][0]["message"]
        assert message["content"] == text and "tool_calls" not in message


def test_the_stop_string_that_ended_it_is_told(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        exchange.chunk(content="A")
        exchange.chunk("stop", content="", stop_reason="END")
        exchange.done()

    with box.upstream() as server:
        server.script = script
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 9, "stop_sequences": ["END"]}
        message = box.http("POST", "/v1/messages", json=body).json()
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
        assert server.last.body["stop"] == ["END"] and server.last.body["max_tokens"] == 9


def test_a_custom_tool_gets_its_text(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        for arguments in ('{"input": "ls', ' -l"}'):
            function = {"name": "shell" if "ls" in arguments else None, "arguments": arguments}
            exchange.chunk(tool_calls=[{"index": 0, "function": function}])
        exchange.chunk("tool_calls")
        exchange.done()

    with box.upstream() as server:
        server.script = script
        tool = {"type": "custom", "custom": {"name": "shell"}}
        (call,) = box.chat(tools=[tool]).json()["choices"][0]["message"]["tool_calls"]
        assert call["custom"] == {"name": "shell", "input": "ls -l"}
        assert server.last.body["tools"][0]["function"]["name"] == "shell"


def test_only_what_the_client_has_set_is_sent(box: UpstreamBox) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with box.upstream() as server:
        done = box.chat(
            temperature=0.5, top_p=0.9, top_k=7, seed=2**60, stop=["END"], n=2, max_tokens=9,
            repeat_penalty=1.1, logit_bias={"5": 1}, reasoning_effort="low",
            response_format={
                "type": "json_schema", "json_schema": {"name": "s", "schema": schema},
            },
        )  # fmt: skip
        assert done.status_code == 200, done.text
        assert [choice["index"] for choice in done.json()["choices"]] == [0, 1]
        sent = sorted((each.body for each in server.requests), key=lambda body: body["seed"])
        assert [body.pop("seed") for body in sent] == [2**60, 2**60 + 1]
        assert sent[0] == sent[1] == {
            "model": MODEL, "messages": HELLO, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
            "stop": ["END"], "max_tokens": 9, "repetition_penalty": 1.1, "repeat_penalty": 1.1,
            "logit_bias": {"5": 1.0}, "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"},
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "answer", "schema": schema},
            },
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        first, second = box.legs(done.json()["request_id"])
        assert (first["choice"], second["choice"]) == (0, 1)
        assert first["sampling"]["seed"] == str(2**60)
        usage = done.json()["usage"]  # the prompt is paid once
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 12)
        checks = verify_receipt(box.receipt(done.json()["request_id"]).content)
        assert all(check.ok for check in checks), checks


def test_a_server_that_takes_openai_fields_only_gets_no_others(box: UpstreamBox) -> None:
    with box.upstream(openai_only=True) as server:
        assert box.chat(reasoning_effort="low").status_code == 200
        assert server.last.body["reasoning_effort"] == "low"
        assert "chat_template_kwargs" not in server.last.body
        refused = box.chat(top_k=3)
        assert refused.status_code == 422 and code_of(refused) == "unsupported_parameter"
        assert len(server.requests) == 1


def test_completions_are_asked_for_as_such(box: UpstreamBox) -> None:
    with box.upstream() as server:
        body = {"model": MODEL, "prompt": "Once", "echo": True, "max_tokens": 4, "suffix": "."}
        done = box.http("POST", "/v1/completions", json=body).json()
        assert done["choices"][0]["text"] == "OnceThe sky is blue."
        assert server.last.path == "/v1/completions"
        assert (server.last.body["prompt"], server.last.body["suffix"]) == ("Once", ".")
        assert "echo" not in server.last.body
        body = {"model": MODEL, "prompt": [1, 2, 3], "stop": "x"}
        assert box.http("POST", "/v1/completions", json=body).status_code == 200
        assert server.last.body["prompt"] == [1, 2, 3] and server.last.body["max_tokens"] == 16


def test_log_probabilities_are_passed_on_and_committed_to(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        for word, number in (("No", -0.25), (" way", -1.5)):
            likely = [
                {"token": word, "logprob": number, "bytes": list(word.encode())},
                {"token": "é", "logprob": -3.0, "bytes": None},
            ]
            if exchange.is_chat:
                found: Any = {"content": [{**likely[0], "top_logprobs": likely}]}
            else:
                found = {
                    "tokens": [word], "token_logprobs": [number], "text_offset": [0],
                    "top_logprobs": [{each["token"]: each["logprob"] for each in likely}],
                }  # fmt: skip
            exchange.chunk(content=word, logprobs=found)
        exchange.chunk("stop")
        exchange.usage(1, 2)
        exchange.done()

    with box.upstream() as server:
        server.script = script
        chat = box.chat(logprobs=True, top_logprobs=2)
        assert server.last.body["top_logprobs"] == 2
        content = chat.json()["choices"][0]["logprobs"]["content"]
        assert [token["logprob"] for token in content] == [-0.25, -1.5]
        body = {"model": MODEL, "prompt": "Is it?", "logprobs": 2}
        completion = box.http("POST", "/v1/completions", json=body)
        shown = completion.json()["choices"][0]["logprobs"]
        assert shown["token_logprobs"] == [-0.25, -1.5] and shown["text_offset"] == [0, 2]
        for done in (chat, completion):
            document = box.receipt(done.json()["request_id"]).content
            checks = verify_receipt(document, transcript=Transcript(answer=done.content))
            assert all(check.ok for check in checks), checks
            assert "log-probabilities commitment" in {check.name for check in checks}


def test_embeddings_come_in_the_order_of_the_texts(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        data = [
            {"object": "embedding", "index": 1, "embedding": [0.0, 1.0]},
            {"object": "embedding", "index": 0, "embedding": [0.6, -0.8]},
        ]
        exchange.json({"object": "list", "data": data, "usage": {"prompt_tokens": 7}})

    with box.upstream() as server:
        server.script = script
        body = {"model": MODEL, "input": ["a", "b"], "dimensions": 2}
        done = box.http("POST", "/v1/embeddings", json=body)
        vectors = [each["embedding"] for each in done.json()["data"]]
        assert vectors == [list(struct.unpack("<2f", struct.pack("<2f", 0.6, -0.8))), [0.0, 1.0]]
        assert done.json()["usage"]["prompt_tokens"] == 7
        assert server.last.path == "/v1/embeddings"
        assert server.last.body == {"model": MODEL, "input": ["a", "b"], "dimensions": 2}
        document = box.receipt(done.json()["request_id"]).content
        checks = verify_receipt(document, transcript=Transcript(answer=done.content))
        assert all(check.ok for check in checks), checks
        server.script = lambda exchange: exchange.json({"data": []})
        assert box.http("POST", "/v1/embeddings", json=body).status_code == 503


def test_images_go_to_a_model_that_only_an_upstream_has(box: UpstreamBox) -> None:
    url = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8picture").decode()
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    with box.upstream() as server:
        messages = [{"role": "user", "content": parts}]
        body = {"model": MODEL, "messages": messages}
        done = box.http("POST", "/v1/chat/completions", json=body)
        assert done.status_code == 200, done.text
        assert server.last.body["messages"] == messages
        assert box.legs(done.json()["request_id"])[0]["kind"] == NOT_A_BOX


def test_a_server_that_does_not_stream_is_understood(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        message = {"role": "assistant", "content": "Whole."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 4, "completion_tokens": 2}
        exchange.json({"object": "chat.completion", "choices": [choice], "usage": usage})

    with box.upstream() as server:
        server.script = script
        done = box.chat().json()
        assert done["choices"][0]["message"]["content"] == "Whole."
        assert done["usage"]["completion_tokens"] == 2


def test_without_usage_tokens_are_estimated_and_the_receipt_says_so(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        for word in ("a", "b", "c"):
            exchange.chunk(content=word)
        exchange.chunk("stop")
        exchange.done()

    with box.upstream() as server:
        server.script = script
        done = box.chat().json()
        assert done["usage"]["completion_tokens"] == 3 and done["usage"]["prompt_tokens"] > 0
        (leg,) = box.legs(done["request_id"])
        assert leg["tokens_counted_by"] == "estimate"
        checks = verify_receipt(box.receipt(done["request_id"]).content)
        assert any("as it estimates" in check.meaning for check in checks)
        assert all(check.ok for check in checks)


def test_a_client_that_leaves_ends_the_stream_there(box: UpstreamBox) -> None:
    with box.upstream() as server:
        said = threading.Event()

        def script(exchange: Exchange) -> None:
            exchange.chunk(content="Some words")
            said.set()
            exchange.wait_until_left()

        server.script = script
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        headers = {"Authorization": f"Bearer {box.key}"}
        url = f"{box.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            request_id = response.headers["x-request-id"]
            next(line for line in response.iter_lines() if "words" in line)
        wait_until(server.last.left.is_set, "the upstream to see that its client has left")
        wait_until(lambda: box.receipt(request_id).status_code == 200, "the receipt")
        (leg,) = box.legs(request_id)
        assert (leg["finish_reason"], leg["tokens_counted_by"]) == ("cancelled", "estimate")
        assert leg["completion_tokens"] > 0


# -- failures --------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_request_is_told_to_its_client(box: UpstreamBox) -> None:
    with box.upstream() as server:
        server.script = lambda exchange: exchange.error(400, "logit_bias is out of vocabulary")
        refused = box.chat()
        assert refused.status_code == 400 and "out of vocabulary" in refused.text
        message = (
            f"This model's maximum context length is {CONTEXT} tokens. However, you requested 5000 "
            "tokens in the messages, Please reduce the length of the messages."
        )
        server.script = lambda exchange: exchange.error(400, message)
        refused = box.chat()
        assert refused.status_code == 400 and code_of(refused) == "context_length_exceeded"

        def llama_server(exchange: Exchange) -> None:
            said = "the request exceeds the available context size, try increasing it"
            kind = "exceed_context_size_error"
            error = {"code": 400, "message": said, "type": kind, "n_prompt_tokens": 9, "n_ctx": 8}
            exchange.json({"error": error}, 400)

        server.script = llama_server
        assert code_of(box.chat()) == "context_length_exceeded"
        server.script = answer()
        assert box.chat().status_code == 200  # none of that was the upstream's fault


def test_its_key_comes_from_a_file_and_is_seen_nowhere(box: UpstreamBox) -> None:
    secret = box.key_file.read_text().strip()
    with vllm_server() as server:
        server.key = secret
        box.use(server, key_file=str(box.key_file))
        assert box.chat().status_code == 200
        assert server.last.headers["Authorization"] == f"Bearer {secret}"
        server.script = lambda exchange: exchange.error(400, f"Bearer {secret} is odd")
        refused = box.chat()
        assert refused.status_code == 400 and "***" in refused.text
        shown = [refused.text, json.dumps(box.upstreams()), box.errors, box.output]
        server.key = "another"
        failed = box.chat()
        assert failed.status_code == 503 and "log of this box" in failed.text
        assert "answered 401: it refuses its key" in box.errors
        shown += [failed.text, box.errors, box.http("GET", "/metrics").text]
        assert not any(secret in text for text in shown)


def test_a_key_file_that_others_can_read_is_refused(box: UpstreamBox) -> None:
    box.key_file.chmod(0o640)
    try:
        with vllm_server() as server, pytest.raises(AssertionError):
            box.use(server, key_file=str(box.key_file))
        answered = box.http("POST", "/v1/admin/reload")
        assert answered.status_code == 422 and "chmod 600" in answered.text
    finally:
        box.key_file.chmod(0o600)


def test_an_upstream_without_room_is_left_alone_as_long_as_it_says(box: UpstreamBox) -> None:
    with box.upstream() as server:
        server.script = lambda exchange: exchange.error(
            429, "slow down", "RateLimitError", Retry_After="77"
        )
        refused = box.chat()
        assert refused.status_code == 503 and refused.headers["retry-after"] == "77"
        again = box.chat()
        assert again.status_code == 503 and "left alone" in again.text
        assert len(server.requests) == 1
        assert box.upstreams()[0]["state"] == "busy"


def failing(exchange: Exchange) -> None:
    exchange.error(502, "Bad Gateway", "BadGateway")


def cut_before_a_word(exchange: Exchange) -> None:
    exchange.chunk(role="assistant", content="")
    exchange.cut()


def no_json(exchange: Exchange) -> None:
    exchange.raw(b"data: {this is no JSON}\n\n")


def wrong_types(exchange: Exchange) -> None:
    exchange.data({"choices": [{"index": 0, "delta": {"content": 5}}]})


def endless_line(exchange: Exchange) -> None:
    exchange.raw(b"data: {")
    while not exchange.left.is_set():
        exchange.raw(b" " * 262_144)


def ended_without_a_word(exchange: Exchange) -> None:
    exchange.done()


def bad_in_the_middle(exchange: Exchange) -> None:
    """What comes after it, in the same packet, does not count."""
    good = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
    exchange.raw(f"data: {{}}{{\n\ndata: {json.dumps(good)}\n\ndata: [DONE]\n\n".encode())


def failed_in_its_stream(exchange: Exchange) -> None:
    exchange.data({"error": {"message": "EngineCore died", "type": "x", "code": 500}})
    exchange.done()


def redirect(exchange: Exchange) -> None:
    exchange.json({}, 307, Location="http://localhost:1/v1/chat/completions")


@pytest.mark.parametrize(
    "script",
    [
        failing, cut_before_a_word, no_json, wrong_types, endless_line, ended_without_a_word,
        failed_in_its_stream, bad_in_the_middle, redirect,
    ],
)  # fmt: skip
def test_before_the_first_word_another_upstream_takes_over(box: UpstreamBox, script: Any) -> None:
    with vllm_server() as bad, vllm_server() as good:
        bad.script = script
        names = box.use(bad, good)
        for _ in range(8):  # two that are as good are drawn from
            done = box.chat()
            assert done.status_code == 200, done.text
            assert box.legs(done.json()["request_id"])[0]["upstream"] == names[1]
            if bad.requests:
                break
        assert bad.requests
        # What it says in its stream may be the request's own fault: once is not enough.
        left_alone = f"upstream:{names[0]} is left alone" in box.errors
        assert left_alone == (script is not failed_in_its_stream)


def test_one_that_failed_is_not_asked_for_a_while(box: UpstreamBox) -> None:
    with box.upstream() as server:
        server.script = failing

        def is_left_alone() -> bool:
            """Each time it fails it is left alone for longer."""
            asked = len(server.requests)
            refused = box.chat()
            assert refused.status_code == 503
            alone = "left alone" in refused.text
            assert len(server.requests) == asked + (not alone)
            return alone

        wait_until(is_left_alone, "it to be left alone")
        server.script = answer()
        wait_until(lambda: box.chat().status_code == 200, "it to be tried again")
        assert box.upstreams()[0]["state"] == "ready"


def test_one_request_that_it_fails_on_is_not_every_requests_fault(box: UpstreamBox) -> None:
    with box.upstream() as server:
        server.script = lambda exchange: exchange.error(500, "a bug", "InternalServerError")
        for _ in range(2):
            assert box.chat().status_code == 503
        assert box.upstreams()[0]["state"] == "ready"
        server.script = answer()
        assert box.chat().status_code == 200
        server.script = lambda exchange: exchange.error(500, "a bug", "InternalServerError")
        name = box.upstreams()[0]["name"]
        for _ in range(3):
            assert f"upstream:{name} is left alone" not in box.errors
            assert box.chat().status_code == 503
        assert f"upstream:{name} is left alone" in box.errors


def test_what_it_does_not_have_is_no_failure(box: UpstreamBox) -> None:
    with box.upstream(models=[MODEL, "no-such-model"]) as server:
        assert box.chat(model="no-such-model").status_code == 503
        assert "no such model" in box.errors
        server.script = lambda exchange: exchange.json({"detail": "Not Found"}, 404)
        body = {"model": MODEL, "input": "a"}
        assert box.http("POST", "/v1/embeddings", json=body).status_code == 503
        assert box.upstreams()[0]["state"] == "ready"


def test_an_answer_that_was_cut_ends_honestly(box: UpstreamBox) -> None:
    def script(exchange: Exchange) -> None:
        exchange.chunk(content="Half of")
        exchange.cut()

    with vllm_server() as first, vllm_server() as second:
        first.script = second.script = script
        box.use(first, second)
        response = stream(box, "/v1/chat/completions", messages=HELLO)
        chunks = events(response)
        assert "Half of" in response.text and "[DONE]" not in response.text
        assert chunks[-1]["error"]["code"] == "no_nodes_available"
        assert len(first.requests) + len(second.requests) == 1
        request_id = response.headers["x-request-id"]
        (leg,) = box.legs(request_id)
        assert leg["completion_tokens"] > 0 and leg["tokens_counted_by"] == "estimate"
        signed = json.loads(box.receipt(request_id).json()["signed_receipt"])
        assert signed["finish_reason"] == "error"


def test_one_that_says_nothing_is_given_up(box: UpstreamBox) -> None:
    """Comments keep a connection open, and are no answer."""

    def script(exchange: Exchange) -> None:
        while not exchange.left.is_set():
            exchange.raw(b": ping\n\n")
            exchange.left.wait(0.05)

    with box.upstream(first_token_seconds=0.3) as server:
        server.script = script
        refused = box.chat()
        assert refused.status_code == 503 and "said nothing" in refused.text
        wait_until(server.last.left.is_set, "its stream to be closed")


def test_an_upstream_that_is_down_is_not_asked_and_comes_back(box: UpstreamBox) -> None:
    with vllm_server() as server:
        server.ill = True
        (name,) = box.use(server, models=[MODEL], health_seconds=0.1)
        wait_until(lambda: box.upstreams()[0]["state"] == "down", "it to be found down")
        refused = box.chat()
        assert refused.status_code == 503 and "cannot be used" in refused.text
        assert server.requests == []
        metrics = box.http("GET", "/metrics").text
        assert f'pinaivu_upstream_up{{upstream="{name}"}} 0.0' in metrics
        server.ill = False
        wait_until(lambda: box.upstreams()[0]["state"] == "ready", "it to be found well")
        assert box.chat().status_code == 200


def test_its_health_may_be_asked_beside_the_api(box: UpstreamBox) -> None:
    with box.upstream(health="health"):
        assert box.upstreams()[0]["state"] == "ready"


# -- which requests go there -----------------------------------------------------------------------


def test_models_are_listed_and_renamed(box: UpstreamBox) -> None:
    with box.upstream(models={"big:70b": MODEL}, prices={"big:70b": "2"}, price="9") as server:
        listed = {each["id"]: each for each in box.http("GET", "/v1/models").json()["data"]}
        assert listed["big:70b"]["owned_by"] == "upstream" and MODEL not in listed
        assert box.http("GET", "/v1/models/big:70b").status_code == 200
        done = box.chat(model="big:70b").json()
        assert done["model"] == "big:70b" and server.last.body["model"] == MODEL
        receipt = json.loads(box.receipt(done["request_id"]).json()["signed_receipt"])
        assert receipt["model"] == "big:70b" and receipt["price"]["completion"] == "2"
        box.use(server, aliases='[aliases]\n"gpt-4o-mini" = "big:70b"', models={"big:70b": MODEL})
        assert box.chat(model="gpt-4o-mini").json()["model"] == "big:70b"
    box.use()
    assert box.chat(model="big:70b").status_code == 404


def test_models_that_the_server_gains_are_found(box: UpstreamBox) -> None:
    with vllm_server() as server:
        server.models = ["qwen/a", "other"]
        box.use(server, models=["qwen/*"], health_seconds=0.1)
        assert list(box.upstreams()[0]["models"]) == ["qwen/a"]
        server.owners["qwen/of-its-own-upstream"] = "upstream"
        server.models += ["qwen/b", "qwen/of-its-own-upstream"]
        wait_until(lambda: len(box.upstreams()[0]["models"]) == 2, "it to be found")
        assert list(box.upstreams()[0]["models"]) == ["qwen/a", "qwen/b"]


def test_a_key_for_this_box_only_does_not_see_upstreams(box: UpstreamBox) -> None:
    with box.upstream() as server:
        for policy in ({"scopes": ["inference", "local-only"]}, {"routing": "never"}):
            key = box.new_key(**policy)["key"]
            assert box.chat(key=key).status_code == 404
            listed = box.http("GET", "/v1/models", key=key).json()["data"]
            assert MODEL not in [each["id"] for each in listed]
        key = box.new_key(peers=["somebody"])["key"]
        refused = box.chat(key=key)
        assert refused.status_code == 503 and "peers that the key allows" in refused.text
        assert server.requests == []
        key = box.new_key(peers=[box.upstreams()[0]["name"]])["key"]
        assert box.chat(key=key).status_code == 200


def test_a_model_that_is_here_too_is_served_here(box: UpstreamBox) -> None:
    with box.upstream(models={"both:1": MODEL}) as server:
        done = box.chat(model="both:1", max_tokens=4)
        assert done.status_code == 200 and server.requests == []
        leg = box.legs(done.json()["request_id"])[0]
        assert "kind" not in leg and leg["v"] == 4
        key = box.new_key(scopes=["inference", "local-only"])["key"]
        assert box.chat(model="both:1", max_tokens=4, key=key).status_code == 200
        key = box.new_key(routing="cheapest")["key"]  # its engine is warm; the price is the same
        assert box.chat(model="both:1", max_tokens=4, key=key).status_code == 200


def test_a_model_whose_engine_does_not_start_is_served_there(box: UpstreamBox) -> None:
    """The box serves this file, and llama.cpp misses much in it."""
    with vllm_server() as server:
        (box.home / "models").mkdir(exist_ok=True)
        (box.home / "models" / "broken.gguf").write_bytes(gguf_files.valid())
        box.use(server, models={"broken:latest": MODEL})
        done = box.chat(model="broken:latest").json()
        assert done["choices"][0]["message"]["content"] == "The sky is blue."
        signed = json.loads(box.receipt(done["request_id"]).json()["signed_receipt"])
        assert [each["node_id"] for each in signed["routing"]["candidates"]][1:]  # and the box
        assert box.legs(done["request_id"])[0]["kind"] == NOT_A_BOX
        key = box.new_key(scopes=["inference", "local-only"])["key"]
        assert box.chat(model="broken:latest", key=key).status_code == 503


def test_a_place_is_waited_for(box: UpstreamBox) -> None:
    with box.upstream(concurrency=1) as server:
        go, running, most = threading.Event(), [0], [0]

        def script(exchange: Exchange) -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            go.wait(DEADLINE)
            running[0] -= 1
            answer()(exchange)

        server.script = script
        done: list[int] = []
        threads = [
            threading.Thread(target=lambda: done.append(box.chat().status_code)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: box.upstreams()[0]["waiting"] == 2, "two to wait")
        go.set()
        for thread in threads:
            thread.join()
        assert done == [200, 200, 200] and most == [1]


# -- limits ----------------------------------------------------------------------------------------


def test_a_budget_reserves_what_may_be_said_and_counts_what_was(box: UpstreamBox) -> None:
    with box.upstream(price="1000") as server:  # 1 a token
        made = box.new_key(budget={"amount": "100"})
        refused = box.chat(key=made["key"], max_tokens=100)
        assert refused.status_code == 402 and server.requests == []
        assert box.chat(key=made["key"], max_tokens=50).status_code == 200
        assert set(spent(box.home, made["id"]).values()) == {Decimal(18)}
        assert box.chat(key=made["key"]).status_code == 200  # as much as is left
        assert 0 < server.last.body["max_tokens"] <= 82


def test_tokens_a_minute_are_counted_by_what_the_upstream_says(box: UpstreamBox) -> None:
    with box.upstream():
        made = box.new_key(tpm=200)
        done = box.chat(key=made["key"], max_tokens=20)
        assert done.status_code == 200
        after = box.http("GET", "/v1/models", key=made["key"]).headers
        left = (
            after.get("x-ratelimit-remaining-tokens")
            or box.chat(key=made["key"], max_tokens=1).headers["x-ratelimit-remaining-tokens"]
        )
        assert int(left) <= 200 - 18


def test_prompts_are_counted_by_estimate_and_have_no_token_ids(box: UpstreamBox) -> None:
    with box.upstream() as server:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 9}
        counted = box.http("POST", "/v1/messages/count_tokens", json=body)
        assert counted.json()["input_tokens"] > 0
        body = {"model": MODEL, "text": "Hello"}
        refused = box.http("POST", "/v1/tokenize", json=body)
        assert refused.status_code == 422 and "not known here" in refused.text
        assert server.requests == []


def test_a_grammar_needs_a_model_here(box: UpstreamBox) -> None:
    with box.upstream() as server:
        refused = box.chat(grammar='root ::= "a"')
        assert refused.status_code == 422 and server.requests == []


def test_the_command_lists_them(box: UpstreamBox) -> None:
    with box.upstream(models={"big:70b": MODEL}):
        (seen,) = run_command_json("upstreams", home=box.home)
        assert seen["state"] == "ready" and seen["models"] == {"big:70b": MODEL}
        assert "big:70b" in run_command("upstreams", home=box.home).stdout
        listed = {model["id"]: model for model in run_command_json("ls", home=box.home)}
        assert listed["big:70b"]["owner"] == "upstream" and listed["both:1"]["owner"] == "fake"
        assert "big:70b" in run_command("ls", home=box.home).stdout
