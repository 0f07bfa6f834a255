"""Every error as the SDKs of Python and Node raise it: errors.toml is the table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.conftest import NodePackage
from tests.support import gguf_files
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, environment, wait_until

HERE = Path(__file__).parent
TABLE: list[dict[str, Any]] = tomllib.loads((HERE / "errors.toml").read_text())["row"]
CONFIG = """
[server]
max_body_bytes = 5000
[engine]
context = 2000
[pricing]
per_1k_tokens = "1"
"""
KEYS = {
    "blocked": (),
    "other": ("--model", "llama*"),
    "spent": ("--budget", "0 per 30d"),
    "limited": ("--rpm", "1"),
    "small": ("--tpm", "10"),
}
LONG = "word " * 700  # more tokens than the context has, in a body that is not too large
DYING = {"python": "dies:1", "node": "dies:2"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("errors")
    config = folder / "box.toml"
    config.write_text(CONFIG)
    # A good header, and no model behind it.
    (folder / "broken.gguf").write_bytes(gguf_files.valid())
    models = [f"{name}=fake:100" for name in ("fake:1", DYING["python"], DYING["node"])]
    given = [f"--model={one}" for one in [*models, f"broken:1={folder / 'broken.gguf'}"]]
    started = Box(folder / "home", "--config", str(config), *given).start()
    yield started
    started.end()


@pytest.fixture(scope="module")
def keys(strict: Box) -> dict[str, str]:
    def make(*options: str) -> dict[str, Any]:
        return dict(run_command_json("keys", "create", *options, home=strict.home))

    made = {name: make(*options) for name, options in KEYS.items()}
    run_command("keys", "edit", made["blocked"]["id"], "--block", "unpaid", home=strict.home)
    secrets = {name: key["key"] for name, key in made.items()}
    return {"admin": strict.key, "plain": make()["key"], "wrong": "sk-wrong", **secrets}


def use_up(box: Box, keys: dict[str, str]) -> dict[str, str]:
    """With a new key for the limited one, whose one request of the minute was just made: an older
    one's minute might end meanwhile."""
    secret = str(run_command_json("keys", "create", *KEYS["limited"], home=box.home)["key"])
    body = {"model": "fake:1", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert box.http("POST", "/v1/chat/completions", key=secret, json=body).status_code == 200
    return {**keys, "limited": secret}


def request_of(row: dict[str, Any], keys: dict[str, str], language: str) -> dict[str, Any]:
    """What is sent, with the text of its body."""
    content = row.get("text")
    if "body" in row:
        content = json.dumps(row["body"]).replace("LONG", LONG).replace("DYING", DYING[language])
        content += " " * (row.get("pad", 0) - len(content))
    return {
        "name": row["name"],
        "method": row.get("method", "POST"),
        "path": row.get("path", "/chat/completions"),
        "key": keys[row.get("key", "admin")],
        "content": content,
        "stream": bool(row.get("body", {}).get("stream")),
    }


def kill_engines(box: Box, model: str, deaths: int) -> None:
    """One after another, each while it is at work."""
    killed: set[int] = set()
    for _ in range(deaths):

        def victim() -> int:
            running = [one for one in box.engines() if one["model"] == model and one["running"]]
            return next((one["pid"] for one in running if one["pid"] not in killed), 0)

        pid = wait_until(victim, "an engine at work")
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)


def check(row: dict[str, Any], language: str, raised: dict[str, Any]) -> None:
    """`raised`: kind, status, code, type, param, message and headers of an exception."""
    assert raised["kind"] == row.get("sdk", row.get(language)), raised
    for name in ("status", "code", "type", "param"):
        assert raised.get(name) == row.get(name), (name, raised)
    assert row["words"] in raised["message"]
    for name, value in row.get("headers", {}).items():
        assert value in raised["headers"][name]


@pytest.mark.parametrize("row", TABLE, ids=[row["name"] for row in TABLE])
def test_python(strict: Box, keys: dict[str, str], row: dict[str, Any]) -> None:
    if row.get("key") == "limited":
        keys = use_up(strict, keys)
    with pytest.raises(openai.APIError) as caught:
        send(strict, row, request_of(row, keys, "python"))
    error = caught.value
    body: Any = error.body
    response = getattr(error, "response", None)
    check(
        row,
        "python",
        {
            "kind": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "code": error.code,
            "type": error.type,
            "param": error.param,
            "message": body["message"],
            "headers": response.headers if response is not None else {},
        },
    )
    if response is None:
        return
    answer = response.json()
    assert set(answer) == {"error", "detail"} and answer["error"] == body
    detail = [{"loc": row.get("loc"), "msg": body["message"], "type": row.get("kind")}]
    assert answer["detail"] == (detail if "loc" in row else body["message"])


def send(box: Box, row: dict[str, Any], request: dict[str, Any]) -> None:
    client = box.client_with(request["key"])
    options: dict[str, Any] = {"cast_to": object}
    if request["method"] == "GET":
        client.get(request["path"], **options)
        return
    if request["stream"]:
        options |= {"stream": True, "stream_cls": openai.Stream[Any]}
    method = getattr(client, request["method"].lower())
    headers = {"content-type": "application/json"}
    answer = method(
        request["path"],
        content=request["content"].encode(),
        options={"headers": headers},
        **options,
    )
    next(iter(answer))
    kill_engines(box, DYING["python"], row["deaths"])
    list(answer)


def test_node(strict: Box, keys: dict[str, str], node: NodePackage, tmp_path: Path) -> None:
    """All rows in one process."""
    keys = use_up(strict, keys)
    shutil.copy(HERE / "errors.mjs", node.folder)
    table = tmp_path / "table.json"
    rows = [request_of(row, keys, "node") for row in TABLE]
    table.write_text(json.dumps({"url": f"{strict.url}/v1", "rows": rows}))
    script = subprocess.Popen(
        [node.program, "errors.mjs", str(table)],
        cwd=node.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    guard = threading.Timer(200, script.kill)  # against hanging
    guard.start()
    deaths = iter([row["deaths"] for row in TABLE if "deaths" in row])
    answers = {}
    with script:
        assert script.stdout
        for line in script.stdout:
            if line == "begun\n":
                kill_engines(strict, DYING["node"], next(deaths))
            else:
                answer = json.loads(line)
                answers[answer["name"]] = answer
    guard.cancel()
    assert script.returncode == 0
    assert list(answers) == [row["name"] for row in TABLE]
    for row in TABLE:
        check(row, "node", answers[row["name"]])
