"""Receipts with proofs that a log has them: what both verifiers say, and what their user may ask.

`tests/test_tampered_receipts.py` changes each byte of one; the files are in `tests/vectors`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pinaivu_box.log import checkpoint
from pinaivu_box.receipts.verify import LogPolicy, VerificationCheck, verify_receipt
from pinaivu_box.witness.cosigning import cosigned_by
from tests.support import log_vectors, receipt_vectors, third_verifier
from tests.support.both_verifiers import by_page
from tests.support.in_process_command import run_command
from tests.support.javascript import Scripts
from tests.support.keys import known_identity
from tests.support.log_vectors import WITNESSES, document, entry_proof_of
from tests.support.receipt_mutations import spoiled

STRANGER = known_identity(7)
KEYS = [witness.node_id.removeprefix("node_") for witness in WITNESSES]
IN_LOG = document(entry_proof_of(3, 7, WITNESSES))
IN_NO_LOG = document(None)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    return Scripts(tmp_path_factory.mktemp("scripts"))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "receipt.json"
    path.write_bytes(IN_LOG)
    yield path


def of_log(checks: list[VerificationCheck]) -> list[VerificationCheck]:
    """The checks that are about the log."""
    names = ("log", "inclusion", "checkpoint signature", "witnesses")
    return [check for check in checks if check.name in names]


def verify(file: Path, *options: str, status: int = 0) -> str:
    done = run_command("receipts", "verify", str(file), *options, home=None, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_checks_say_where_the_receipt_is_and_who_saw_it() -> None:
    included, signed, seen = of_log(verify_receipt(IN_LOG))
    own = receipt_vectors.OWN.node_id
    assert included.meaning == "it is entry 3 (the first is 0) of the 7 of this checkpoint"
    assert signed.meaning == f"{own} signed that its log {log_vectors.ORIGIN} had these 7 entries"
    assert seen.meaning.startswith("3 witnesses cosigned it")
    for number, witness in enumerate(WITNESSES):
        assert f"{witness.node_id} at 2026-11-30T15:00:1{5 + number}.000Z" in seen.meaning


def test_a_receipt_in_no_log_verifies_unless_a_log_is_asked_for() -> None:
    (check,) = of_log(verify_receipt(IN_NO_LOG))
    assert check.ok and "without a proof" in check.meaning
    for policy in (LogPolicy(required=True), LogPolicy(witnesses=(KEYS[0],))):
        assert [c.name for c in verify_receipt(IN_NO_LOG, log=policy) if not c.ok] == ["log"]


def test_three_verifiers_judge_spoiled_proofs_alike(scripts: Scripts) -> None:
    """The two of the program in the same words, and the one that was written from the page."""
    chance = random.Random(27)
    right = [entry_proof_of(3, 7, WITNESSES), entry_proof_of(0, 1), entry_proof_of(8, 9)]
    texts = [spoiled(str(chance.choice(right)), chance) for _ in range(400)]
    documents = [document(text) for text in texts if text not in map(str, right)]
    for data, page in zip(documents, by_page(scripts, documents), strict=True):
        checks = verify_receipt(data)
        assert page == checks, data
        assert third_verifier.verdicts(data) == [(check.name, check.ok) for check in checks], data
        assert not all(check.ok for check in checks), data


POLICIES = {
    "a log": (LogPolicy(required=True), True),
    "one of them": (LogPolicy(witnesses=(KEYS[1],)), True),
    "all of them": (LogPolicy(witnesses=tuple(KEYS)), True),
    "a stranger": (LogPolicy(witnesses=(STRANGER.node_id,)), False),
    "one of them and a stranger": (LogPolicy(witnesses=(KEYS[0], STRANGER.node_id)), False),
    "one of two": (LogPolicy(witnesses=(KEYS[0], STRANGER.node_id), quorum=1), True),
    "two of three": (LogPolicy(witnesses=(*KEYS[:2], STRANGER.node_id), quorum=2), True),
    "one twice": (LogPolicy(witnesses=(KEYS[0], f"node_{KEYS[0]}"), quorum=2), False),
    "one in capitals": (LogPolicy(witnesses=(KEYS[0].upper(),)), True),
    "the box itself": (LogPolicy(witnesses=(receipt_vectors.OWN.node_id,)), False),
}


@pytest.mark.parametrize("asked", POLICIES)
def test_named_witnesses_are_needed(scripts: Scripts, asked: str) -> None:
    policy, holds = POLICIES[asked]
    checks = verify_receipt(IN_LOG, log=policy)
    assert [check.name for check in checks if not check.ok] == ([] if holds else ["witnesses"])
    assert by_page(scripts, [IN_LOG], log=policy) == [checks]


def test_both_verifiers_ask_the_same_of_a_receipt_in_no_log(scripts: Scripts) -> None:
    for policy in (LogPolicy(), LogPolicy(required=True), LogPolicy(witnesses=(KEYS[0],))):
        (checks,) = by_page(scripts, [IN_NO_LOG], log=policy)
        assert checks == verify_receipt(IN_NO_LOG, log=policy)


def test_the_right_vectors_have_every_check() -> None:
    expected = json.loads(receipt_vectors.EXPECTED.read_text())
    right = [name for name in expected if name.startswith("log_") and not expected[name]]
    for name in right:
        checks = of_log(verify_receipt((receipt_vectors.FOLDER / f"{name}.json").read_bytes()))
        assert len(checks) == (1 if name == "log_none" else 3)
    assert len(right) >= 15


def test_the_command_names_the_witnesses(file: Path) -> None:
    told = verify(file, "--require-log")
    for witness in WITNESSES:
        assert witness.node_id in told
    told = verify(file, "--witness", KEYS[0], "--witness", f"node_{KEYS[1]}")
    assert "2 of the 2 that you named, of whom 2 are needed" in told


def test_the_command_fails_without_the_witnesses_that_were_named(file: Path) -> None:
    stranger = STRANGER.node_id
    told = verify(file, "--witness", KEYS[0], "--witness", stranger, status=1)
    assert "FAILED witnesses: 1 of the 2 that you named" in told
    verify(file, "--witness", KEYS[0], "--witness", stranger, "--quorum", "1")


def test_the_command_fails_without_a_log_that_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    file.write_bytes(IN_NO_LOG)
    assert "without a proof that its box's log has it" in verify(file)
    assert "FAILED log" in verify(file, "--require-log", status=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--witness", "abc"], "--witness: 'abc' is not a node key"),
        (["--quorum", "1"], "--quorum: 1 of 0 witnesses"),
        (["--witness", KEYS[0], "--quorum", "2"], "--quorum: 2 of 1 witnesses"),
        (["--witness", KEYS[0], "--quorum", "0"], "0 is not in the range"),
    ],
)
def test_wrong_options_are_refused(file: Path, options: list[str], said: str) -> None:
    assert said in verify(file, *options, status=2)


@pytest.mark.parametrize("asked", ["a member", "a URL"])
def test_no_witness_can_spoil_the_receipts_of_a_box(asked: str) -> None:
    """What a box keeps of the answer of a witness is what verifiers accept."""
    witness, note = WITNESSES[0], entry_proof_of(3, 7).note
    name = witness.node_id if asked == "a member" else "https://witness.example"
    right = checkpoint.cosign(witness, note.text, log_vectors.SEEN_AT)
    late = checkpoint.cosign(witness, note.text, log_vectors.LAST_SECOND + 1)
    of_the_box = checkpoint.cosign(receipt_vectors.OWN, note.text, log_vectors.SEEN_AT)
    other_key = right._replace(key_id=b"none")
    foreign = right._replace(name="witness.example/w1")
    for line in (late, of_the_box, other_key, foreign, right._replace(signature=late.signature)):
        assert cosigned_by(name, line.line, note) is None
    for lines in ([right], [other_key, right], [foreign, right, other_key]):
        kept = cosigned_by(name, "".join(each.line for each in lines), note)
        assert kept is not None
        proof = msgspec.structs.replace(entry_proof_of(3, 7), note=kept)
        assert all(check.ok for check in verify_receipt(document(proof)))


@pytest.mark.parametrize("command", ["verify", "audit", "transcript", "evidence"])
def test_a_name_that_no_file_can_have(command: str, tmp_path: Path) -> None:
    done = run_command("receipts", command, "req_" + "a" * 5000, home=tmp_path, check=False)
    assert done.returncode == 1 and "cannot be read: File name too long." in done.stderr
