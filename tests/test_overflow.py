"""Overflow of the context: what programs look for in an answer, to know that they have to shorten
what they send, is in every answer of the box that says so, in the words of its API."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import openai
import pytest

from pinaivu_box.errors import by_code
from pinaivu_box.server.error_responses import adapted
from tests.support.process_box import Box, StartBox

FAKE = "fake:1"  # of which every byte is a token
CONTEXT = 256
CODE = "context_length_exceeded"
# Longer than the context; and so long that it is refused by its number of characters.
TEXTS = {"tokens": "x" * 300, "characters": "x" * 70_000}
# Path, body, and the field that is to blame.
REQUESTS: dict[str, tuple[str, Callable[[str], dict[str, Any]], str | None]] = {
    "chat": ("/v1/chat/completions", lambda text: {"messages": _user(text)}, None),
    "choices": ("/v1/chat/completions", lambda text: {"messages": _user(text), "n": 2}, None),
    "count of a limited key": (
        "/v1/chat/completions",
        lambda text: {"messages": _user(text)},
        None,
    ),
    "completion": ("/v1/completions", lambda text: {"prompt": text}, "prompt"),
    "prompts": ("/v1/completions", lambda text: {"prompt": ["a", text]}, "prompt"),
    "tokens": ("/v1/completions", lambda text: {"prompt": [list(text.encode())]}, "prompt"),
    "response": ("/v1/responses", lambda text: {"input": text}, None),
    "message": ("/v1/messages", lambda text: {"messages": _user(text), "max_tokens": 1}, None),
    "embedding": ("/v1/embeddings", lambda text: {"input": text}, "input"),
    "embeddings": ("/v1/embeddings", lambda text: {"input": ["a", text]}, "input"),
}
OPENAI, ANTHROPIC = "openai", "anthropic"
# Who looks in whose answers, and for what, in the message: the newest SDK's exception says no more.
MATCHERS: list[tuple[str, str, str]] = [
    ("LiteLLM, and aider through it", OPENAI, "(?i)this model's maximum context length is"),
    ("LangChain", OPENAI, CODE),
    ("LangChain, in streams", OPENAI, "exceeds the context window"),
    ("opencode", OPENAI, r"(?i)maximum context length is \d+ tokens"),
    ("OpenAI's own", OPENAI, r"This model's maximum context length is 256 tokens\. However, "),
    ("LangChain", ANTHROPIC, "prompt is too long"),
    ("LiteLLM", ANTHROPIC, "(?i)prompt is too long"),
    ("opencode", ANTHROPIC, "(?i)prompt is too long"),
    ("Claude Code", ANTHROPIC, r"(?i)prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)"),
]
# And in those of chats alone, with both numbers.
OF_CHATS = (
    r"This model's maximum context length is (\d+) tokens. However, your messages resulted in "
    r"(?:at least )?(\d+) tokens. Please reduce the length of the messages\."
)
OF_PROMPTS = r"maximum context length is (\d+) tokens.+?(\d+) in your prompt"


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    """Its streams begin at once: what goes wrong is then an event."""
    return module_box(
        config="[server]\nstream_grace_seconds = 0\n"
        f'[[model]]\nname = "{FAKE}"\npath = "fake:0"\ncontext = {CONTEXT}\n'
    )


@pytest.fixture(scope="module")
def limited(here: Box) -> str:
    """A key whose prompts are counted before they run."""
    made = here.http(
        "POST", "/v1/admin/keys", json={"account": "owner", "policy": {"tpm": 1_000_000}}
    )
    return str(made.json()["key"])


def check(path: str, code: str, message: str) -> None:
    """`code` and `message` are of the error that the answer is, or that the stream ends with."""
    api = ANTHROPIC if path == "/v1/messages" else OPENAI
    for who, whose, wanted in MATCHERS:
        assert whose != api or re.search(wanted, message), (who, wanted, message)
    assert code == CODE
    if api == ANTHROPIC:
        found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", message)
        assert found is not None, message
        tokens, most = map(int, found.groups())
    else:
        of_prompts = path in ("/v1/completions", "/v1/embeddings")
        found = re.search(OF_PROMPTS if of_prompts else OF_CHATS, message)
        assert found is not None, message
        most, tokens = map(int, found.groups())
    assert most == CONTEXT < tokens


@pytest.mark.parametrize("size", TEXTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_it_is_said_in_the_words_that_programs_look_for(
    here: Box, limited: str, name: str, size: str
) -> None:
    path, made, param = REQUESTS[name]
    key = limited if name.startswith("count") else here.key
    body = {"model": FAKE, **made(TEXTS[size])}
    answer = here.http("POST", path, json=body, key=key)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and answer.json()["detail"] == error["message"]
    check(path, error["code"], error["message"])
    if "embed" in path:
        return
    streamed = here.http("POST", path, json={**body, "stream": True}, key=key)
    if streamed.status_code == 400:  # found before there was a stream
        error = streamed.json()["error"]
    else:
        lines = [line for line in streamed.text.splitlines() if line.startswith("data: {")]
        last = json.loads(lines[-1].removeprefix("data: "))
        error = last["response"]["error"] if "response" in last else last["error"]
    check(path, error["code"], error["message"])


def test_the_sdk_raises_it_with_its_code(here: Box) -> None:
    asked: dict[str, Any] = {"model": FAKE, "messages": _user(TEXTS["tokens"])}
    with pytest.raises(openai.BadRequestError) as caught:
        here.client.chat.completions.create(**asked)
    assert caught.value.code == CODE and CODE in str(caught.value)
    with pytest.raises(openai.APIError, match="exceeds the context window"):
        list(here.client.chat.completions.create(stream=True, **asked))


def test_max_tokens_beyond_the_context_are_cut_off(here: Box) -> None:
    """It is no overflow: an answer can always be shorter than it may be."""
    body = {"model": FAKE, "messages": _user("hi"), "max_tokens": 100_000}
    answer = here.http("POST", "/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_peer_may_say_it_in_other_words(path: str) -> None:
    said = "The prompt has 300 tokens (n_prompt_tokens) and the context is 256 (n_ctx): shorten it."
    check(path, CODE, adapted(by_code(CODE, said), "", path).message)
    bare = adapted(by_code(CODE, "It is too long."), "", path).message
    assert re.search("prompt is too long|This model's maximum context length is", bare)
    assert "It is too long." in bare
