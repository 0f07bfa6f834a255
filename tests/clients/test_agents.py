"""What real programs send is taken, and what their SDKs read of the answers.

`recorded/` holds the requests of a session each (see `recording`), of coding agents in which their
tools were called.  The model follows the same `script` as when `tests/clients/run` recorded them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import recording, script
from tests.clients.page import MODEL
from tests.clients.programs import PROGRAMS
from tests.support.process_box import Box

FAKE = "fake:1"
SCRIPTED = "scripted:1"
RECORDED = Path(__file__).with_name("recorded")
# Some of what means nothing here.
IGNORED = {
    "claude-code": {"context_management", "output_config", "thinking.display"},
    "codex": {"client_metadata"},
}
USER = {"role": "user", "content": "Hello"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "a"}}
LOOK = {
    "name": "look",
    "input_schema": {
        "type": "object",
        "properties": {"at": {"enum": ["here"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
# What a model calls a function with, by what it is asked.
WRITTEN = {
    "many levels": '{"a": ' + "[" * 2000 + "]" * 2000 + "}",
    "a large number": '{"a": 1' + "0" * 30 + "}",
    "too large a number": '{"a": 1' + "0" * 5000 + "}",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    home = tmp_path_factory.mktemp("agents") / "home"
    config = home.with_name("box.toml")
    config.write_text("[engine]\ncontext = 200000\n")
    scripted = script.write(home.with_name("script.json"), "/project")
    odd = home.with_name("odd.json")
    calls = {asked: f'{{"name": "f", "arguments": {text}}}' for asked, text in WRITTEN.items()}
    lines = [
        {"when": [asked], "say": f"<tool_call>\n{call}\n</tool_call>"}
        for asked, call in calls.items()
    ]
    odd.write_text(json.dumps(lines))
    models = (
        "--model", f"{FAKE}=fake:0", "--model", f"{MODEL}=fake:{scripted}",
        "--model", f"{SCRIPTED}=fake:{odd}",
    )  # fmt: skip
    started = Box(home, "--config", str(config), *models).start()
    yield started
    started.end()


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def ask(here: Box, path: str, body: dict[str, Any], status: int = 200, **more: Any) -> Any:
    answer = here.http("POST", path, json={"model": FAKE, **body}, **more)
    assert answer.status_code == status, answer.text[:2000]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    return answer


def messages(here: Box, *said: Any, status: int = 200, **more: Any) -> Any:
    body = {"max_tokens": 4, "messages": list(said), **more}
    return ask(here, "/v1/messages", body, status).json()


def counted(here: Box, *said: Any, **more: Any) -> int:
    body = {"messages": list(said), **more}
    return int(ask(here, "/v1/messages/count_tokens", body).json()["input_tokens"])


def check_stream(path: str, text: str) -> None:
    """It has the beginning and the end that the SDKs wait for."""
    events = [json.loads(one[6:]) for one in text.split("\n") if one.startswith("data: {")]
    if "/chat/completions" in path:
        assert text.rstrip().endswith("data: [DONE]")
        assert [one["choices"][0]["finish_reason"] for one in events if one["choices"]][-1]
        return
    first, last = {
        "/v1/messages": ("message_start", "message_stop"),
        "/v1/responses": ("response.created", "response.completed"),
    }[path.partition("?")[0]]
    assert (events[0]["type"], events[-1]["type"]) == (first, last)
    inner = events[0].get("message") or events[0]["response"]
    assert not inner.get("content") and not inner.get("output")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_session_is_taken_again(here: Box, name: str) -> None:
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    assert recorded["version"] == PROGRAMS[name].version
    ids: list[list[str]] = []
    for one in recording.expanded(recorded):
        sent = recording.with_ids(json.dumps(one), ids)
        one = json.loads(sent)
        answer = here.http(
            one["method"], one["path"], headers=one["headers"],
            content=None if one["body"] is None else json.dumps(one["body"]),
        )  # fmt: skip
        assert answer.status_code // 100 == 2, f"{one['path']}: {answer.text[:2000]}"
        assert IGNORED.get(name, set()) <= set(
            answer.headers.get("x-pinaivu-ignored", "").split(", ")
        )
        ids.append(recording.ids_in(answer.text))
        if one["body"] and one["body"].get("stream"):
            check_stream(one["path"], answer.text)
        assert recording.called(answer.text) == one.get("calls", [])


def test_requests_of_open_webui_are_accepted(here: Box) -> None:
    """From its source, since it takes gigabytes: a chat with the parameters of a model's settings,
    also those that have Ollama's names, a title, and vectors for a document."""
    who = {f"X-OpenWebUI-{name}": "x" for name in ("User-Name", "User-Id", "User-Role", "Chat-Id")}
    assert here.http("GET", "/v1/models", headers=who).status_code == 200
    part = {
        "type": "text",
        "text": "How many days will it rain?",
        "cache_control": {"type": "ephemeral"},
    }
    settings = {
        "temperature": 0.8, "top_p": 0.9, "min_p": 0.0, "top_k": 40, "repeat_penalty": 1.1,
        "seed": 1, "frequency_penalty": 0.0, "presence_penalty": 0.0, "stop": ["</done>"],
        "max_tokens": 4, "num_ctx": 2048, "num_keep": 24, "num_gpu": 1, "num_thread": 2,
        "num_batch": 512, "mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0,
        "repeat_last_n": 64, "tfs_z": 1.0, "use_mmap": True, "use_mlock": False, "think": False,
        "keep_alive": "5m", "logit_bias": {},
    }  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [part]}]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"messages": messages, **settings, **more}
    check_stream("/v1/chat/completions", ask(here, "/v1/chat/completions", body, headers=who).text)
    title = {"messages": [USER], "stream": False, "max_completion_tokens": 1000}
    ask(here, "/v1/chat/completions", {**title, "model": MODEL}, headers=who)
    ask(here, "/v1/embeddings", {"input": ["one", "two"]}, headers=who)


# -- Anthropic's shape ---------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [False, True])
def test_a_stream_s_message_is_made_of_its_events_once(here: Box, tools: bool) -> None:
    """As the SDK's `get_final_message` adds them up."""
    body: dict[str, Any] = {"messages": [USER], "max_tokens": 60, "stream": True}
    if tools:
        body |= {"tools": [LOOK], "tool_choice": {"type": "any"}}
    events = events_of(ask(here, "/v1/messages", body).text)
    message = events[0]["message"]
    assert message["content"] == [] and message["usage"]["output_tokens"] == 0
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            assert not event["content_block"].get("text") and not event["content_block"].get(
                "input"
            )
            texts.append("")
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            texts[event["index"]] += delta.get("text", "") + delta.get("partial_json", "")
    assert message["content"] and all(texts)
    if tools:
        assert all(block["type"] == "tool_use" for block in message["content"])
        assert all(json.loads(text) == {"at": "here"} for text in texts)
    else:
        assert [block["type"] for block in message["content"]] == ["text"]
    usage = next(one for one in events if one["type"] == "message_delta")["usage"]
    whole = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert (
        message["usage"]["input_tokens"]
        == whole
        == counted(here, USER, **({"tools": [LOOK]} if tools else {}))
    )


def test_a_tool_s_error_reaches_the_model(here: Box) -> None:
    def result(**more: Any) -> list[Any]:
        block = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no", **more}
        return [
            USER,
            {"role": "assistant", "content": [CALL]},
            {"role": "user", "content": [block]},
        ]

    good, bad = counted(here, *result()), counted(here, *result(is_error=True))
    assert bad == good + len("Error: ")
    assert counted(here, *result(is_error=False)) == good
    shapes: list[Any] = [
        None, "", [], "text", [{"type": "text", "text": "a"}],
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}],
        [{"type": "search_result", "source": "s", "title": "t",
          "content": [{"type": "text", "text": "a"}], "citations": {"enabled": True}}],
        [{"type": "tool_reference", "tool_name": "look"}],
    ]  # fmt: skip
    for shape in shapes:
        messages(here, *result(content=shape))
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
    messages(here, *result(content=[image]), status=422)  # it would be lost


def test_system_messages_among_the_others(here: Box) -> None:
    """Before the first answer they are as the system prompt, later they are in a user's words."""
    late = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    answer = {"role": "assistant", "content": "Hi."}
    assert counted(here, USER, late) == counted(here, USER, system="Be brief.")
    both = counted(here, USER, late, system="Be kind.")
    assert both == counted(here, USER, system="Be kind.\n\nBe brief.")
    assert counted(here, USER, answer, USER, late) > counted(here, USER, answer, USER)
    messages(here, USER, answer, late)


BILLING = "x-anthropic-billing-header"


@pytest.mark.parametrize("api", ["messages", "chat/completions", "responses"])
@pytest.mark.parametrize("blocks", [False, True])
def test_claude_code_s_prompt_is_found_in_the_cache(here: Box, api: str, blocks: bool) -> None:
    """Without its first line, which is another in each conversation; also behind a proxy."""
    prompt = f"You are careful, over {api} {blocks}. " * 20

    def cached(number: int) -> int:
        line = f"{BILLING}: cc_version=2.1.328.{number}; cc_entrypoint=cli;"
        said: Any = f"{line}\n{prompt}"
        if blocks and api != "responses":
            said = [{"type": "text", "text": text} for text in (line, prompt)]
        user = {"role": "user", "content": f"{number}: hello"}
        body: dict[str, Any] = {
            "messages": {"system": said, "messages": [user], "max_tokens": 1},
            "chat/completions": {
                "messages": [{"role": "system", "content": said}, user], "max_tokens": 1,
            },
            "responses": {"instructions": said, "input": [user], "max_output_tokens": 1},
        }[api]  # fmt: skip
        answer = ask(here, f"/v1/{api}", body)
        assert BILLING in answer.headers["x-pinaivu-ignored"]
        usage = answer.json()["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        return int(details.get("cached_tokens", usage.get("cache_read_input_tokens")))

    cached(1)
    assert cached(2) > len(prompt)
    assert counted(here, USER, system=f"{BILLING}: a\nBe.") == counted(here, USER, system="Be.")
    line = {"type": "text", "text": f"{BILLING}: a"}
    assert counted(here, USER, system=[line]) == counted(here, USER)


def test_an_answer_that_has_begun_goes_on(here: Box) -> None:
    begun = {"role": "assistant", "content": "The quick"}
    plain = counted(here, USER)
    assert counted(here, USER, begun) == plain + len("The quick")
    parts = {"role": "assistant", "content": [{"type": "text", "text": "The quick"}]}
    assert counted(here, USER, parts) == plain + len("The quick")
    assert messages(here, USER, begun)["content"]


def test_thoughts_of_others_are_in_the_history(here: Box) -> None:
    thoughts = [
        {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
        {"type": "redacted_thinking", "data": "abc"},
        {"type": "text", "text": "Yes."},
    ]
    told = messages(here, USER, {"role": "assistant", "content": thoughts}, USER)
    assert told["ignored_parameters"] == ["messages.content.redacted_thinking"]


def test_a_prompt_that_is_too_long_in_anthropic_s_words(here: Box) -> None:
    long = {"role": "user", "content": "x" * 250_000}
    for stream in (False, True):
        said = messages(here, long, stream=stream, status=400)["error"]["message"]
        assert said.startswith("prompt is too long: 25") and said.endswith(
            " tokens > 200000 maximum"
        )


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("many levels", {}),
        ("a large number", {"a": 10**30}),
        ("too large a number", {}),
    ],
)
def test_arguments_that_an_answer_cannot_hold(here: Box, asked: str, given: Any) -> None:
    """As text they come as they are; as an object without what JSON cannot carry."""
    user = {"role": "user", "content": asked}
    tool = {"name": "f", "input_schema": {"type": "object"}}
    more: dict[str, Any] = {"model": SCRIPTED, "max_tokens": 9000, "tools": [tool]}
    (block,) = messages(here, user, **more)["content"]
    assert (block["name"], block["input"]) == ("f", given)
    streamed = ask(here, "/v1/messages", {**more, "messages": [user], "stream": True}).text
    check_stream("/v1/messages", streamed)
    deltas = [one["delta"] for one in events_of(streamed) if one["type"] == "content_block_delta"]
    assert "".join(one["partial_json"] for one in deltas) == WRITTEN[asked]
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    (call,) = respond(here, [user], tools=[function], model=SCRIPTED, max_output_tokens=9000)[
        "output"
    ]
    assert call["arguments"] == WRITTEN[asked]


def test_many_tools(here: Box) -> None:
    many = [{**LOOK, "name": f"look_{n}"} for n in range(300)]
    messages(here, USER, tools=many)
    messages(here, USER, tools=[{**LOOK, "name": f"l_{n}"} for n in range(1025)], status=422)


# -- Responses -----------------------------------------------------------------------------------


def respond(here: Box, given: Any, status: int = 200, **more: Any) -> Any:
    body = {"input": given, "max_output_tokens": 60, **more}
    return ask(here, "/v1/responses", body, status).json()


def forced(text: str) -> dict[str, Any]:
    return {"name": "f", "parameters": {"type": "object", "properties": {"t": {"enum": [text]}},
            "required": ["t"], "additionalProperties": False}}  # fmt: skip


def test_a_tool_in_a_namespace_is_called_and_answered(here: Box) -> None:
    space = {"type": "namespace", "name": "mcp__x", "tools": [{"type": "function", **forced("a")}]}
    made = respond(here, "hi", tools=[space], tool_choice="required", parallel_tool_calls=False)
    (call,) = made["output"]
    assert (call["type"], call["namespace"], call["name"]) == ("function_call", "mcp__x", "f")
    assert json.loads(call["arguments"]) == {"t": "a"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
    respond(here, [{"role": "user", "content": "hi"}, call, result], tools=[space])
    respond(here, [result], tools=[space], previous_response_id=made["id"])


def test_tools_among_the_items_are_the_request_s(here: Box) -> None:
    """Where Codex has them for some models; a later one replaces an earlier one of its name."""
    items: list[Any] = [
        {"type": "additional_tools", "role": "developer", "tools": [{"type": "function", **one}]}
        for one in (forced("a"), forced("b"))
    ]
    user = {"role": "user", "content": "hi"}
    must: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    (call,) = respond(here, [*items, user], **must)["output"]
    assert (call["name"], json.loads(call["arguments"])) == ("f", {"t": "b"})
    other = {"type": "function", **forced("c"), "name": "g"}
    given = respond(here, [items[0], user], tools=[other], **must)
    assert [tool["name"] for tool in given["tools"]] == ["g", "f"]
    space = {"type": "namespace", "name": "f", "tools": [{**other, "name": "h"}]}
    first = {"type": "function", **forced("a")}
    given = respond(here, [items[1], user], tools=[first, space, {"type": "web_search"}], **must)
    assert [tool["type"] for tool in given["tools"]] == ["namespace", "function"]
    assert given["tools"][1]["parameters"] == forced("b")["parameters"]
    respond(here, [{"type": "additional_tools", "tools": "f"}, user], status=422)
    respond(here, [{"type": "additional_tools"}, user], status=422)


def test_a_custom_tool_is_called_with_text(here: Box) -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tool = {"type": "custom", "name": "patch", "description": "Patch.", "format": form}
    body = {
        "input": "hi", "max_output_tokens": 100, "tools": [tool], "stream": True,
        "tool_choice": {"type": "custom", "name": "patch"}, "parallel_tool_calls": False,
    }  # fmt: skip
    events = events_of(ask(here, "/v1/responses", body).text)
    item = events[-1]["response"]["output"][0]
    assert (item["type"], item["name"]) == ("custom_tool_call", "patch") and item["input"]
    done = next(e for e in events if e["type"] == "response.output_item.done")["item"]
    assert done["input"] == item["input"]
    told = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(told) == item["input"]
    added = next(e for e in events if e["type"] == "response.output_item.added")["item"]
    assert added["input"] == "" and added["type"] == "custom_tool_call"
    result = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"}
    respond(here, [{"role": "user", "content": "hi"}, item, result], tools=[tool])


def test_an_item_is_referred_to(here: Box) -> None:
    made = respond(here, "hi", max_output_tokens=5)
    item = made["output"][0]
    again = {"role": "user", "content": "more"}
    given = respond(here, [{"role": "user", "content": "hi"}, item, again], max_output_tokens=1)
    for reference in ({"type": "item_reference", "id": item["id"]}, {"id": item["id"]}):
        found = respond(
            here, [{"role": "user", "content": "hi"}, reference, again], max_output_tokens=1
        )
        assert found["usage"]["input_tokens"] == given["usage"]["input_tokens"]
    for unknown in ("msg_x", item["id"][:-1] + "7", "msg_" + "0" * 26 + "_0"):
        respond(here, [{"type": "item_reference", "id": unknown}], 404)
    other = here.http("POST", "/v1/admin/accounts", json={"name": "other"}).json()
    key = here.http("POST", "/v1/admin/keys", json={"account": other["id"]}).json()["key"]
    body = {"input": [{"type": "item_reference", "id": item["id"]}]}
    ask(here, "/v1/responses", body, 404, key=key)


def test_ignored_parts_of_a_response_are_named(here: Box) -> None:
    made = respond(
        here,
        [
            {"role": "user", "content": "hi", "phase": "x"},
            {"type": "web_search_call", "id": "ws_1"},
        ],
        include=["message.output_text.logprobs"],
        truncation="auto",
        text={"verbosity": "low"},
        tools=[{"type": "web_search"}, {"type": "image_generation"}],
        service_tier="fast",
    )
    assert sorted(made["ignored_parameters"]) == [
        "include", "input.phase", "input.web_search_call", "service_tier", "text.verbosity",
        "tools.image_generation", "tools.web_search",
    ]  # fmt: skip
    neutral = respond(here, "hi", truncation="disabled", text={"verbosity": "medium"})
    assert neutral["ignored_parameters"] == []
