"""Conversations over HTTP, as the chat page uses them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.support.fake_model import FAKE


def conversation(client: httpx.Client, **fields: Any) -> str:
    """A new one; its id."""
    answer = client.post("/v1/conversations", json={"model": FAKE, **fields})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def ask(client: httpx.Client, conversation_id: str, content: str = "", **fields: Any) -> Any:
    """Send a message and read its answer to the end: the answer as the last event has it."""
    body = {"max_tokens": 8, **({"content": content} if content else {}), **fields}
    path = f"/v1/conversations/{conversation_id}/answers"
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        *_, last = events(response)
    assert last["type"] == "finished"
    return last["answer"]


def messages(client: httpx.Client, conversation_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(
        f"/v1/conversations/{conversation_id}/messages"
    ).json()["data"]
    return found


def in_database(home: Path, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """Run a statement on the file of a home, whether or not a server has it open."""
    database = sqlite3.connect(home / "pinaivu.db", timeout=30)
    try:
        rows = database.execute(statement, parameters).fetchall()
        database.commit()
        return rows
    finally:
        database.close()


def files_with(home: Path, *texts: str) -> list[str]:
    """The files of a home that contain one of the texts, also as JSON or UTF-16 would write it."""
    spellings = [
        spelling
        for text in texts
        for spelling in (text.encode(), text.encode("utf-16-le"), json.dumps(text)[1:-1].encode())
    ]
    found = []
    for path in home.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{path.name}: {one!r}" for one in spellings if one in data]
    return found
