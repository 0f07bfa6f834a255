"""A streamed chat that is read in a thread."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from pinaivu_box.engine.fake_runner import SENTENCE
from tests.support.process_box import (
    Box,
    wait_until,
)

URL = "/v1/chat/completions"


def body(model: str, max_tokens: int, stream: bool = True, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Count to a hundred."}]
    return {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": stream,
        **more,
    }


class StreamedChat:
    """A streamed request, read in a thread; what it has seen can be looked at meanwhile."""

    def __init__(
        self, box: Box, model: str, max_tokens: int, *, key: str = "", **more: Any
    ) -> None:
        self.text = ""
        self.route = ""
        self.request_id = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.chunks: list[dict[str, Any]] = []
        self.done = False
        self.error: Any = None
        self._box, self.key = box, key or box.key
        options = {"include_usage": True}
        more = {"temperature": 0, "stream_options": options, "ignore_eos": True, **more}
        self._body = body(model, max_tokens, **more)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with (
                http_client(self._box, key=self.key) as client,
                client.stream("POST", URL, json=self._body) as got,
            ):
                self.route = got.headers.get("x-pinaivu-route", "")
                if got.status_code != 200:
                    self.error = f"{got.status_code}: {got.read().decode()}"
                    return
                for line in got.iter_lines():
                    self._take(line)
                    if self._leave.is_set():
                        return
        except httpx.HTTPError as error:
            self.error = error

    def _take(self, line: str) -> None:
        if line and self.error:
            self.error = f"after the error: {line}"
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.error = chunk["error"]
                return
            self.chunks.append(chunk)
            self.request_id = chunk["request_id"]
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                self.text += choice["delta"].get("content", "")
                self.finish_reason = choice["finish_reason"] or self.finish_reason

    def leave(self) -> None:
        """Close the connection in the middle."""
        self._leave.set()
        self.join()

    def join(self) -> None:
        self._thread.join(300)
        assert not self._thread.is_alive()

    def wait_for_text(self, characters: int = 1) -> None:
        wait_until(lambda: len(self.text) >= characters or self.error, "text of the stream")
        assert not self.error

    def check_whole(self, max_tokens: int) -> None:
        """It came to its end, and nothing is missing, doubled or out of order."""
        self.join()
        assert self.error is None and self.done
        assert self.finish_reason == "length"
        assert self.usage["completion_tokens"] == max_tokens
        at = self.usage["prompt_tokens"]
        expected = (SENTENCE * (max_tokens + at)).decode()[at - 1 : at - 1 + max_tokens]
        assert self.text == expected


def http_client(box: Box, seconds: float = 120, key: str = "") -> httpx.Client:
    return httpx.Client(
        base_url=box.url,
        headers={"Authorization": f"Bearer {key or box.key}"},
        timeout=seconds,
        trust_env=False,
    )
