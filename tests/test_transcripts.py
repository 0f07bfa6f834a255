"""Transcripts: what is kept of a request for its audit, for whom, and how long."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.public import PrivateKey

from pinaivu_box.config import RetentionConfig
from pinaivu_box.errors import Unreadable
from pinaivu_box.gateway.backend import UpstreamModel, asked_text
from pinaivu_box.gateway.records import RequestRecord
from pinaivu_box.gateway.transcripts import to_store, transcript_of
from pinaivu_box.receipts import commitment, transcript_sealing
from pinaivu_box.receipts import transcript as transcripts
from pinaivu_box.receipts.receipt import ReceiptView, SignedProof
from pinaivu_box.receipts.transcript import RequestTranscript
from pinaivu_box.receipts.verify import read_statement
from pinaivu_box.store import keys, retention
from pinaivu_box.store import transcripts as stored
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms
from pinaivu_box.store.transcripts import StoredTranscript
from tests.support import audited_legs
from tests.support.fake_model import FAKE, fake_text
from tests.support.in_process_command import run_command, run_command_json
from tests.support.keys import IDENTITIES
from tests.support.pages import PASSWORD, logged_in, make_account
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.unlogged import unlogged

SECRET, OTHER = "sk-pnv-" + "a" * 44, "sk-pnv-" + "b" * 44
WORD = "Wolpertinger"


# -- sealing -------------------------------------------------------------------------------------


def test_the_key_is_derived_as_rfc_5869_says() -> None:
    info = b"pinaivu/transcript-key/v1"
    derived = HKDF(SHA256(), length=32, salt=None, info=info).derive(SECRET.encode())
    assert transcript_sealing.public_half(SECRET) == bytes(PrivateKey(derived).public_key)
    assert transcript_sealing.hkdf_sha256(SECRET.encode(), info) == derived


def test_only_the_secret_opens_what_is_sealed() -> None:
    sealed = transcript_sealing.seal(b"words", transcript_sealing.public_half(SECRET))
    assert transcript_sealing.open_sealed(sealed, SECRET) == b"words"
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for wrong, secret in ((sealed, OTHER), (changed, SECRET), (b"", SECRET)):
        with pytest.raises(Unreadable):
            transcript_sealing.open_sealed(wrong, secret)


# -- what is in one ------------------------------------------------------------------------------


def lost_and_gone_on(record: RequestRecord) -> RequestRecord:
    """With another leg of the first choice."""
    first = record.choices[0]
    job = dataclasses.replace(first.job, leg=1, output=first.tokens)
    first.legs.append(audited_legs.leg(IDENTITIES[1], job, "And so on."))
    return record


def test_all_legs_of_all_choices_are_in_it() -> None:
    record = lost_and_gone_on(audited_legs.request(IDENTITIES[0], legs=2))
    transcript = transcript_of(record)
    assert transcript is not None
    assert [(one.choice, one.leg, one.text) for one in transcript.legs] == [
        (0, 0, "A spotted answer."), (0, 1, "And so on."), (1, 0, "A spotted answer.")
    ]  # fmt: skip
    assert len(transcript.prompts) == 1  # choices share it
    for leg in record.served:
        assert leg.proved is not None
        tokens = leg.prompt or []
        _, opening = commitment.commit(asked_text(leg.job), tokens, leg.job.nonce)
        proof, output = leg.proved.proof, leg.proved.opening
        assert transcripts.mismatch(transcript, proof, opening, output) == ""
        assert transcripts.mismatch(transcript, proof, output, opening) != ""


def test_nothing_is_kept_of_what_nobody_can_audit() -> None:
    key = audited_legs.key()
    plain = audited_legs.request(IDENTITIES[0])
    assert to_store(plain, key, "plain") is not None and to_store(plain, key, "none") is None
    image = audited_legs.request(IDENTITIES[0], images={"00": b"GIF"})
    vectors = audited_legs.request(IDENTITIES[0], inputs=["a text"])
    upstream = audited_legs.request(IDENTITIES[0])
    (leg,) = upstream.served
    leg.started = dataclasses.replace(leg.started, upstream=UpstreamModel("gpu", "m"))
    for record in (image, vectors, upstream):
        assert to_store(record, key, "plain") is None and to_store(record, key, "sealed") is None


# -- a box that keeps them -----------------------------------------------------------------------


def kept(box: Box, request_id: str, key: str | None = None) -> dict[str, Any]:
    answer = box.http("GET", f"/v1/receipts/{request_id}/transcript", key=key)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def asked(box: Box, text: str, key: str | None = None, **more: Any) -> dict[str, Any]:
    body = {"model": FAKE, "messages": [{"role": "user", "content": text}], "max_tokens": 5}
    answer = box.http("POST", "/v1/chat/completions", json={**body, **more}, key=key)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def opens_commitments(box: Box, transcript: RequestTranscript, key: str | None = None) -> bool:
    """Of every leg of its receipt."""
    document = box.http("GET", f"/v1/receipts/{transcript.request_id}", key=key).content
    view = msgspec.json.decode(document, type=ReceiptView)
    signed = msgspec.json.decode(view.signed_receipt)["proofs"]
    proofs = [read_statement(msgspec.convert(one, SignedProof)) for one in signed]
    assert view.opening is not None and proofs
    openings = transcripts.openings_of(view.opening, proofs)
    return not any(
        transcripts.mismatch(transcript, proof, *pair)
        for proof, pair in zip(proofs, openings, strict=True)
    )


def files_with(home: Path, *words: str) -> list[str]:
    """The files of the database that contain one of the words."""
    data = {path.name: path.read_bytes() for path in home.glob("pinaivu.db*")}
    assert data
    return [name for name, content in data.items() if any(w.encode() in content for w in words)]


def count(home: Path) -> int:
    with closing(sqlite3.connect(home / "pinaivu.db")) as database:
        return int(database.execute("SELECT count(*) FROM transcripts").fetchone()[0])


@pytest.fixture(scope="module")
def plain(module_box: StartBox) -> Box:
    return module_box("--model", f"{FAKE}=fake:1", config='[receipts]\ntranscripts = "plain"\n')


@pytest.fixture(scope="module")
def sealed(module_box: StartBox) -> Box:
    return module_box("--model", f"{FAKE}=fake:1", config='[receipts]\ntranscripts = "sealed"\n')


def test_none_is_kept_unless_the_configuration_says_so(fake_box: Box) -> None:
    request_id = asked(fake_box, WORD)["request_id"]
    path = f"/v1/receipts/{request_id}/transcript"
    answer = fake_box.http("GET", path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "transcript_not_found"
    assert files_with(fake_box.home, WORD) == []
    refused = run_command("receipts", "transcript", request_id, home=fake_box.home, check=False)
    assert refused.returncode == 1 and "There is no transcript" in refused.stderr


def test_a_plain_one_has_all_that_the_receipt_commits_to(plain: Box) -> None:
    answer = asked(plain, WORD, n=2, stop=["zebra"], reasoning_effort="low")
    view = kept(plain, answer["request_id"])
    assert view["sealed"] is None and view["object"] == "transcript"
    transcript = msgspec.convert(view["transcript"], RequestTranscript)
    assert opens_commitments(plain, transcript)
    (prompt,) = transcript.prompts
    assert json.loads(prompt.asked) == {
        "messages": [{"role": "user", "content": WORD}], "stop": ["zebra"]
    }  # fmt: skip
    said = fake_text(len(prompt.tokens), 5)
    assert [(leg.choice, leg.leg, leg.text) for leg in transcript.legs] == [
        (0, 0, said), (1, 0, said)
    ]  # fmt: skip
    assert transcript.template == {"enable_thinking": True, "reasoning_effort": "low"}
    printed = run_command_json("receipts", "transcript", answer["request_id"], home=plain.home)
    assert printed == view["transcript"]


def test_one_that_was_changed_opens_no_commitment(plain: Box) -> None:
    answer = asked(plain, WORD)
    transcript = msgspec.convert(kept(plain, answer["request_id"])["transcript"], RequestTranscript)
    (prompt,), (leg,) = transcript.prompts, transcript.legs
    replace = msgspec.structs.replace
    for changed in (
        replace(transcript, prompts=[replace(prompt, asked=prompt.asked + " ")]),
        replace(transcript, prompts=[replace(prompt, tokens=[*prompt.tokens, 1])]),
        replace(transcript, legs=[replace(leg, tokens=leg.tokens[:-1])]),
        replace(transcript, legs=[replace(leg, text=leg.text + ".")]),
        replace(transcript, legs=[replace(leg, leg=1)]),
        replace(transcript, prompts=[]),
    ):
        assert not opens_commitments(plain, changed)
    assert opens_commitments(plain, transcript)


def test_grammars_and_tools_are_in_it(plain: Box) -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    answer = asked(plain, WORD, tools=[{"type": "function", "function": function}])
    transcript = msgspec.convert(kept(plain, answer["request_id"])["transcript"], RequestTranscript)
    assert transcript.tools is not None and transcript.tools.names == ["f"]
    assert opens_commitments(plain, transcript)


def test_vectors_have_none(plain: Box) -> None:
    body = {"model": FAKE, "input": "words"}
    answer = plain.http("POST", "/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    path = f"/v1/receipts/{answer.json()['request_id']}/transcript"
    assert plain.http("GET", path).status_code == 404


def test_it_is_for_the_account_alone(plain: Box) -> None:
    owner, other = (run_command_json("keys", "create", home=plain.home)["key"] for _ in range(2))
    request_id = asked(plain, WORD, owner)["request_id"]
    path = f"/v1/receipts/{request_id}/transcript"
    assert plain.http("GET", path, key=owner).status_code == 200
    # The first key of a box is an admin's: that is no reason to read what others have said.
    for key in (other, plain.key):
        assert plain.http("GET", path, key=key).status_code == 404
    narrow = run_command_json("keys", "create", "--scope", "inference", home=plain.home)["key"]
    assert plain.http("GET", path, key=narrow).status_code == 403


def test_chats_of_the_pages_have_none(plain: Box) -> None:
    make_account(plain.home, "ada")
    before = count(plain.home)
    with logged_in(plain.url, "ada", PASSWORD) as ada:
        made = ada.post("/v1/conversations", json={"model": FAKE})
        path = f"/v1/conversations/{made.json()['id']}/answers"
        with ada.stream("POST", path, json={"content": "Schwurbelwort"}) as answer:
            assert answer.status_code == 200 and answer.read()
    assert count(plain.home) == before
    assert files_with(plain.home, "Schwurbelwort") == []


def test_a_receipt_is_verified_with_its_transcript(plain: Box, tmp_path: Path) -> None:
    answer = asked(plain, WORD, n=2)
    receipt, file = tmp_path / "receipt.json", tmp_path / "transcript.json"
    request_id = answer["request_id"]
    receipt.write_bytes(plain.http("GET", f"/v1/receipts/{request_id}").content)
    view = kept(plain, request_id)
    file.write_text(json.dumps(view))
    command = ("receipts", "verify", str(receipt), "--require-log", "--json", "--transcript")
    checks = json.loads(run_command(*command, str(file), home=tmp_path / "none").stdout)
    found = {check["name"]: check for check in checks}
    assert all(check["ok"] for check in checks)
    assert {"inclusion", "transcript 0", "transcript 1"} <= found.keys()
    assert "token by token" in found["transcript 1"]["meaning"]
    by_id = run_command("receipts", "verify", request_id, "--transcript", request_id,
                        home=plain.home).stdout  # fmt: skip
    assert "ok     transcript 1:" in by_id

    view["transcript"]["legs"][1]["tokens"][0] += 1
    file.write_text(json.dumps(view))
    refused = run_command(*command, str(file), home=tmp_path / "none", check=False)
    assert refused.returncode == 1
    failed = [check["name"] for check in json.loads(refused.stdout) if not check["ok"]]
    assert failed == ["transcript 1"]

    shown = json.loads(receipt.read_bytes())
    del shown["opening"]
    receipt.write_text(json.dumps(shown))
    refused = run_command(*command, str(file), home=tmp_path / "none", check=False)
    assert "the receipt has no openings for its legs: ask the key's owner" in refused.stdout


def test_a_sealed_one_is_opened_by_the_secret_alone(sealed: Box, tmp_path: Path) -> None:
    made = run_command_json("keys", "create", home=sealed.home)
    answer = asked(sealed, WORD, made["key"])
    text = answer["choices"][0]["message"]["content"]
    view = kept(sealed, answer["request_id"], made["key"])
    assert view["transcript"] is None
    assert view["sealed_to"] == transcript_sealing.public_half(made["key"]).hex()
    assert files_with(sealed.home, WORD, text) == []
    # The command opens it with the key from a file or from the environment, in any place.
    command = ("receipts", "transcript", answer["request_id"])
    refused = run_command(*command, home=sealed.home, check=False)
    assert refused.returncode == 1 and "is sealed" in refused.stderr
    file, wrong = tmp_path / "key", tmp_path / "other"
    for path, secret in ((file, made["key"]), (wrong, sealed.key)):
        path.write_text(secret + "\n")
        path.chmod(0o600)
    opened = run_command(*command, "--key-file", str(file), home=sealed.home)
    transcript = msgspec.json.decode(opened.stdout, type=RequestTranscript)
    assert WORD in transcript.prompts[0].asked and transcript.legs[0].text == text
    assert opens_commitments(sealed, transcript, made["key"])
    document = tmp_path / "transcript.json"
    document.write_text(json.dumps(view))
    by_variable = run_command(
        "receipts", "transcript", str(document), home=tmp_path / "none",
        env={"PINAIVU_API_KEY": made["key"]},
    )  # fmt: skip
    assert by_variable.stdout == opened.stdout
    refused = run_command(*command, "--key-file", str(wrong), home=sealed.home, check=False)
    assert refused.returncode == 1 and "not sealed to this key" in refused.stderr
    file.chmod(0o644)
    refused = run_command(*command, "--key-file", str(file), home=sealed.home, check=False)
    assert refused.returncode == 1 and "chmod 600" in refused.stderr


def test_after_a_rotation_older_ones_need_the_older_secret(sealed: Box) -> None:
    made = run_command_json("keys", "create", home=sealed.home)
    before = asked(sealed, WORD, made["key"])["request_id"]
    rotated = run_command_json("keys", "rotate", made["id"], home=sealed.home)["key"]
    # In the overlap of the rotation the old secret is still accepted, and nothing is sealed to it.
    ids = [
        before,
        *(asked(sealed, WORD, secret)["request_id"] for secret in (made["key"], rotated)),
    ]
    for request_id, secret in zip(ids, (made["key"], rotated, rotated), strict=True):
        for key in (made["key"], rotated):
            done = run_command(
                "receipts", "transcript", request_id, home=sealed.home, check=False,
                env={"PINAIVU_API_KEY": key},
            )  # fmt: skip
            assert (done.returncode == 0) == (key == secret)


def test_a_key_of_an_earlier_version_gets_its_public_half_when_it_is_used(sealed: Box) -> None:
    made = run_command_json("keys", "create", home=sealed.home)
    with closing(sqlite3.connect(sealed.home / "pinaivu.db")) as database:
        with database:
            database.execute("UPDATE keys SET transcript_key = NULL WHERE id = ?", (made["id"],))
        expected = transcript_sealing.public_half(made["key"])
        view = kept(sealed, asked(sealed, WORD, made["key"])["request_id"], made["key"])
        assert view["sealed_to"] == expected.hex()
        select = "SELECT transcript_key FROM keys WHERE id = ?"
        wait_until(
            lambda: database.execute(select, (made["id"],)).fetchone() == (expected,),
            "the public half in the database",
        )


# -- how long they are kept ----------------------------------------------------------------------


def in_database(home: Path, work: Callable[[Database], Any]) -> Any:
    import asyncio

    async def run() -> Any:
        async with Database(home / "pinaivu.db") as database:
            return await work(database)

    return asyncio.run(run())


def test_retention_deletes_them_with_their_receipts(new_box: Callable[..., Box]) -> None:
    box = new_box("--model", f"{FAKE}=fake:1", config='[receipts]\ntranscripts = "plain"\n')
    old, new = (asked(box, WORD)["request_id"] for _ in range(2))
    box.stop()

    async def month_later(database: Database) -> None:
        aged = "UPDATE receipts SET created_at = 1000 WHERE request_id = ?"
        await database.write((aged, (old,)))
        policy = RetentionConfig(receipts="30d")
        await retention.apply(database, policy, now_ms(), unlogged)

    in_database(box.home, month_later)
    with closing(sqlite3.connect(box.home / "pinaivu.db")) as database:
        left = database.execute("SELECT request_id FROM transcripts").fetchall()
    assert left == [(new,)]


def test_an_erased_account_leaves_none(plain: Box) -> None:
    account = make_account(plain.home, "gerda")
    made = run_command_json("keys", "create", "--account", "gerda", home=plain.home)
    request_id = asked(plain, "Quastenflosser", made["key"])["request_id"]
    others = count(plain.home)
    assert files_with(plain.home, "Quastenflosser") != []
    done = run_command("accounts", "erase", "gerda", "--yes", home=plain.home)
    assert "1 transcripts" in done.stderr
    assert files_with(plain.home, "Quastenflosser") == []
    assert count(plain.home) == others - 1
    key = in_database(plain.home, lambda database: keys.get(database, made["id"]))
    assert key.account_id == account

    async def end_late(database: Database) -> None:
        """As a request does that ran meanwhile, or waited for its audit."""
        late = StoredTranscript(b"{}")
        for storing in (stored.storing, stored.storing_if_missing):
            await database.write(storing(request_id, late))

    in_database(plain.home, end_late)
    assert count(plain.home) == others - 1


def test_the_doctor_looks_at_all_of_them(plain: Box, tmp_path: Path) -> None:
    request_id = asked(plain, "The doctor reads this.")["request_id"]
    home = tmp_path / "home"
    home.mkdir()
    with (
        closing(sqlite3.connect(plain.home / "pinaivu.db")) as source,
        closing(sqlite3.connect(home / "pinaivu.db")) as target,
    ):
        source.backup(target)

    def looked_at() -> list[dict[str, Any]]:
        done = run_command("doctor", "--json", home=home, check=False, env={"PINAIVU_PORT": "0"})
        return [each for each in json.loads(done.stdout) if each["name"] == "transcripts"]

    (found,) = looked_at()
    assert found["state"] == "ok" and "in clear, which their receipts commit to" in found["found"]
    with closing(sqlite3.connect(home / "pinaivu.db", isolation_level=None)) as database:
        query = "SELECT body FROM transcripts WHERE request_id = ?"
        (body,) = database.execute(query, (request_id,)).fetchone()
        changed = "UPDATE transcripts SET body = ?, sealed_to = ? WHERE request_id = ?"
        for wrong, sealed_to, told in (
            (b"{", None, "cannot be read"),
            (body.replace(b"doctor", b"surgeon"), None, "not what its receipt commits to"),
            (body.replace(request_id.encode(), b"req_1"), None, "of another request"),
            (b"short", bytes(32), "in no way that can be opened"),
        ):
            database.execute(changed, (wrong, sealed_to, request_id))
            (found,) = looked_at()
            assert found["state"] == "failed" and found["todo"]
            assert request_id in found["found"] and told in found["found"]
        database.execute("DROP TRIGGER transcripts_go_with_receipts")
        database.execute("DELETE FROM receipts WHERE request_id = ?", (request_id,))
        (found,) = looked_at()
        assert f"{request_id} has no receipt" in found["found"]
