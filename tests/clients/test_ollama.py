"""Ollama's own Python package, against the rest of what it knows: pulling, errors, no key."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support import gguf_files
from tests.support.client_programs import PYTHON_OF_CLIENTS
from tests.support.process_box import Box, StartBox, environment
from tests.support.registry_server import RegistryServer, registry_server

CONFIG = """
[registry]
ollama = "{url}"
[server.anonymous_key]
key = "anybody"
networks = ["127.0.0.0/8"]
"""
PULL = """
statuses = [part.status for part in client.pull("tiny:1b", stream=True)]
print(json.dumps([statuses[0], statuses[-1], [m.model for m in client.list().models]]))
"""
ERRORS = """
said = []
for name, ask in (
    ("chat", lambda: client.chat("none:1b", [{"role": "user", "content": "hi"}])),
    ("pull", lambda: list(client.pull("none:1b", stream=True))),
    ("stream", lambda: list(client.pull("bad:1b", stream=True))),
):
    try:
        ask()
    except ollama.ResponseError as error:
        said.append([name, error.status_code, error.error])
print(json.dumps(said))
"""
UNLOAD = """
answer = client.generate("fake:1", "hi", options={"num_predict": 2})
loaded = len(client.ps().models)
reason = client.generate("fake:1", keep_alive=0).done_reason
print(json.dumps([answer.eval_count, loaded, reason]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with registry_server() as running:
        running.add_ollama("library/tiny:1b", gguf_files.valid(data=100))
        yield running


@pytest.fixture(scope="module")
def box(module_box: StartBox, server: RegistryServer) -> Box:
    started = module_box("--model", "fake:1=fake:0", config=CONFIG.format(url=server.url))
    started.http("POST", "/v1/admin/keys", json={"account": "owner", "name": "anybody"})
    return started


def run(box: Box, script: str, key: str | None = None) -> Any:
    """What a script prints, which has a client of that box as `client`."""
    more = {"OLLAMA_HOST": box.url, "NO_PROXY": "*"}
    if secret := box.key if key is None else key:
        more["OLLAMA_API_KEY"] = secret
    code = f"import json, ollama\nclient = ollama.Client()\n{script}"
    done = subprocess.run(
        [str(PYTHON_OF_CLIENTS), "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**more),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_pulls_a_model_and_lists_it(box: Box) -> None:
    first, last, models = run(box, PULL)
    assert (first, last) == ("pulling manifest", "success")
    assert "tiny:1b" in models


def test_its_errors_have_our_sentences(box: Box, server: RegistryServer) -> None:
    server.add_ollama("library/bad:1b", gguf_files.valid(data=200))
    server.faults.wrong_bytes = True
    said = {name: (status, text) for name, status, text in run(box, ERRORS)}
    assert said["chat"][0] == 404 and "none:1b" in said["chat"][1]
    assert said["pull"][0] == 409 and "no model none:1b" in said["pull"][1]
    assert "another file than its digest" in said["stream"][1]


def test_it_needs_no_key_where_the_operator_says_so(box: Box) -> None:
    assert run(box, UNLOAD, key="") == [2, 1, "unload"]
    with pytest.raises(AssertionError, match="401"):
        run(box, UNLOAD, key="sk-pnv-wrong")
