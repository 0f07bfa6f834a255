"""Asks a server for an answer and reads it while it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pinaivu_box.errors import CliError, NotRunning
from pinaivu_box.tls.pinned import context_for

_CONNECT_SECONDS = 10.0
_PATH = "/v1/chat/completions"


class KeyRefused(CliError):
    """The server does not know the key (any more)."""


@dataclass(frozen=True)
class Piece:
    """Some more of an answer, or of the thoughts before it."""

    kind: Literal["text", "reasoning"]
    text: str


@dataclass(frozen=True)
class Ended:
    """The end of an answer, for which the request with that id has a receipt."""

    reason: str
    request_id: str
    prompt_tokens: int
    completion_tokens: int


def ask(home: Path, url: str, key: str, body: dict[str, Any]) -> Iterator[Piece | Ended]:
    """Yield an answer of that home's server as it comes; closing the iterator cancels it.

    Raises NotRunning, KeyRefused, CliError.
    """
    import httpx

    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    # An answer may begin late: the model is loaded first, and requests of others may run.
    timeout = httpx.Timeout(_CONNECT_SECONDS, read=None)
    headers = {"Authorization": f"Bearer {key}"}
    verify = context_for(home, url)
    try:
        with (
            httpx.Client(
                base_url=url, headers=headers, timeout=timeout, trust_env=False, verify=verify
            ) as client,
            client.stream("POST", _PATH, json=asked) as response,
        ):
            if response.is_error:
                raise _refusal(response.status_code, response.read())
            yield from _pieces(response.iter_lines())
    except httpx.ConnectError as error:
        raise NotRunning("The box does not run any more.") from error
    except httpx.HTTPError as error:
        raise CliError("The box stopped in the middle of the answer.") from error


def _refusal(status: int, content: bytes) -> CliError:
    error = json.loads(content)["error"]
    named = status == 422 and error["param"]  # its message says what is wrong with that field
    message = f"{error['param']}: {error['message']}" if named else error["message"]
    return KeyRefused(message) if status == 401 else CliError(message)


def _pieces(lines: Iterator[str]) -> Iterator[Piece | Ended]:
    """What the events of a stream say.  Raises CliError."""
    reason, request_id = "", ""
    usage: dict[str, int] = {}
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line:  # a comment, or the line between two events
            continue
        if data == "[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise CliError(chunk["error"]["message"])
        request_id, usage = chunk["request_id"], chunk.get("usage") or usage
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            delta = choice["delta"]
            if thought := delta.get("reasoning_content"):
                yield Piece("reasoning", thought)
            if text := delta.get("content"):
                yield Piece("text", text)
    yield Ended(
        reason, request_id, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    )
