"""`pinaivu pull NAME`: a name becomes a model that answers, whoever asks and whatever breaks."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.models import bundled
from pinaivu_box.models.partial_file import PIECE_BYTES
from tests.support import gguf_files, tiny_vision
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import PINAIVU, Box, environment, wait_until
from tests.support.registry_server import RegistryServer, registry_server

USER = {"role": "user", "content": "Say hello."}
SMALL = gguf_files.valid(data=3 * PIECE_BYTES)
SMALL_DIGEST = hashlib.sha256(SMALL).hexdigest()


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with registry_server() as running:
        yield running


@pytest.fixture
def pulling_box(server: RegistryServer, tmp_path: Path) -> Iterator[Box]:
    """A box whose registries are that server, without models."""
    config = tmp_path / "box.toml"
    config.write_text(f'[registry]\nollama = "{server.url}"\nhub = "{server.url}"\n')
    box = Box(tmp_path / "home", "--config", str(config)).start()
    yield box
    box.end()


def real_weights() -> bytes:
    """The bundled model's, as another file."""
    location = bundled.find()
    assert location is not None
    with location.path.open("rb") as file:
        file.seek(location.offset)
        return file.read(location.size) + bytes(32)


def models(box: Box) -> list[str]:
    return [model["id"] for model in box.http("GET", "/v1/models").json()["data"]]


def pull(box: Box, name: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run_command("pull", name, *args, home=box.home, check=check)


def lines(box: Box, **body: Any) -> list[dict[str, Any]]:
    done = box.http("POST", "/v1/admin/models/pull", json=body)
    assert done.status_code == 200, done.text
    return [json.loads(line) for line in done.text.splitlines()]


def test_a_model_that_is_pulled_by_name_answers_with_its_digest_in_the_receipt(
    server: RegistryServer, pulling_box: Box
) -> None:
    weights = real_weights()
    digest = server.add_ollama(
        "library/llama3.2:1b", weights, license="Be nice.", params='{"temperature": 0}'
    )
    done = pull(pulling_box, "llama3.2:1b")
    assert "llama3.2:1b is served" in done.stdout
    answers = [
        pulling_box.chat("Say hello.", model="llama3.2:1b", max_tokens=8).json() for _ in range(2)
    ]
    said = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert said[0] == said[1] != ""  # the registry's temperature is 0
    receipt = pulling_box.http("GET", f"/v1/receipts/{answers[0]['request_id']}").json()
    signed = json.loads(receipt["signed_receipt"])
    assert (signed["model"], signed["model_digest"]) == ("llama3.2:1b", digest)
    (entry,) = [
        entry
        for entry in run_command_json("audit", home=pulling_box.home)
        if entry["action"] == "model.pull"
    ]
    assert entry["detail"]["digest"] == digest


def test_the_registrys_stop_strings_end_an_answer_and_its_receipt_says_so(
    server: RegistryServer, pulling_box: Box, tmp_path: Path
) -> None:
    weights = real_weights()
    server.add_ollama("library/stops:1b", weights, params='{"temperature": 0, "stop": ["e"]}')
    pull(pulling_box, "stops:1b")
    body: dict[str, Any] = {"messages": [USER], "model": "stops:1b", "max_tokens": 60}
    answer = pulling_box.http("POST", "/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    assert "e" not in choice["message"]["content"] and choice["finish_reason"] == "stop"
    (own,) = pulling_box.http(
        "POST", "/v1/chat/completions", json={**body, "stop": ["zzz"]}
    ).json()["choices"]
    assert "e" in own["message"]["content"]  # a request's own take their place
    message = pulling_box.http("POST", "/v1/messages", json=body).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    request = tmp_path / "request.json"
    request.write_text(json.dumps(body))
    done = run_command(
        "receipts", "verify", answer["request_id"], "--request", str(request), home=pulling_box.home
    )
    assert "the prompt you gave is" in done.stdout


def test_a_model_that_sees_images_comes_and_goes_with_its_projector(
    server: RegistryServer, pulling_box: Box, tmp_path: Path
) -> None:
    files = tiny_vision.put(tmp_path / "eye")
    projector = files.projector.read_bytes()
    server.add_ollama("ann/eye:1b", files.model.read_bytes(), projector=projector)
    pull(pulling_box, "ann/eye:1b")
    image = base64.b64encode(tiny_vision.image(red=255)).decode()
    message = {"role": "user", "content": "What is this?", "images": [image]}
    body: dict[str, Any] = {
        "model": "ann/eye:1b",
        "messages": [message],
        "options": {"num_predict": 2},
    }
    done = pulling_box.http("POST", "/api/chat", json={**body, "stream": False})
    assert done.status_code == 200, done.text
    assert done.json()["eval_count"] == 2
    server.ranges.clear()
    server.add_ollama("ann/twin:1b", files.model.read_bytes(), projector=projector)
    pull(pulling_box, "ann/twin:1b")
    assert not any(server.ranges)  # both files are here
    run_command("rm", "ann/eye:1b", "--yes", home=pulling_box.home)
    left = [path.name for path in (pulling_box.home / "models").rglob("*") if path.is_file()]
    assert sorted(left) == ["mmproj-twin:1b.gguf", "twin:1b.gguf", "twin:1b.gguf.json"]
    body = {**body, "model": "ann/twin:1b", "stream": False}
    assert pulling_box.http("POST", "/api/chat", json=body).status_code == 200


def ollama_lines(box: Box, **body: Any) -> list[dict[str, Any]]:
    done = box.http("POST", "/api/pull", json=body)
    assert done.status_code == 200, done.text
    return [json.loads(line) for line in done.text.splitlines()]


def test_ollamas_way_to_pull_has_ollamas_progress(server: RegistryServer, pulling_box: Box) -> None:
    digest = server.add_ollama("library/tiny:1b", SMALL)
    first, *middle, last = ollama_lines(pulling_box, model="tiny:1b")
    assert (first["status"], last["status"]) == ("pulling manifest", "success")
    (size,) = {line["total"] for line in middle if "total" in line}
    assert size == len(SMALL) == middle[-1]["completed"]
    assert middle[-1]["digest"] == f"sha256:{digest}"
    assert "tiny:1b" in models(pulling_box)
    done = pulling_box.http("POST", "/api/pull", json={"name": "tiny:1b", "stream": False})
    assert done.json()["status"] == "success"
    missing = pulling_box.http("POST", "/api/pull", json={"model": "none:1b"})
    assert missing.status_code == 409 and "no model none:1b" in missing.json()["error"]
    server.add_ollama("library/bad:1b", gguf_files.valid(data=PIECE_BYTES))
    server.faults.wrong_bytes = True
    assert "another file than" in ollama_lines(pulling_box, model="bad:1b")[-1]["error"]
    whole = pulling_box.http("POST", "/api/pull", json={"model": "bad:1b", "stream": False})
    assert whole.status_code == 409 and "another file than" in whole.json()["error"]


def test_only_admins_pull(pulling_box: Box) -> None:
    body = {"account": "owner", "name": "plain"}
    plain = pulling_box.http("POST", "/v1/admin/keys", json=body).json()["key"]
    done = pulling_box.http("POST", "/api/pull", key=plain, json={"model": "tiny:1b"})
    assert done.status_code == 403


@pytest.mark.parametrize(
    "name, served",
    [
        ("tiny:1b", "tiny:1b"),
        ("ann/tiny:q4", "ann/tiny:q4"),
        ("hf.co/ann/tiny-GGUF:Q8_0", "hf.co/ann/tiny-GGUF:Q8_0"),
        ("HOST/lab/tiny", "HOST/lab/tiny:latest"),
        ("URL", "tiny:latest"),
    ],
)
def test_every_kind_of_name_is_served_under_its_id_and_still_after_a_restart(
    server: RegistryServer, pulling_box: Box, name: str, served: str
) -> None:
    for repository in ("library/tiny:1b", "ann/tiny:q4", "lab/tiny:latest"):
        server.add_ollama(repository, SMALL)
    server.add_hub("ann/tiny-GGUF", {"tiny-Q8_0.gguf": SMALL})
    host = server.url.partition("://")[2]
    url = f"{server.url}/files/{SMALL_DIGEST}/tiny.gguf"
    pull(pulling_box, name.replace("HOST", host).replace("URL", url))
    served = served.replace("HOST", host.replace(":", "_"))
    assert served in models(pulling_box)
    pulling_box.stop()
    pulling_box.start()
    assert served in models(pulling_box)
    # The digest was stored with the download: nobody has to read the file again.
    tags = pulling_box.http("GET", "/api/tags").json()["models"]
    assert {tag["name"]: tag["digest"] for tag in tags}[served] == SMALL_DIGEST


def test_a_split_model_comes_whole(server: RegistryServer, pulling_box: Box) -> None:
    parts = [gguf_files.part(number, 2) for number in (1, 2)]
    names = [gguf_files.part_name("m-Q4_0", number, 2) for number in (1, 2)]
    server.add_hub("ann/split", dict(zip(names, parts, strict=True)))
    pull(pulling_box, "hf.co/ann/split:Q4_0")
    assert "hf.co/ann/split:Q4_0" in models(pulling_box)


def test_a_file_of_this_machine_is_served_where_it_is(pulling_box: Box, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "mine:1b.gguf"
    file.parent.mkdir()
    file.write_bytes(SMALL)
    assert str(file) in pull(pulling_box, str(file)).stdout
    assert "mine:1b" in models(pulling_box)
    (link,) = (pulling_box.home / "models").glob("*.gguf")
    assert link.is_symlink() and link.resolve() == file
    assert "already" in pull(pulling_box, str(file)).stdout
    damaged = file.with_name("bad.gguf")
    damaged.write_bytes(SMALL[:40])
    done = pull(pulling_box, str(damaged), check=False)
    assert done.returncode == 1 and "incomplete" in done.stderr
    assert list((pulling_box.home / "models").glob("*.gguf")) == [link]


def test_whoever_asks_for_a_pull_that_runs_watches_it(
    server: RegistryServer, pulling_box: Box
) -> None:
    server.add_ollama("library/tiny:1b", SMALL)
    server.faults.pause = threading.Event()
    results: list[list[dict[str, Any]]] = []

    def watch() -> None:
        results.append(lines(pulling_box, model="tiny:1b"))

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    watchers[0].start()
    wait_until(lambda: bool(server.ranges), "the download has begun")
    for watcher in watchers[1:]:
        watcher.start()
    wait_until(
        lambda: server.requests["/v2/library/tiny/manifests/1b"] == 1, "no other has looked it up"
    )
    server.faults.pause.set()
    for watcher in watchers:
        watcher.join(120)
    assert [result[-1]["state"] for result in results] == ["done"] * 3
    assert sum(text.startswith("bytes=0-") for text in server.ranges) == 1


def test_ctrl_c_stops_the_download_and_the_next_pull_goes_on(
    server: RegistryServer, pulling_box: Box
) -> None:
    server.add_ollama("library/tiny:1b", SMALL)
    server.faults.pause = threading.Event()
    command = [*PINAIVU, "pull", "tiny:1b", "--home", str(pulling_box.home)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    notes = pulling_box.home / "models/.partial" / f"{SMALL_DIGEST}.pieces"
    wait_until(lambda: notes.exists() and notes.stat().st_size > 0, "a piece is here")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert "tiny:1b" not in models(pulling_box)
    server.faults.pause.set()
    server.faults.pause = None
    pulling_box.kill()  # and nothing that came is lost
    pulling_box.start()
    server.ranges.clear()
    pull(pulling_box, "tiny:1b")
    assert "tiny:1b" in models(pulling_box)
    assert not any(text.startswith("bytes=0-") for text in server.ranges)


def test_a_wrong_byte_is_said_and_the_model_is_not_served(
    server: RegistryServer, pulling_box: Box
) -> None:
    server.add_ollama("library/tiny:1b", SMALL)
    server.faults.wrong_bytes = True
    done = pull(pulling_box, "tiny:1b", check=False)
    assert done.returncode == 1 and "another file than its digest" in done.stderr
    assert "tiny:1b" not in models(pulling_box)


@pytest.mark.parametrize(
    "name, words",
    [
        ("none:1b", "has no model none:1b"),
        ("a b", "not the name of a model"),
        ("hf.co/ann/none", "has no model"),
        ("/nowhere/x.gguf", "no file /nowhere/x.gguf"),
    ],
)
def test_a_name_that_leads_nowhere_is_said_in_a_sentence(
    pulling_box: Box, name: str, words: str
) -> None:
    done = pull(pulling_box, name, check=False)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_file_does_not_take_a_name(server: RegistryServer, pulling_box: Box) -> None:
    server.add_ollama("library/tiny:1b", SMALL)
    pull(pulling_box, "tiny:1b")
    assert "already" in pull(pulling_box, "tiny:1b").stdout
    server.add_ollama("library/tiny:1b", gguf_files.valid(data=PIECE_BYTES))
    done = pull(pulling_box, "tiny:1b", check=False)
    assert done.returncode == 1 and "--as" in done.stderr
    pull(pulling_box, "tiny:1b", "--as", "other:1b")
    assert {"tiny:1b", "other:1b"} <= set(models(pulling_box))


def test_a_file_that_is_here_under_another_name_is_not_downloaded_again(
    server: RegistryServer, pulling_box: Box
) -> None:
    server.add_ollama("library/tiny:1b", SMALL)
    server.add_ollama("ann/copy:1b", SMALL, params='{"num_ctx": 77}')
    pull(pulling_box, "tiny:1b")
    server.ranges.clear()
    assert "serves it as ann/copy:1b too" in pull(pulling_box, "ann/copy:1b").stdout
    assert not any(server.ranges)  # the parameters were read, whole, and nothing else
    (model,) = [
        model
        for model in pulling_box.http("GET", "/v1/admin/models").json()["data"]
        if model["id"] == "ann/copy:1b"
    ]
    assert model["context"] == 77  # its own record came along


def test_a_digest_that_is_not_the_registrys_is_refused(
    server: RegistryServer, pulling_box: Box
) -> None:
    server.add_ollama("library/tiny:1b", SMALL)
    done = pull(pulling_box, "tiny:1b", "--digest", "0123456789", check=False)
    assert done.returncode == 1 and "another file than --digest" in done.stderr
    assert server.ranges == []
    pull(pulling_box, "tiny:1b", "--digest", SMALL_DIGEST[:12])
    assert "tiny:1b" in models(pulling_box)


def test_models_that_are_known_to_work_can_be_searched(tmp_path: Path) -> None:
    found = run_command_json("search", "llama3.2", home=tmp_path)
    assert [model["name"] for model in found] == ["llama3.2:1b", "llama3.2:3b"]
    assert all(model["memory"] > model["size"] for model in found)
    assert "llama3.2:3b" in run_command("search", home=tmp_path).stdout


def test_a_known_model_that_is_not_here_can_be_pulled(fake_box: Box) -> None:
    done = fake_box.chat(model="llama3.2:3b")
    assert done.status_code == 404
    assert "'pinaivu pull llama3.2:3b'" in done.json()["error"]["message"]
