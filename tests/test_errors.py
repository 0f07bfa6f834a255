"""Every error that a client can meet: status, code, `detail` and the SDK's exception."""

from __future__ import annotations

import inspect
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pinaivu_box.store.keys import generate
from tests.support import gguf_files
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import MODEL, Box, StartBox, wait_until

CHAT = "/chat/completions"
USER = {"role": "user", "content": "Say hello."}
GOOD: dict[str, Any] = {"model": MODEL, "messages": [USER], "max_tokens": 1}
MISSING = "value_error.missing"
SERVED = {
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens",
    "max_completion_tokens", "stop", "seed", "user", "frequency_penalty", "presence_penalty",
    "logit_bias", "logprobs", "metadata", "n", "parallel_tool_calls", "prediction",
    "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier",
    "service_tier", "store", "tool_choice", "tools", "top_logprobs",
}  # fmt: skip


def failure(box: Box, path: str, body: Any, **headers: Any) -> openai.APIStatusError:
    """What the SDK raises for a POST; `headers` are set as they are, `openai.Omit()` removes."""
    options: Any = {"headers": {name.replace("_", "-"): value for name, value in headers.items()}}
    with pytest.raises(openai.APIStatusError) as caught:
        box.client.post(path, body=body, cast_to=object, options=options)
    return caught.value


def check_envelope(response: Any, status: int, code: str) -> dict[str, Any]:
    """The shape that every error has; returns the body."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"error", "detail"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert "request_id" not in response.text
    assert response.headers["x-request-id"].startswith("req_")
    if status == 422:
        (detail,) = body["detail"]
        assert set(detail) == {"loc", "msg", "type"}
        assert detail["msg"]
        assert detail["type"].startswith(("value_error", "type_error"))
    else:
        assert body["detail"] == error["message"]
    return body


# -- 401 and 403 ---------------------------------------------------------------------------------


def changed(key: str) -> str:
    """The key with one character mistyped."""
    return key[:20] + ("a" if key[20] != "a" else "b") + key[21:]


@pytest.mark.parametrize(
    ("authorization", "word"),
    [
        (lambda key: openai.Omit(), "The API key is missing"),
        (lambda key: "", "The API key is missing"),
        (lambda key: "Basic dXNlcjpwYXNz", "malformed"),
        (lambda key: key, "malformed"),
        (lambda key: "Bearer", "malformed"),
        (lambda key: f'Bearer "{key}"', "malformed"),
        (lambda key: f"Bearer {key[:-1]}", "malformed"),
        (lambda key: f"Bearer {key}x", "malformed"),
        (lambda key: f"Bearer {changed(key)}", "mistyped"),
        (lambda key: f"Bearer {key.swapcase()}", "malformed"),
        (lambda key: "Bearer sk-proj-" + key[7:], "malformed"),
        (lambda key: f"Bearer {generate()}", "unknown"),
    ],
    ids=[
        "missing", "empty", "other scheme", "no scheme", "no key", "quoted",
        "cut off", "too long", "mistyped", "other case", "another service's", "unknown",
    ],
)  # fmt: skip
def test_a_key_that_is_no_good_is_401_and_says_why(box: Box, authorization: Any, word: str) -> None:
    error = failure(box, CHAT, GOOD, Authorization=authorization(box.key))
    assert isinstance(error, openai.AuthenticationError)
    body = check_envelope(error.response, 401, "invalid_api_key")
    assert error.response.headers["www-authenticate"] == "Bearer"
    assert word in body["error"]["message"]
    assert box.key not in error.response.text


def test_bytes_that_are_no_text_in_the_key_are_401(box: Box) -> None:
    for secret in (b"sk-pnv-\xff\xfe", b"sk-pnv-" + b"\xe9" * 44):
        headers = {"Authorization": b"Bearer " + secret}
        check_envelope(
            box.http("GET", "/v1/models", key="", headers=headers), 401, "invalid_api_key"
        )


def test_a_revoked_key_is_401(box: Box) -> None:
    made = run_command_json("keys", "create", home=box.home)
    assert box.http("GET", "/v1/models", key=made["key"]).status_code == 200
    run_command("keys", "revoke", made["id"], home=box.home)
    response = box.http("GET", "/v1/models", key=made["key"])
    assert "revoked" in check_envelope(response, 401, "invalid_api_key")["error"]["message"]
    assert response.headers["www-authenticate"] == "Bearer"


def test_an_expired_key_is_401(box: Box) -> None:
    made = run_command_json("keys", "create", "--expires", "1ms", home=box.home)
    response = box.http("GET", "/v1/models", key=made["key"])
    assert "expired" in check_envelope(response, 401, "invalid_api_key")["error"]["message"]
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/models", "//v1/models", "/v1/v1/models", "/v1/nope", "/v1", "/%76%31/models"]
)
def test_no_way_of_writing_the_path_goes_around_the_key(box: Box, path: str) -> None:
    check_envelope(box.http("GET", path, key=""), 401, "invalid_api_key")


def test_the_scheme_may_be_written_in_any_case(box: Box) -> None:
    headers = {"Authorization": f"bearer {box.key}"}
    assert box.http("GET", "/v1/models", key="", headers=headers).status_code == 200


def test_admin_endpoints_are_403_for_other_keys(box: Box) -> None:
    plain = run_command_json("keys", "create", home=box.home)["key"]
    admin = run_command_json("keys", "create", "--admin", home=box.home)["key"]
    response = box.http("GET", "/v1/engines", key=plain)
    check_envelope(response, 403, "permission_denied")
    with pytest.raises(openai.PermissionDeniedError):
        box.client_with(plain).get("/engines", cast_to=object)
    assert box.http("GET", "/v1/engines", key=admin).status_code == 200


# -- 404 and 405 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2:136m", "llama3.2:3b", "llama-3.2-3b", "owner/name:x"])
def test_an_unknown_model_is_404_that_names_what_is_served(box: Box, model: str) -> None:
    for stream in (False, True):
        error = failure(box, CHAT, {**GOOD, "model": model, "stream": stream})
        assert isinstance(error, openai.NotFoundError)
        body = check_envelope(error.response, 404, "model_not_found")
        assert body["error"]["param"] == "model"
        assert model in body["error"]["message"]
        assert MODEL in body["error"]["message"]
    with pytest.raises(openai.NotFoundError) as caught:
        box.client.models.retrieve(model)
    check_envelope(caught.value.response, 404, "model_not_found")


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/chat", "/v2/models", "/v1/receipt"])
def test_an_unknown_path_is_404(box: Box, path: str) -> None:
    assert path in check_envelope(box.http("GET", path), 404, "not_found")["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/usage", "GET"),
    ],
)
def test_a_wrong_method_is_405_that_says_which_is_right(
    box: Box, method: str, path: str, allowed: str
) -> None:
    response = box.http(method, path)
    check_envelope(response, 405, "method_not_allowed")
    assert allowed in response.headers["allow"]  # RFC 9110, 15.5.6


# -- 422: fields ---------------------------------------------------------------------------------


def with_message(**message: Any) -> dict[str, Any]:
    return {"messages": [USER, message]}


def test_the_documented_example_of_a_missing_field(box: Box) -> None:
    error = failure(box, CHAT, {"messages": [USER]})
    assert isinstance(error, openai.UnprocessableEntityError)
    assert error.response.json()["detail"] == [
        {"loc": ["body", "model"], "msg": "field required", "type": "value_error.missing"}
    ]


@pytest.mark.parametrize(
    ("change", "loc", "kind"),
    [
        ({"model": ...}, ["model"], MISSING),
        ({"messages": ...}, ["messages"], MISSING),
        ({"messages": [{"content": "hi"}]}, ["messages", 0, "role"], MISSING),
        ({"messages": [{"role": "user"}]}, ["messages", 0, "content"], MISSING),
        (with_message(role="user"), ["messages", 1, "content"], MISSING),
        ({"model": 5}, ["model"], "type_error"),
        ({"model": None}, ["model"], "type_error"),
        ({"model": ""}, ["model"], "value_error"),
        ({"model": "not a model!"}, ["model"], "value_error"),
        ({"messages": []}, ["messages"], "value_error"),
        ({"messages": "hi"}, ["messages"], "type_error"),
        ({"messages": ["hi"]}, ["messages", 0], "type_error"),
        (with_message(role="robot", content="x"), ["messages", 1, "role"], None),
        (with_message(role=1, content="x"), ["messages", 1, "role"], None),
        (with_message(role="user", content=5), ["messages", 1, "content"], "type_error"),
        (with_message(role="user", content=None), ["messages", 1, "content"], "type_error"),
        (with_message(role="user", content=["x"]), ["messages", 1, "content", 0], "type_error"),
        (
            with_message(role="user", content=[{"type": "text"}]),
            ["messages", 1, "content", 0, "text"],
            MISSING,
        ),
        (
            with_message(role="user", content=[{"type": "input_audio", "input_audio": {}}]),
            ["messages", 1, "content", 0, "type"],
            None,
        ),
        (
            with_message(role="user", content="x", contents="y"),
            ["messages", 1, "contents"],
            "value_error.extra",
        ),
        ({"temperature": -0.1}, ["temperature"], "value_error"),
        ({"temperature": 3}, ["temperature"], "value_error"),
        ({"temperature": "hot"}, ["temperature"], "type_error"),
        ({"temperature": True}, ["temperature"], "type_error"),
        ({"top_p": 1.1}, ["top_p"], "value_error"),
        ({"top_p": -1}, ["top_p"], "value_error"),
        ({"max_tokens": 0}, ["max_tokens"], "value_error"),
        ({"max_tokens": -5}, ["max_tokens"], "value_error"),
        ({"max_tokens": 1.5}, ["max_tokens"], "type_error"),
        ({"max_tokens": "ten"}, ["max_tokens"], "type_error"),
        ({"max_completion_tokens": 0}, ["max_completion_tokens"], "value_error"),
        ({"stop": ["a"] * 65}, ["stop"], "value_error"),
        ({"stop": 5}, ["stop"], "type_error"),
        ({"stop": [5]}, ["stop", 0], "type_error"),
        ({"max_tokens": -2}, ["max_tokens"], "value_error"),
        ({"top_k": -2}, ["top_k"], "value_error"),
        ({"seed": 1.5}, ["seed"], "type_error"),
        ({"seed": 2**63}, ["seed"], None),
        ({"seed": 2**70}, ["seed"], None),
        ({"seed": "x"}, ["seed"], "type_error"),
        ({"stream": "yes"}, ["stream"], "type_error"),
        ({"stream_options": {"include_usage": True}}, ["stream_options"], None),
        (
            {"stream": True, "stream_options": {"include_usages": 1}},
            ["stream_options", "include_usages"],
            "value_error.extra",
        ),
        ({"user": 5}, ["user"], "type_error"),
        ({"temprature": 1}, ["temprature"], "value_error.extra"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:70] if isinstance(value, dict) else "",
)
def test_a_field_that_is_wrong_is_422_and_named(
    box: Box, change: dict[str, Any], loc: list[str | int], kind: str | None
) -> None:
    body = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    error = failure(box, CHAT, body)
    assert isinstance(error, openai.UnprocessableEntityError)
    answer = check_envelope(error.response, 422, "invalid_body")
    (detail,) = answer["detail"]
    assert detail["loc"] == ["body", *loc]
    assert detail["type"] == (kind or detail["type"])
    assert (detail["msg"] == "field required") == (kind == MISSING)
    assert answer["error"]["param"] == ".".join(map(str, loc))


def test_a_number_that_no_float_holds_is_refused(box: Box) -> None:
    for raw in (b"1" + b"0" * 400, b"1e999"):
        body = json.dumps(GOOD)[:-1].encode() + b', "temperature": ' + raw + b"}"
        response = box.http("POST", "/v1/chat/completions", content=body)
        assert response.status_code in (400, 422), response.text


# -- 422: parameters that are not served ---------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}}}
UNSERVED = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
}
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "metadata": {},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "verbosity": "medium",
}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"max_token": 1}, "max_token", "did you mean 'max_tokens'"),
        ({"maxTokens": 1}, "maxTokens", "did you mean 'max_tokens'"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"n": 0}, "n", "1"),
        ({"n": 129}, "n", "128"),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.custom.name", "required"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g'",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": SCHEMA}, "response_format", '"not"'),
        ({"grammar": "root ::= nonsense"}, "grammar", "grammar"),
        ({"grammar": "start: (", "seed": 1}, "grammar", "grammar"),
        ({"grammar": 'root ::= "a"', "tools": [TOOL]}, "grammar", "tools"),
        (
            {"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}},
            "grammar",
            "response_format",
        ),
        ({"reasoning_effort": "utmost"}, "reasoning_effort", "'utmost' is not a valid value"),
        ({"metadata": {"a": 1}}, "metadata", "str"),
        # Found by tests/fuzz/run: numbers that frames, proofs or SQLite do not carry.
        ({"top_k": 2**54}, "top_k", "<="),
        ({"top_k": 10**36}, "top_k", "64 bits"),
        (
            {
                "tools": [
                    TOOL,
                    {
                        "type": "function",
                        "function": {
                            "name": "g",
                            "parameters": {"type": "object", "maximum": 10**30},
                        },
                    },
                ]
            },
            "tools",
            "64 bits",
        ),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_an_impossible_request_is_422_that_names_the_field(
    box: Box, change: dict[str, Any], param: str, words: str
) -> None:
    error = failure(box, CHAT, {**GOOD, **change})
    assert isinstance(error, openai.UnprocessableEntityError)
    body = check_envelope(error.response, 422, "invalid_body")
    assert words in body["error"]["message"]
    assert (body["error"]["param"] or "").startswith(param.split(".")[0])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completions", {"prompt": [[1, -5]]}),
        ("/completions", {"prompt": [[10**40]]}),
        ("/completions", {"prompt": [2**40, 3]}),
        ("/embeddings", {"input": [2**50]}),
        ("/embeddings", {"input": ["x"], "dimensions": 2**40}),
        ("/messages", {"messages": [USER], "max_tokens": 1, "top_k": 2**60}),
        ("/responses", {"input": [{"role": "user", "content": "x", "mark": 10**40}]}),
    ],
)
def test_numbers_that_are_too_large_are_422_everywhere(
    box: Box, path: str, body: dict[str, Any]
) -> None:
    """Seeds of what tests/fuzz/run found."""
    answer = box.http("POST", f"/v1{path}", json={"model": GOOD["model"], **body})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "invalid_body"


def test_unknown_fields_are_ignored_and_reported(box: Box) -> None:
    """At any depth, in the answer and in a header; who asks to be strict is refused."""
    change = {
        "colour": "red",
        "verbosity": "low",
        "messages": [{**USER, "id": "m1", "cache_control": {"type": "ephemeral"}}],
        "response_format": {"type": "text", "mark": 1},
    }
    said = ["colour", "messages.cache_control", "messages.id", "response_format.mark", "verbosity"]
    url = "/v1/chat/completions"
    for headers in ({}, {"x-pinaivu-lenient": "1"}):
        answer = box.http("POST", url, json={**GOOD, **change}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert sorted(answer.json()["ignored_parameters"]) == said
        assert sorted(answer.headers["x-pinaivu-ignored"].split(", ")) == said
    plain = box.http("POST", url, json=GOOD)
    assert "ignored_parameters" not in plain.json() and "x-pinaivu-ignored" not in plain.headers
    wrong = box.http("POST", url, json={**GOOD, "temperature": 9})
    check_envelope(wrong, 422, "invalid_body")  # what is known has to be right
    strict = {"x-pinaivu-strict": "1"}
    assert box.http("POST", url, json=GOOD, headers=strict).status_code == 200
    for name in change:
        refused = box.http("POST", url, json={**GOOD, name: change[name]}, headers=strict)
        assert refused.status_code == 422 and name in refused.json()["error"]["param"]


def test_names_that_a_header_cannot_carry_are_escaped(box: Box) -> None:
    """In the header and in what is streamed: NUL, controls of ASCII, of Latin-1 and of Unicode,
    what separates names, and letters beyond Latin-1."""
    names = ["a\x00b,é\r\n", "\x7f\x85\x1b[0m", "\u2028\u202e", "日本🦊", '"\\;=%', " "]
    for stream in (False, True):
        for said in (names[:1], names):
            body = {**GOOD, **dict.fromkeys(said, 1), "stream": stream}
            answer = box.http("POST", "/v1/chat/completions", json=body)
            assert answer.status_code == 200
            header = answer.headers["x-pinaivu-ignored"]
            assert header.isascii() and header.isprintable()
            assert len(header.split(", ")) == len(header.split(",")) == len(said)
            assert answer.text.rstrip().endswith("[DONE]") == stream
            assert "a\\\\x00b" in answer.text


def test_a_key_can_be_strict(box: Box) -> None:
    key = run_command_json("keys", "create", "--strict", home=box.home)["key"]
    url, body = "/v1/chat/completions", {**GOOD, "colour": "red"}
    refused = box.http("POST", url, json=body, key=key)
    assert "colour" in check_envelope(refused, 422, "invalid_body")["error"]["message"]
    lenient = run_command_json("keys", "create", "--lenient", home=box.home)["key"]
    assert box.http("POST", url, json=body, key=lenient).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completions", {"prompt": "x", "max_tokens": 1}),
        ("/embeddings", {"input": "x"}),
        ("/responses", {"input": "x", "max_output_tokens": 1}),
        ("/messages", {"messages": [USER], "max_tokens": 1}),
        ("/messages/count_tokens", {"messages": [USER]}),
        ("/chat/completions/input_tokens", {"messages": [USER]}),
        ("/tokenize", {"text": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_it_is_said_everywhere(box: Box, path: str, body: dict[str, Any]) -> None:
    body = {"model": MODEL, "colour": "red", **body}
    answer = box.http("POST", f"/v1{path}", json=body)
    assert answer.status_code == 200 and answer.json()["ignored_parameters"] == ["colour"]
    assert answer.headers["x-pinaivu-ignored"] == "colour"
    refused = box.http("POST", f"/v1{path}", json=body, headers={"x-pinaivu-strict": "1"})
    assert "colour" in refused.json()["error"]["message"]
    near = {**body, "modle": 1}
    assert "did you mean 'model'" in box.http("POST", f"/v1{path}", json=near).text


@pytest.mark.parametrize(
    "change",
    [
        {"top_p": 0}, {"top_k": -1}, {"max_tokens": -1, "stop": ["."]}, {"max_tokens": None,
        "max_completion_tokens": 2.0}, {"n": 1.0, "max_tokens": 2.0, "seed": 5.0},
        {"stop": ["a", "b", "c", "d", "e", ""]}, {"stop": ""},
        {"messages": [USER, {"role": "assistant", "content": [
            {"type": "refusal", "refusal": "No."}]}, USER]},
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}, USER]},
        {"repetition_penalty": 1.1, "num_predict": 2, "max_tokens": ...},
        {"response_format": {"type": "json_object", "schema": {"enum": ["a"]}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["a"]}}}},
        {"think": False}, {"enable_thinking": False}, {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"enable_thinking": False, "budget": 3}},
        {"tools": [{"type": "web_search"}], "keep_alive": "5m", "num_ctx": 4096},
        {"messages": [USER, {"role": "assistant", "content": [], "tool_calls": []}, USER]},
        {"messages": [{"role": "tool", "content": None}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": ""}}]},
                      {"role": "tool"}]},
    ],
    ids=lambda change: json.dumps(change, default=str)[:60],
)  # fmt: skip
def test_values_mean_what_their_senders_mean(box: Box, change: dict[str, Any]) -> None:
    body = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


GUIDED: list[tuple[dict[str, Any], list[str]]] = [
    ({"guided_choice": ["yes", 'no/"not"']}, ["yes", 'no/"not"']),
    ({"guided_regex": "a/b|c\\/d"}, ["a/b", "c/d"]),
    ({"guided_grammar": 'root ::= "xyz"'}, ["xyz"]),
    ({"guided_json": {"enum": ["p", "q"]}}, ['"p"', '"q"']),
    ({"guided_json": '{"enum": ["p"]}'}, ['"p"']),
    ({"structured_outputs": {"choice": ["one"]}}, ["one"]),
]


@pytest.mark.parametrize(("change", "texts"), GUIDED, ids=lambda one: json.dumps(one)[:50])
def test_the_words_of_vllm_for_a_format_are_followed(
    box: Box, change: dict[str, Any], texts: list[str]
) -> None:
    chat = {**GOOD, "max_tokens": 40, **change}
    answer = box.http("POST", "/v1/chat/completions", json=chat).json()
    assert answer["choices"][0]["message"]["content"] in texts
    plain = {"model": MODEL, "prompt": "x", "max_tokens": 40, **change}
    assert box.http("POST", "/v1/completions", json=plain).json()["choices"][0]["text"] in texts


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[]",
        '{"const": "\\ud83d"}',
        '{"const": NaN}',
        '{"const": ' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=lambda one: one[:30],
)
def test_a_schema_as_text_that_cannot_be_followed(box: Box, schema: str) -> None:
    for path, body in (
        ("/v1/chat/completions", GOOD),
        ("/v1/completions", {"model": MODEL, "prompt": "x"}),
    ):
        answer = box.http("POST", path, json={**body, "guided_json": schema})
        check_envelope(answer, 422, "invalid_body")


def test_the_template_s_own_names_are_not_for_clients(box: Box) -> None:
    for name in (
        "messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token",
        "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now", "range", "dict",
        "lipsum", "cycler", "joiner", "namespace", "self", "loop",
    ):  # fmt: skip
        body = {**GOOD, "chat_template_kwargs": {name: "x"}}
        answer = box.http("POST", "/v1/chat/completions", json=body)
        assert f"'{name}'" in check_envelope(answer, 422, "invalid_body")["error"]["message"]


WRITTEN: list[tuple[dict[str, Any], dict[str, Any], Any]] = [
    ({"id": "call_1_0", "type": "function"}, {"tool_call_id": "call_1_0"}, '{"x": 1}'),
    ({}, {}, '{"x": 1}'),
    ({"id": None, "type": None}, {"tool_call_id": None}, {"x": 1}),
]


def test_calls_in_a_history_are_the_same_however_they_are_written(box: Box) -> None:
    """Without ids and types, and with arguments as objects, as Ollama's clients send them."""
    sizes = set()
    for call, result, arguments in WRITTEN:
        calls = [{**call, "function": {"name": "f", "arguments": arguments}}]
        messages = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "Done.", **result},
        ]
        answer = box.http("POST", "/v1/chat/completions", json={**GOOD, "messages": messages})
        assert answer.status_code == 200, answer.text
        sizes.add(answer.json()["usage"]["prompt_tokens"])
    assert len(sizes) == 1


@pytest.mark.parametrize("arguments", [None, {"x": 1}, ["x"], "", "cut {", "[" * 50], ids=repr)
def test_arguments_of_a_response_s_calls_may_be_anything(box: Box, arguments: Any) -> None:
    items = [
        USER,
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": None},
    ]
    body = {"model": MODEL, "input": items, "max_output_tokens": 16}
    answer = box.http("POST", "/v1/responses", json=body)
    assert answer.status_code == 200, answer.text


def test_spaces_after_bearer_are_no_part_of_the_key(box: Box) -> None:
    headers = {"Authorization": f"Bearer   {box.key}"}
    assert box.http("GET", "/v1/models", key="", headers=headers).status_code == 200


@pytest.mark.parametrize("name", UNSERVED)
def test_a_parameter_that_is_not_served_is_422_naming_it(box: Box, name: str) -> None:
    error = failure(box, CHAT, {**GOOD, name: UNSERVED[name]})
    assert isinstance(error, openai.UnprocessableEntityError)
    body = check_envelope(error.response, 422, "unsupported_parameter")
    assert body["detail"][0]["loc"] == ["body", name]
    assert name in body["error"]["message"]
    assert body["error"]["param"] == name


def test_nothing_that_the_sdk_can_send_is_ignored_in_silence(box: Box) -> None:
    """Every parameter of the SDK's own method is served, or refused by its name, or said."""
    signature = inspect.signature(openai.OpenAI(api_key="x").chat.completions.create)
    offered = {name for name in signature.parameters if not name.startswith("extra_")}
    offered -= {"timeout"}
    assert offered >= SERVED
    for name in sorted(offered - SERVED):
        body = {**GOOD, name: {"surprising": 1}}
        answer = box.http("POST", "/v1/chat/completions", json=body)
        if answer.status_code == 200:
            assert answer.json()["ignored_parameters"] == [name]
            continue
        error = failure(box, CHAT, body)
        assert error.status_code == 422, name
        assert error.response.json()["detail"][0]["loc"] == ["body", name]
        assert name in error.response.json()["error"]["message"]


def test_a_parameter_that_asks_for_nothing_passes(box: Box) -> None:
    response = box.http("POST", "/v1/chat/completions", json={**GOOD, **NEUTRAL})
    assert response.status_code == 200, response.text
    nulls = dict.fromkeys([*UNSERVED, *(SERVED - {"model", "messages", "max_tokens"})])
    response = box.http("POST", "/v1/chat/completions", json={**nulls, **GOOD})
    assert response.status_code == 200, response.text


# -- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b'{"model": ', 400, "invalid_json"),
        (b"{'model': 1}", 400, "invalid_json"),
        (b"model=x&messages=y", 400, "invalid_json"),
        (b'{"model": "x"} {}', 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"model": "\xff\xfe"}', 400, "invalid_json"),
        (b'{"model": "\\ud800"}', 400, "invalid_json"),
        (b"\x80", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"a":' * 100_000, 400, "invalid_json"),
        (b"[" * 100_000 + b"]" * 100_000, 400, "invalid_json"),
        (b"[]", 422, "invalid_body"),
        (b'"hello"', 422, "invalid_body"),
        (b"null", 422, "invalid_body"),
        (b"{}", 422, "invalid_body"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_a_body_that_is_no_request(box: Box, body: bytes, status: int, code: str) -> None:
    headers = {"content-type": "application/json"}
    response = box.http("POST", "/v1/chat/completions", content=body, headers=headers)
    answer = check_envelope(response, status, code)
    if status == 422:
        assert answer["detail"][0]["loc"][0] == "body"
    kind = openai.BadRequestError if status == 400 else openai.UnprocessableEntityError
    with pytest.raises(kind):
        box.client.post(CHAT, content=body, cast_to=object)


@pytest.fixture(scope="module")
def strict_box(module_box: StartBox) -> Box:
    """Bodies up to 2,000 bytes, one sequence, no queue; `slow:1` takes 50 ms a token."""
    config = "[server]\nmax_body_bytes = 2000\n[engine]\nmax_sequences = 1\nmax_queue = 0\n"
    return module_box("--model", "slow:1=fake:50", "--model", "fast:1=fake:0", config=config)


def padded(size: int) -> bytes:
    body = json.dumps({**GOOD, "model": "fast:1"}).encode()
    return body + b" " * (size - len(body))


def test_a_body_over_the_configured_size_is_413(strict_box: Box) -> None:
    for body in (padded(2001), padded(3_000_000), b"x" * 2001):
        response = strict_box.http("POST", "/v1/chat/completions", content=body)
        assert "2000" in check_envelope(response, 413, "request_too_large")["error"]["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        strict_box.client.post(CHAT, content=padded(2001), cast_to=object)
    assert caught.value.status_code == 413
    assert strict_box.http("POST", "/v1/chat/completions", content=padded(2000)).status_code == 200


def test_a_body_of_no_announced_size_is_counted_too(strict_box: Box) -> None:
    def parts(size: int) -> Iterator[bytes]:
        body = padded(size)
        for at in range(0, size, 100):
            yield body[at : at + 100]

    for size, status in ((2000, 200), (2001, 413), (50_000, 413)):
        response = strict_box.http("POST", "/v1/chat/completions", content=parts(size))
        assert response.status_code == status


# -- 503 -----------------------------------------------------------------------------------------


def check_unavailable(response: Any) -> str:
    body = check_envelope(response, 503, "no_nodes_available")
    assert int(response.headers["retry-after"]) >= 1
    message: str = body["error"]["message"]
    return message


def test_a_full_queue_is_503_with_retry_after_until_there_is_room(strict_box: Box) -> None:
    client = strict_box.client
    ask: Any = {"model": "slow:1", "messages": [USER]}
    with client.chat.completions.create(**ask, stream=True, max_tokens=4000) as running:
        next(iter(running))
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**ask, max_tokens=1, stream=stream)
            assert "queue" in check_unavailable(caught.value.response)
        # The queue of one model is not the queue of another.
        assert client.chat.completions.create(**{**ask, "model": "fast:1"}, max_tokens=1).choices
    body = {**ask, "max_tokens": 1}
    wait_until(
        lambda: strict_box.http("POST", "/v1/chat/completions", json=body).status_code == 200,
        "room after the stream was closed",
    )


def test_a_model_whose_engine_cannot_start_is_503_and_others_are_served(
    new_box: Any, tmp_path: Path
) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(gguf_files.valid())
    box = new_box("--model", f"half:1={half}", "--model", "fast:1=fake:0")
    for stream in (False, True):
        error = failure(box, CHAT, {**GOOD, "model": "half:1", "stream": stream})
        assert isinstance(error, openai.InternalServerError)
        assert "half:1" in check_unavailable(error.response)
    answer = box.http("POST", "/v1/chat/completions", json={**GOOD, "model": "fast:1"})
    assert answer.status_code == 200
    assert box.http("GET", "/readyz").status_code == 200


# -- addresses as people write them --------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "/v1/", "/v1/v1", "//v1", "/v1/v1/v1/", "//v1//"])
def test_the_base_url_works_in_every_way_that_it_is_pasted(box: Box, base: str) -> None:
    client = openai.OpenAI(base_url=box.url + base, api_key=box.key, max_retries=0)
    assert MODEL in [model.id for model in client.models.list().data]
    answer = client.chat.completions.create(**GOOD)
    assert answer.choices[0].finish_reason
    for path in (f"{base}/models/", f"{base}/chat/completions/"):
        assert box.http("GET", path).status_code in (200, 405)


# -- browsers ------------------------------------------------------------------------------------


def test_a_cors_preflight_needs_no_key(box: Box) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    for path in ("/v1/chat/completions", "/v1/v1/chat/completions"):
        response = box.http("OPTIONS", path, key="", headers=headers)
        assert response.status_code in (200, 204)
        assert response.headers["access-control-allow-origin"] in ("*", "https://app.example")
        assert "POST" in response.headers["access-control-allow-methods"]
        allowed = response.headers["access-control-allow-headers"].lower()
        for name in ("authorization", "content-type", "x-stainless-os"):
            assert name in allowed


def test_a_browser_may_read_answers_errors_and_their_headers(box: Box) -> None:
    origin = {"Origin": "https://app.example"}
    answers = [
        box.http("GET", "/v1/models", headers=origin),
        box.http("GET", "/v1/models", key="", headers=origin),
        box.http("POST", "/v1/chat/completions", json={}, headers=origin),
        box.http("GET", "/v1/nope", headers=origin),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 422, 404]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] in ("*", "https://app.example")
        exposed = answer.headers["access-control-expose-headers"].lower()
        for name in ("x-request-id", "retry-after", "openai-processing-ms"):
            assert name in exposed


# -- found by a hostile user ---------------------------------------------------------------------


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_more_than_64_bits_is_refused(box: Box, field: str) -> None:
    error = failure(box, CHAT, {"model": MODEL, "messages": [USER], field: 2**64})
    assert error.status_code == 422
    assert field in error.response.text


def test_the_token_of_the_commands_cannot_ask_the_model(box: Box) -> None:
    """It has no account that the receipt could go to."""
    token = json.loads((box.home / "run.json").read_text())["token"]
    response = box.http("POST", "/v1/chat/completions", key=token, json=GOOD)
    check_envelope(response, 403, "permission_denied")


def test_closed_connections_do_not_keep_their_sockets(new_box: Any) -> None:
    """With or without a request; else a thousand of them would stop the server."""
    started = new_box()
    port = int(started.url.rsplit(":", 1)[1])
    files = Path(f"/proc/{started.process.pid}/fd")
    before = len(list(files.iterdir()))
    for number in range(120):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            if number % 2:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
    wait_until(lambda: len(list(files.iterdir())) <= before + 10, "sockets to be closed")


def test_a_logit_bias_has_its_limit(box: Box) -> None:
    """As OpenAI's: it is in every proof."""
    biases = {str(token): 0.5 for token in range(301)}
    error = failure(box, CHAT, {**GOOD, "logit_bias": biases})
    assert error.status_code == 422 and "logit_bias" in error.response.text
    del biases["300"]
    assert box.chat(max_tokens=1, logit_bias=biases).status_code == 200


def request_text(box: Box, line: str, *headers: str, body: str = "") -> bytes:
    lines = [line, "Host: x", f"Authorization: Bearer {box.key}", *headers, "", body]
    return "\r\n".join(lines).encode()


def test_a_body_that_stops_coming_is_refused(new_box: Any) -> None:
    """And the box can be stopped meanwhile without a word of complaint."""
    box = new_box()
    port = int(box.url.rsplit(":", 1)[1])
    half = request_text(box, "POST /v1/chat/completions HTTP/1.1", "Content-Length: 99", body="{")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(half)
        assert client.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(half)
        assert box.stop() == 0
    assert "Traceback" not in box.errors


def test_a_target_may_be_a_whole_url(box: Box) -> None:
    port = int(box.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(request_text(box, f"GET {box.url}/v1/models HTTP/1.1", "Connection: close"))
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_an_error_does_not_repeat_a_long_path(box: Box) -> None:
    response = box.http("GET", f"/v1/{'x' * 50_000}")
    check_envelope(response, 404, "not_found")
    assert len(response.content) < 1000
