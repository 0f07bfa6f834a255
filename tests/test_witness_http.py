"""A real box as a witness over HTTP, with logs that are written by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.log import checkpoint, note
from tests.support.in_process_command import run_command, run_command_json
from tests.support.keys import known_identity
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.written_log import WrittenLog, cosignature_time

FAKE = ("--model", "fake:1=fake:0")
KNOWN, OTHER, STRANGER = (known_identity(number) for number in (201, 202, 203))
FOREIGN = "example.com/behind-the-sofa"
ADD = "/v1/witness/add-checkpoint"


def vkey(name: str, public: bytes) -> str:
    key = b"\x01" + public
    key_id = hashlib.sha256(name.encode() + b"\n" + key).hexdigest()[:8]
    return f"{name}+{key_id}+{base64.b64encode(key).decode()}"


CONFIG = "[witness]\nlogs = " + json.dumps(
    [KNOWN.node_id, vkey(FOREIGN, OTHER.signing_key.verify_key.encode())]
)


@pytest.fixture(scope="module")
def witness(module_box: StartBox) -> Box:
    return module_box(*FAKE, config=CONFIG)


def post(box: Box, body: str | bytes, **headers: str) -> httpx.Response:
    """As any log does: without a key."""
    return httpx.post(f"{box.url}{ADD}", content=body, headers=headers, timeout=60)


def get(box: Box, origin: str) -> httpx.Response:
    name = hashlib.sha256(origin.encode()).hexdigest()
    return httpx.get(f"{box.url}/v1/witness/{name}/checkpoint", timeout=60)


def node_key(box: Box) -> bytes:
    return bytes.fromhex(run_command_json("id", home=box.home)["node_id"].removeprefix("node_"))


def doctor_on_logs(box: Box) -> list[dict[str, str]]:
    done = run_command("doctor", "--json", home=box.home, check=False)
    return [check for check in json.loads(done.stdout) if check["name"] == "others' logs"]


def foreign(seed: str = "") -> WrittenLog:
    log = WrittenLog(OTHER.signing_key, seed=seed)
    log.origin = FOREIGN
    return log


def test_the_answers_are_those_of_the_specification(witness: Box) -> None:
    log = foreign().grow(5)
    assert get(witness, FOREIGN).status_code == 404  # nothing is cosigned yet
    added = post(witness, log.submission(0))
    assert added.status_code == 200 and added.headers["content-type"].startswith("text/plain")
    cosignature_time(added.text, node_key(witness), log.text())
    shown = get(witness, FOREIGN)
    assert shown.status_code == 200 and shown.text == log.note() + added.text
    assert post(witness, log.submission(3)).status_code == 409
    conflict = post(witness, log.grow(8).submission(0))
    assert (conflict.status_code, conflict.text) == (409, "5\n")
    assert conflict.headers["content-type"] == "text/x.tlog.size"
    assert post(witness, log.submission(5).replace("old 5", "old 9")).status_code == 400
    assert post(witness, log.submission(5, 7).replace(log.text(7), log.text(8))).status_code == 403
    assert post(witness, foreign("fork").grow(9).submission(5)).status_code == 422
    assert post(witness, WrittenLog(STRANGER.signing_key).grow(2).submission(0)).status_code == 404
    added = post(witness, log.submission(5))
    assert added.status_code == 200 and get(witness, FOREIGN).text == log.note() + added.text


def test_hostile_bodies_are_refused_and_bounded(witness: Box) -> None:
    log = WrittenLog(KNOWN.signing_key).grow(3)
    many = "".join(
        WrittenLog.line(f"n{number}", STRANGER.signing_key, log.text()) for number in range(300)
    )
    for body in (
        b"",
        b"\xff\xfe",
        b"old 0\n\n\x00\x01",
        log.submission(0).replace("\n3\n", "\n3\x1b[2J\n"),
        log.submission(0) + many,
        "old 0\n" + "A" * 60_000,
    ):
        refused = post(witness, body)
        assert refused.status_code == 400, refused.text
        assert refused.text.isascii() and "\x1b" not in refused.text
    assert post(witness, "old 0\n\n" + "x" * 200_000).status_code == 413
    assert httpx.get(f"{witness.url}/v1/witness/%0a/checkpoint", timeout=60).status_code == 404
    assert get(witness, log.origin).status_code == 404


def test_a_witness_is_asked_only_so_often(new_box: Callable[..., Box]) -> None:
    box = new_box(*FAKE, config=CONFIG)
    log = WrittenLog(KNOWN.signing_key).grow(1)
    body = log.submission(0)
    with httpx.Client(base_url=box.url, timeout=60) as client:
        found = {client.post(ADD, content="x").status_code for _ in range(2000)}
        assert found == {400, 429}
        refused = client.post(ADD, content=body)
        while refused.status_code == 429:
            assert refused.headers["retry-after"] == "1"
            refused = client.post(ADD, content=body)
    assert refused.status_code == 200


def test_evidence_is_listed_printed_and_dismissed(
    new_box: Callable[..., Box], tmp_path: Path
) -> None:
    box = new_box(*FAKE, config=CONFIG)
    post(box, WrittenLog(KNOWN.signing_key, seed="one").grow(7).submission(0))
    second = WrittenLog(KNOWN.signing_key, seed="two").grow(12)
    assert post(box, second.submission(7)).status_code == 422
    assert "two histories" in box.errors
    (alarm,) = run_command_json("receipts", "evidence", home=box.home)
    assert (alarm["kind"], alarm["node_id"]) == ("fork", KNOWN.node_id)
    assert [each["state"] for each in doctor_on_logs(box)] == ["failed"]
    document = run_command("receipts", "evidence", alarm["id"][:8], home=box.home).stdout
    file = tmp_path / "fork.json"
    file.write_text(document)
    verified = run_command("receipts", "evidence", str(file), home=tmp_path / "nowhere")
    assert verified.stdout.count(" ok ") == 4
    run_command("receipts", "evidence", alarm["id"], "--dismiss", home=box.home)
    (alarm,) = run_command_json("receipts", "evidence", home=box.home)
    assert alarm["dismissed"] and doctor_on_logs(box) == []
    for wrong in (["00"], ["abcdef00"], ["--dismiss"], [str(tmp_path / "none")]):
        refused = run_command("receipts", "evidence", *wrong, home=box.home, check=False)
        assert refused.returncode in (1, 2) and refused.stderr.count("\n") == 1


def test_kill_9_rolls_nothing_back(new_box: Callable[..., Box]) -> None:
    """What the witness has answered it still knows, and what it knows it can cosign further."""
    box = new_box(*FAKE, config=CONFIG)
    log = foreign().grow(400)
    answered = 0
    for _ in range(4):
        answered = _submit_until_killed(box, log, answered)
        box.start()
        kept = int(get(box, FOREIGN).text.split("\n")[1])
        # The last one may be on disk without an answer; never the other way round.
        assert answered <= kept <= answered + 1
        conflict = post(box, log.submission(0, kept))
        assert (conflict.status_code, conflict.text) == (409, f"{kept}\n")
        assert post(box, log.submission(kept, kept + 1)).status_code == 200
        answered = kept + 1
    assert answered > 4


def _submit_until_killed(box: Box, log: WrittenLog, size: int) -> int:
    """Submit entry by entry until nobody answers; returns the last size that was cosigned."""
    enough = threading.Event()

    def kill() -> None:
        enough.wait(60)
        box.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    first = size
    try:
        with httpx.Client(base_url=box.url, timeout=60) as client:
            while size < len(log.entries) - 10:
                answer = client.post(ADD, content=log.submission(size, size + 1))
                if answer.status_code == 200:
                    size += 1
                if size > first + 3:
                    enough.set()
    except httpx.TransportError:
        pass
    enough.set()
    killer.join()
    return size


def test_a_box_that_is_no_member_is_asked_over_http(
    new_box: Callable[..., Box], tmp_path: Path
) -> None:
    """Its cosignature comes to the log, is stored with the checkpoint and is in the receipt."""
    file = tmp_path / "log.toml"
    file.write_text("")
    box = Box(tmp_path / "log", "--config", str(file), *FAKE)
    try:
        box.start()
        node_id = "node_" + node_key(box).hex()
        witness = new_box(*FAKE, config=f'[witness]\nlogs = ["{node_id}"]\n')
        urls = ["http://127.0.0.1:9/none", f"{witness.url}/v1/witness"]
        file.write_text(f"[witness]\nurls = {json.dumps(urls)}\n")
        assert box.http("POST", "/v1/admin/reload").status_code == 200
        body = {"model": "fake:1", "messages": [{"role": "user", "content": "hi"}]}
        made: Any = box.http("POST", "/v1/chat/completions", json=body).json()
        path = f"/v1/log/proof/{made['request_id']}"
        name = "node_" + node_key(witness).hex()
        wait_until(
            lambda: f"pinaivu/witness/{name}" in box.http("GET", path).text, "it is cosigned"
        )
        signed = note.read(box.http("GET", path).text.split("\n\n", 1)[1])
        found = checkpoint.cosignature(signed, name)
        assert found is not None and found.node_id == name
        box.stop()
        for lost in box.home.glob("pinaivu.db*"):
            lost.unlink()
        (box.home / "log.checkpoint").unlink()
        box.key = ""
        box.start()
        box.http("POST", "/v1/chat/completions", json=body)

        def states_what_was() -> bool:
            shown: Any = box.http("GET", "/v1/log").json()
            said = shown["restart"] and json.loads(shown["restart"]["signed"])
            return (
                bool(said)
                and note.read(said["last_checkpoint"]).text == signed.text
                and f"pinaivu/witness/{name}" in shown["checkpoint"]
            )

        wait_until(states_what_was, "the lost log is named, and the new one is cosigned")
    finally:
        box.end()
