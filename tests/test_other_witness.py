"""The log of a box is cosigned by a witness that is no box: a program that was written from C2SP
tlog-witness alone, which knows nothing of restarts, links and monitoring at the same address."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.note import NoteError
from pinaivu_box.peering_config import WitnessConfig, check_witness
from pinaivu_box.receipts.verify import LogPolicy, verify_receipt
from tests.support.c2sp_witness import C2spWitness, served
from tests.support.process_box import Box, wait_until

FAKE = ("--model", "fake:1=fake:0")
NAME = "witness.example.org/w1"


@pytest.fixture
def witness() -> Iterator[C2spWitness]:
    with served(C2spWitness(NAME, {})) as found:
        yield found


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Callable[[str], Box]]:
    """Starts a box whose witnesses are these entries of `[witness] urls`."""
    made: list[Box] = []

    def start(*urls: str) -> Box:
        file = tmp_path / "log.toml"
        file.write_text(f"[witness]\nurls = {json.dumps(urls)}\n")
        box = Box(tmp_path / "log", "--config", str(file), *FAKE)
        box.start()
        made.append(box)
        return box

    yield start
    for box in made:
        box.stop()


def ask(box: Box) -> str:
    """A request, whose receipt is in the log; its id."""
    body = {"model": "fake:1", "messages": [{"role": "user", "content": "hi"}]}
    made: Any = box.http("POST", "/v1/chat/completions", json=body).json()
    return str(made["request_id"])


def trust(box: Box, witness: C2spWitness) -> str:
    """As its operator does, who is told the key of the log; the log's origin."""
    shown: Any = box.http("GET", "/v1/log").json()
    name, _, encoded = shown["vkey"].split("+", 2)
    witness.logs[name] = base64.b64decode(encoded)[1:]
    return str(shown["origin"])


def proof(box: Box, request_id: str) -> str:
    return box.http("GET", f"/v1/log/proof/{request_id}").text


def cosigned(box: Box, witness: C2spWitness, request_id: str) -> str:
    """Waits until the proof of a receipt has the witness's cosignature, which is verified without
    the package; the proof."""
    wait_until(lambda: f" {NAME} " in proof(box, request_id), "it is cosigned")
    text = proof(box, request_id)
    signed = text.split("\n\n", 1)[1]
    lines = [line for line in signed.splitlines() if line.startswith(f"\u2014 {NAME} ")]
    assert len(lines) == 1  # and not the one of a key that the box does not know
    body = signed.split("\n\n")[0] + "\n"
    data = base64.b64decode(lines[0].split(" ")[2])
    time, signature = int.from_bytes(data[4:12], "big"), data[12:]
    message = f"cosignature/v1\ntime {time}\n{body}".encode()
    witness.key.verify_key.verify(message, signature)
    return text


def test_it_cosigns_a_log_that_grows(witness: C2spWitness, log: Callable[..., Box]) -> None:
    box = log(f"{witness.vkey} {witness.url}/")
    first = ask(box)
    wait_until(lambda: 404 in witness.answered, "it refuses a log that it does not know")
    origin = trust(box, witness)
    assert box.http("POST", "/v1/admin/reload").status_code == 200
    cosigned(box, witness, first)
    size, _ = witness.last[origin]
    again = [ask(box) for _ in range(5)][-1]
    cosigned(box, witness, again)
    assert witness.last[origin][0] == size + 5  # by a proof of consistency
    # It has lost what it knew, or was asked by somebody else: the box learns its size from it.
    witness.last.clear()
    later = ask(box)
    cosigned(box, witness, later)
    assert 409 in witness.answered

    # Who reads the checkpoint by the standard sees it; a receipt has only what its verifiers know.
    assert f" {NAME} " in box.http("GET", "/v1/log/checkpoint").text
    receipt = box.http("GET", f"/v1/receipts/{later}").content
    assert NAME not in receipt.decode()
    assert all(check.ok for check in verify_receipt(receipt, log=LogPolicy(required=True)))


def test_a_cosignature_by_another_key_is_not_kept(
    witness: C2spWitness, log: Callable[..., Box]
) -> None:
    other = C2spWitness(f"{NAME}x", {})
    other.name = NAME  # the same name, another key
    box = log(f"{other.vkey} {witness.url}")
    trust(box, witness)
    request_id = ask(box)
    wait_until(lambda: 200 in witness.answered, "it has cosigned")
    wait_until(lambda: "is not its cosignature" in box.errors, "the operator is told")
    assert NAME not in proof(box, request_id)


@pytest.mark.parametrize("kind", [0x01, 0x06])
def test_a_key_of_another_type_is_none_of_a_witness(kind: int) -> None:
    key = C2spWitness(NAME, {}).vkey
    assert note.read_key(key, note.COSIGNATURE).text == key
    name, _, encoded = key.split("+", 2)
    data = bytes([kind]) + base64.b64decode(encoded)[1:]
    changed = note.NoteKey(name, data[1:], kind).text
    for wrong in (changed, key.replace("w1", "w2"), f"{key}AAAA", name):
        with pytest.raises(NoteError):
            note.read_key(wrong, note.COSIGNATURE)


@pytest.mark.parametrize(
    "text",
    [
        "witness.example.org+12345678+QUJD https://witness.example.org",
        "key https://witness.example.org",
        " https://witness.example.org",
        "https://witness.example.org witness.example.org+12345678+" + "A" * 44,
        "witness.example.org+12345678+" + "A" * 44,
    ],
)
def test_what_is_no_key_and_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"witness\.urls has"):
        check_witness(WitnessConfig(urls=(text,)))


def test_a_time_of_0_is_none() -> None:
    witness = C2spWitness(NAME, {})
    key = note.read_key(witness.vkey, note.COSIGNATURE)
    text = checkpoint.Checkpoint("example.com/log", 1, bytes(32)).text
    for time, right in ((0, False), (1, True)):
        signature = witness.key.sign(f"cosignature/v1\ntime {time}\n{text}".encode()).signature
        line = note.NoteSignature(key.name, key.id, time.to_bytes(8, "big") + signature)
        assert bool(checkpoint.cosignature_by(note.Note(text, (line,)), key)) is right
