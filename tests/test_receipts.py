"""Receipts: who sees them, what they say, and that nothing in them can be changed unnoticed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rfc8785
from nacl.signing import SigningKey, VerifyKey

from pinaivu_box.identity import Identity
from pinaivu_box.receipts.commitment import prompt_text
from pinaivu_box.receipts.receipt import (
    PROOF_DOMAIN,
    RECEIPT_DOMAIN,
    Proof,
    Receipt,
    SignedProof,
    sign_proof,
    sign_receipt,
    view,
)
from pinaivu_box.receipts.verify import Transcript, VerificationCheck, verify_receipt
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import MODEL, Box
from tests.support.receipt_verifier import verify_offline

PARTS = [{"type": "text", "text": "Say hello"}, {"type": "text", "text": "."}]
MESSAGES = [
    {"role": "system", "content": "Answer briefly. Grüße! 🦊"},
    {"role": "user", "content": PARTS},
]


@dataclass
class Case:
    """One real request by the key `owner`, and the receipt as its owner got it."""

    box: Box
    owner: str
    other: str
    request: dict[str, Any]
    answer: dict[str, Any]
    document: bytes

    @property
    def request_id(self) -> str:
        return str(self.answer["request_id"])

    @property
    def text(self) -> str:
        return str(self.answer["choices"][0]["message"]["content"])

    @property
    def shown(self) -> dict[str, Any]:
        """A fresh copy of the document, to be changed."""
        return dict(json.loads(self.document))

    @property
    def signed(self) -> dict[str, Any]:
        return dict(json.loads(self.shown["signed_receipt"]))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    home = tmp_path_factory.mktemp("receipts") / "home"
    home.mkdir()
    (home / "config.toml").write_text('[pricing]\ncurrency = "EUR"\nper_1k_tokens = "0.5"\n')
    box = Box(home).start()
    owner, other = (run_command_json("keys", "create", home=home)["key"] for _ in range(2))
    request = {
        "model": MODEL, "messages": MESSAGES, "max_tokens": 12, "seed": 2**53 + 1,
        "temperature": 0.7, "stop": ["zebra", "lion"],
    }  # fmt: skip
    answer = box.http("POST", "/v1/chat/completions", key=owner, json=request).json()
    document = box.http("GET", f"/v1/receipts/{answer['request_id']}", key=owner).content
    yield Case(box, owner, other, request, answer, document)
    box.end()


def run(case: Case, tmp_path: Path, *args: str, document: bytes | None = None) -> Any:
    """Verify a document in a file, offline; checks that it leaves nothing behind."""
    file = tmp_path / "receipt.json"
    file.write_bytes(case.document if document is None else document)
    home = tmp_path / "empty"
    home.mkdir(exist_ok=True)
    done = verify_offline(str(file), *args, home=home)
    assert list(home.iterdir()) == []
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def failed(document: bytes | dict[str, Any], **more: Any) -> list[str]:
    """Names of the checks that a document does not pass."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return [check.name for check in checked(data, **more) if not check.ok]


def checked(document: bytes, **more: Any) -> list[VerificationCheck]:
    checks = verify_receipt(document, **more)
    assert checks
    return checks


# -- what the API serves -------------------------------------------------------------------------


def test_the_documented_fields_are_at_the_top(case: Case) -> None:
    shown = case.shown
    assert shown["request_id"] == case.answer["request_id"]
    assert re.fullmatch(r"node_[0-9a-f]{64}", shown["node_id"])
    assert shown["model"] == MODEL
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", shown["timestamp"])
    assert re.fullmatch(r"\d+(\.\d+)?", shown["payment_amount"])
    assert re.fullmatch(r"[0-9a-f]{128}", shown["coordinator_signature"])


def test_the_signature_can_be_checked_without_our_code(case: Case) -> None:
    """Ed25519 over the domain, a newline and the text that is shown, which is canonical JSON."""
    text = case.shown["signed_receipt"].encode()
    key = VerifyKey(bytes.fromhex(case.signed["coordinator_id"].removeprefix("node_")))
    signature = bytes.fromhex(case.shown["coordinator_signature"])
    key.verify(b"pinaivu/receipt/v1\n" + text, signature)
    assert rfc8785.dumps(json.loads(text)) == text
    (proof,) = case.signed["proofs"]
    inner = json.loads(proof["signed"])
    node = VerifyKey(bytes.fromhex(inner["node_id"].removeprefix("node_")))
    node.verify(b"pinaivu/proof/v1\n" + proof["signed"].encode(), bytes.fromhex(proof["signature"]))
    assert rfc8785.dumps(inner) == proof["signed"].encode()


def test_the_signed_receipt_says_what_happened(case: Case) -> None:
    signed, usage = case.signed, case.answer["usage"]
    for name in ("v", "model_digest", "currency", "routing", "prompt_commitment"):
        assert signed[name]
    assert signed["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert signed["usage"]["completion_tokens"] == usage["completion_tokens"]
    assert signed["currency"] == "EUR"
    assert float(signed["payment_amount"]) == pytest.approx(usage["total_tokens"] * 0.0005)


def test_the_proof_records_how_the_node_made_it(case: Case) -> None:
    proof = json.loads(case.signed["proofs"][0]["signed"])
    assert set(proof) >= {
        "v", "request_id", "leg", "node_id", "model", "model_digest", "engine", "sampling",
        "prompt_commitment", "output_commitment", "prompt_tokens", "completion_tokens",
        "cached_tokens", "finish_reason", "started_at", "ttft_ms", "duration_ms", "price",
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{64}", proof["model_digest"])
    assert proof["finish_reason"] == case.answer["choices"][0]["finish_reason"]
    sampling = proof["sampling"]
    assert sampling["temperature"] == 0.7
    assert int(sampling["seed"]) == 2**53 + 1
    assert sampling["max_tokens"] == 12
    assert {"top_p", "top_k", "min_p"} <= set(sampling)
    assert {"build", "device"} <= set(proof["engine"])


def test_the_seed_is_recorded_also_where_none_was_given(case: Case) -> None:
    """And with it the same text comes again."""
    body = {**case.request, "seed": None, "temperature": 1.5}

    def ask(**more: Any) -> tuple[str, int]:
        answer = case.box.http("POST", "/v1/chat/completions", json={**body, **more}).json()
        receipt = case.box.http("GET", f"/v1/receipts/{answer['request_id']}").json()
        proof = json.loads(json.loads(receipt["signed_receipt"])["proofs"][0]["signed"])
        return answer["choices"][0]["message"]["content"], int(proof["sampling"]["seed"])

    text, seed = ask()
    assert ask(seed=seed) == (text, seed)


def test_the_owner_and_an_admin_see_it_and_no_other_key(case: Case) -> None:
    path = f"/v1/receipts/{case.request_id}"
    assert case.box.http("GET", path, key=case.owner).status_code == 200
    assert case.box.http("GET", path, key="").status_code == 401
    hidden = case.box.http("GET", path, key=case.other)
    assert hidden.status_code == 404
    assert hidden.json()["error"]["code"] == "receipt_not_found"
    # It must not even be told from one that does not exist.
    other_id = case.request_id[:-4] + "zzzz"
    unknown = case.box.http("GET", f"/v1/receipts/{other_id}", key=case.other)
    assert unknown.text.replace(other_id, case.request_id) == hidden.text
    assert case.box.http("GET", f"/v1/receipts/{other_id}", key=case.owner).status_code == 404


def test_the_openings_are_for_the_owner_alone(case: Case) -> None:
    """An admin sees the receipt, not what would let a short prompt be guessed."""
    for_admin = case.box.http("GET", f"/v1/receipts/{case.request_id}").json()
    assert for_admin["signed_receipt"] == case.shown["signed_receipt"]
    assert "opening" in case.shown
    assert not for_admin.get("opening")
    assert failed(for_admin) == []
    for opening in (case.shown["opening"]["prompt"], case.shown["opening"]["output"]):
        assert re.fullmatch(r"[0-9a-f]{64}", opening["nonce"])
        assert opening["nonce"] not in json.dumps(for_admin)


def test_neither_prompt_nor_answer_is_in_a_receipt(case: Case) -> None:
    assert case.text.strip()
    assert b"Say hello" not in case.document
    assert case.text.encode() not in case.document


# -- the commands --------------------------------------------------------------------------------


def test_verify_of_a_file_needs_no_box(case: Case, tmp_path: Path) -> None:
    done = run(case, tmp_path)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.decode().splitlines()
    for name in ("coordinator signature", "proof 0", "usage", "payment"):
        assert any(name in line and " ok " in line for line in lines), name
    assert "FAILED" not in done.stdout.decode()
    checks = json.loads(run(case, tmp_path, "--json").stdout)
    assert all(check["ok"] and check["meaning"] for check in checks)


def test_verify_reads_standard_input_and_the_database(case: Case, tmp_path: Path) -> None:
    home = tmp_path / "empty"
    home.mkdir()
    assert verify_offline("-", home=home, stdin=case.document).returncode == 0
    assert (
        verify_offline("-", home=home, stdin=case.document.replace(b"EUR", b"USD")).returncode == 1
    )
    done = run_command("receipts", "verify", case.request_id, home=case.box.home)
    assert "coordinator signature" in done.stdout


@pytest.mark.parametrize("name", ["req_nothing", "nothing.json"])
def test_verify_of_nothing_is_one_sentence(tmp_path: Path, name: str) -> None:
    home = tmp_path / "empty"
    home.mkdir()
    done = verify_offline(name, home=home)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert b"Traceback" not in done.stderr
    assert list(home.iterdir()) == []


def test_node_key_is_compared_with_the_signer(case: Case, tmp_path: Path) -> None:
    key = case.signed["coordinator_id"].removeprefix("node_")
    for right in (key, f"node_{key}", key.upper()):
        assert run(case, tmp_path, "--node-key", right).returncode == 0
    stranger = SigningKey.generate().verify_key.encode().hex()
    for wrong in (stranger, key[::-1]):
        assert run(case, tmp_path, f"--node-key={wrong}").returncode == 1
    for none in (key[:-1], f"{key}\n0", "", "x"):
        assert run(case, tmp_path, f"--node-key={none}").returncode == 2
    assert failed(case.document, node_key=stranger) == ["trusted key"]


def test_request_and_answer_are_compared_with_the_commitments(case: Case, tmp_path: Path) -> None:
    request, answer = tmp_path / "request.json", tmp_path / "answer.txt"
    request.write_text(json.dumps(case.request))
    answer.write_text(case.text)
    given = ("--request", str(request), "--answer", str(answer))
    done = run(case, tmp_path, *given, "--json")
    assert done.returncode == 0, done.stdout
    names = [check["name"] for check in json.loads(done.stdout)]
    assert {"prompt commitment", "output commitment"} <= set(names)
    answer.write_text(case.text + ".")
    assert run(case, tmp_path, *given).returncode == 1
    answer.write_text(case.text)
    request.write_text(json.dumps({**case.request, "stop": ["zebra"]}))
    assert run(case, tmp_path, *given).returncode == 1
    request.write_text(json.dumps({**case.request, "messages": MESSAGES[1:]}))
    assert run(case, tmp_path, *given).returncode == 1


def test_a_missing_or_broken_opening_fails_only_what_needs_it(case: Case, tmp_path: Path) -> None:
    answer = tmp_path / "answer.txt"
    answer.write_text(case.text)
    openings: list[Any] = [
        None, {}, {"output": {}}, {"output": "x"}, {"output": {"nonce": "zz"}},
        {"output": {"nonce": "zz", "tokens_sha256": "zz"}},
    ]  # fmt: skip
    for opening in openings:
        document = json.dumps({**case.shown, "opening": opening}).encode()
        assert run(case, tmp_path, document=document).returncode == 0
        done = run(case, tmp_path, "--answer", str(answer), document=document)
        assert done.returncode == 1
        assert b"FAILED output commitment" in done.stdout


def test_a_streamed_answer_verifies_by_its_concatenated_text(case: Case) -> None:
    chunks = list(
        case.box.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=8
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    document = case.box.http("GET", f"/v1/receipts/{chunks[0].model_extra['request_id']}").content
    asked = [prompt_text([{"role": "user", "content": "Hi"}], [])]
    assert failed(document, transcript=Transcript(asked, answer=text.encode())) == []
    assert failed(document, transcript=Transcript(asked, answer=text.encode() + b" ")) == [
        "output commitment"
    ]


def test_show_prints_the_receipt(case: Case, tmp_path: Path) -> None:
    """With --json as the API serves it; without, unfolded for people."""
    as_json = run_command("receipts", "show", case.request_id, "--json", home=case.box.home).stdout
    served = case.box.http("GET", f"/v1/receipts/{case.request_id}", key=case.owner).json()
    assert json.loads(as_json) == served
    assert {**served, "inclusion": ""} == {**case.shown, "inclusion": ""}
    assert run(case, tmp_path, document=as_json.encode()).returncode == 0
    shown = json.loads(run_command("receipts", "show", case.request_id, home=case.box.home).stdout)
    assert shown["coordinator_signature"] == case.shown["coordinator_signature"]
    assert shown["request_id"] == case.request_id
    assert shown["proofs"][0]["sampling"]["seed"] == str(2**53 + 1)
    missing = run_command("receipts", "show", "req_nothing", home=case.box.home, check=False)
    assert missing.returncode == 1
    assert len(missing.stderr.splitlines()) == 1


# -- changed ones --------------------------------------------------------------------------------


def flipped(text: str, at: int, bit: int) -> str:
    return text[:at] + chr(ord(text[at]) ^ bit) + text[at + 1 :]


def test_a_flipped_byte_of_the_signed_text_is_found(case: Case, tmp_path: Path) -> None:
    """40 positions, each with the lowest bit, one in the middle and the bit of letter case."""
    assert failed(case.document) == []
    text = case.shown["signed_receipt"]
    positions = random.Random(5).sample(range(len(text)), 40)
    for at in positions:
        for bit in (1, 16, 32):
            changed = {**case.shown, "signed_receipt": flipped(text, at, bit)}
            assert failed(changed), (at, bit)
    for at in positions[:3]:
        document = {**case.shown, "signed_receipt": flipped(text, at, 1)}
        assert run(case, tmp_path, document=json.dumps(document).encode()).returncode == 1


def test_a_flipped_byte_of_the_signature_is_found(case: Case, tmp_path: Path) -> None:
    signature = case.shown["coordinator_signature"]
    for at in range(len(signature)):
        changed = {**case.shown, "coordinator_signature": flipped(signature, at, 1)}
        assert failed(changed) == ["coordinator signature"], at
    changed = {**case.shown, "coordinator_signature": flipped(signature, 0, 1)}
    assert run(case, tmp_path, document=json.dumps(changed).encode()).returncode == 1


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda signature: f"{signature[:2]} {signature[2:]}",
        lambda signature: f" {signature}",
        lambda signature: signature + "00",
        lambda signature: signature[:-2],
        lambda signature: "",
    ],
    ids=["upper case", "space within", "space before", "longer", "shorter", "none"],
)
def test_a_signature_is_written_in_one_way(case: Case, change: Callable[[str], str]) -> None:
    """128 lower-case hex digits: no second spelling of the same receipt passes."""
    assert failed(
        {**case.shown, "coordinator_signature": change(case.shown["coordinator_signature"])}
    )


@pytest.mark.parametrize("name", ["request_id", "node_id", "model", "timestamp", "payment_amount"])
def test_a_changed_field_beside_the_signed_text_is_found(
    case: Case, tmp_path: Path, name: str
) -> None:
    changed = {**case.shown, name: case.shown[name] + "0"}
    assert failed(changed) == ["shown fields"]
    assert run(case, tmp_path, document=json.dumps(changed).encode()).returncode == 1
    del changed[name]
    assert failed(changed) == ["format"]


@pytest.mark.parametrize(
    "document",
    [
        b"", b"x", b"[]", b"{}", b"null", b"\xff\xfe", b'{"signed_receipt": "{}"}', b"[" * 50_000,
        b'{"opening": {"a": ' + b"[" * 50_000,
    ],
    ids=lambda document: repr(document[:20]),
)  # fmt: skip
def test_another_document_is_refused_without_a_traceback(
    case: Case, tmp_path: Path, document: bytes
) -> None:
    done = run(case, tmp_path, document=document)
    assert done.returncode == 1
    assert done.stdout or done.stderr


# -- forged ones: rightly signed, by somebody who lies -------------------------------------------


class Forger:
    """A coordinator with an identity of its own that signs whatever it likes."""

    def __init__(self) -> None:
        self.identity = Identity(SigningKey.generate())

    def proof(self, case: Case, **changes: Any) -> SignedProof:
        """The case's proof with changes, signed by the forger as the serving node."""
        real = msgspec.json.decode(case.signed["proofs"][0]["signed"], type=Proof)
        changes = {"node_id": self.identity.node_id, **changes}
        return sign_proof(self.identity, msgspec.structs.replace(real, **changes))

    def document(self, case: Case, **changes: Any) -> bytes:
        """The case's receipt with changes, signed by the forger as the coordinator."""
        real = msgspec.convert(case.signed, Receipt)
        changes = {"coordinator_id": self.identity.node_id, **changes}
        receipt = msgspec.structs.replace(real, **changes)
        opening = json.dumps(case.shown["opening"]).encode()
        return msgspec.json.encode(view(*sign_receipt(self.identity, receipt), opening))


@pytest.fixture
def forger() -> Forger:
    return Forger()


def proofs_of(case: Case) -> list[SignedProof]:
    return msgspec.convert(case.signed, Receipt).proofs


def another(case: Case) -> list[SignedProof]:
    """The proofs of another real request of the same box, the same in everything it can be."""
    answer = case.box.http("POST", "/v1/chat/completions", key=case.owner, json=case.request).json()
    path = f"/v1/receipts/{answer['request_id']}"
    shown = case.box.http("GET", path, key=case.owner).json()
    return msgspec.convert(json.loads(shown["signed_receipt"]), Receipt).proofs


def test_a_receipt_of_another_coordinator_fails_the_trusted_key(case: Case, forger: Forger) -> None:
    """Rightly made it passes as the forger's own receipt, and never as the box's."""
    document = forger.document(case)
    assert failed(document) == []
    assert failed(document, node_key=case.signed["coordinator_id"]) == ["trusted key"]


def test_a_receipt_in_anothers_name_is_refused(case: Case, forger: Forger) -> None:
    document = forger.document(case, coordinator_id=case.signed["coordinator_id"])
    assert failed(document) == ["coordinator signature"]


def test_a_proof_moved_from_another_receipt_is_refused(
    case: Case, forger: Forger, tmp_path: Path
) -> None:
    document = forger.document(case, proofs=another(case))
    assert failed(document) == ["proof 0"]
    assert run(case, tmp_path, document=document).returncode == 1


def test_a_proof_whose_signature_is_of_another_is_refused(case: Case, forger: Forger) -> None:
    (mine,), (other,) = proofs_of(case), another(case)
    for proof in (
        SignedProof(mine.signed, other.signature),
        SignedProof(mine.signed, ""),
        SignedProof(mine.signed.replace("EUR", "USD"), mine.signature),
        SignedProof("{}", mine.signature),
        SignedProof("[" * 50_000, mine.signature),
    ):
        assert failed(forger.document(case, proofs=[proof])) == ["proof 0"]


def test_a_signature_over_the_receipt_is_none_over_the_proof(case: Case, forger: Forger) -> None:
    """The domain keeps a signature made for one purpose from being used for the other."""
    made = forger.proof(case)
    crossed = forger.identity.sign(RECEIPT_DOMAIN, made.signed.encode()).hex()
    assert failed(forger.document(case, proofs=[SignedProof(made.signed, crossed)]))


def test_the_number_of_proofs_must_fit(case: Case, forger: Forger, tmp_path: Path) -> None:
    document = forger.document(case, proofs=[])
    assert run(case, tmp_path, document=document).returncode == 1
    assert "usage" in failed(document)
    (proof,) = proofs_of(case)
    assert "legs" in failed(forger.document(case, proofs=[proof, proof]))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"payment_amount": "0.00001"}, "payment"),
        ({"payment_amount": "-1"}, "payment"),
        ({"currency": "USD"}, "payment"),
        ({"node_id": "node_" + "0" * 64}, "usage"),
        ({"model": "other:1"}, "proof 0"),
        ({"model_digest": "0" * 64}, "proof 0"),
        ({"request_id": "req_other"}, "proof 0"),
        ({"prompt_commitment": "0" * 64}, None),
        ({"output_commitment": "0" * 64}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_coordinator_that_contradicts_the_node_is_refused(
    case: Case, forger: Forger, changes: dict[str, str], name: str | None
) -> None:
    """Also where the coordinator signed its own words rightly.  Of an output, each commitment has
    a nonce of its own, so that only the owner, who has the answer, finds the difference."""
    if "output_commitment" in changes:
        transcript = Transcript(answer=case.text.encode())
        assert failed(forger.document(case, **changes), transcript=transcript) == [
            "output commitment"
        ]
        return
    found = failed(forger.document(case, **changes))
    assert found
    assert name is None or name in found


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "cached_tokens"])
def test_a_coordinator_that_bills_other_tokens_is_refused(
    case: Case, forger: Forger, field: str
) -> None:
    usage = msgspec.convert(case.signed, Receipt).usage
    more = msgspec.structs.replace(usage, **{field: getattr(usage, field) + 1})
    assert "usage" in failed(forger.document(case, usage=more))


def test_tokens_moved_from_the_prompt_to_the_answer_are_found(case: Case, forger: Forger) -> None:
    usage = msgspec.convert(case.signed, Receipt).usage
    moved = msgspec.structs.replace(
        usage,
        prompt_tokens=usage.prompt_tokens - 1,
        completion_tokens=usage.completion_tokens + 1,
    )
    assert "usage" in failed(forger.document(case, usage=moved))


@pytest.mark.parametrize("price", ["", "abc", "NaN", "Infinity", "-1", "1e999", "0.0000000000001"])
def test_a_price_that_is_none_fails_the_payment(
    case: Case, forger: Forger, tmp_path: Path, price: str
) -> None:
    """A coordinator may write anything into its receipt, and a node into its proof, which counts
    where a receipt of the first kind has no price: verifying it must end with a verdict."""
    real = msgspec.json.decode(case.signed["proofs"][0]["signed"], type=Proof)
    none = msgspec.structs.replace(real.price, completion=price)
    assert "payment" in failed(forger.document(case, price=none))
    bad = forger.proof(case, price=none)
    document = forger.document(case, proofs=[bad], node_id=forger.identity.node_id, price=None)
    done = run(case, tmp_path, document=document)
    assert done.returncode == 1
    assert b"FAILED payment" in done.stdout


# -- what stands beside and within the signed text ------------------------------------------------


def raw(text: bytes) -> Callable[[Case], bytes]:
    return lambda case: case.document.replace(b"{", text, 1)


def opened(change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], bytes]:
    def made(case: Case) -> bytes:
        shown = case.shown
        change(shown["opening"])
        return json.dumps(shown).encode()

    return made


BESIDE: dict[str, tuple[Callable[[Case], bytes], str]] = {
    "an unknown field": (raw(b'{"paid":"0",'), "unknown field `paid`"),
    "a field twice": (raw(b'{"payment_amount":"0",'), "`payment_amount` is there twice"),
    "a field twice, the same": (
        lambda case: case.document[:-1] + b',"model":"%s"}' % MODEL.encode(), "`model` is there"
    ),
    "a field twice, once escaped": (raw(b'{"\\u006dodel":"x",'), "`model` is there twice"),
    "another object": (raw(b'{"object":"invoice",'), "`object`"),
    "NaN": (raw(b'{"opening":NaN,'), "NaN is no number"),
    "infinity": (raw(b'{"opening":{"prompt":-Infinity},'), "-Infinity is no number"),
    "something after it": (lambda case: case.document + b" {}", "Extra data"),
    "the same again": (lambda case: case.document * 2, "Extra data"),
    "a byte order mark": (lambda case: b"\xef\xbb\xbf" + case.document, "BOM"),
    "UTF-16": (lambda case: case.document.decode().encode("utf-16"), "decode"),
    "an unknown field in the opening": (opened(lambda o: o.update(note="x")), "`note`"),
    "an unknown field of an opening": (opened(lambda o: o["output"].update(n="x")), "`n`"),
    "a field of an opening twice": (
        lambda case: case.document.replace(b'"output":{', b'"output":{"nonce":"",'), "`nonce`"
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelled", [str.upper, lambda text: text + "\n", lambda text: f" {text}"])
def test_an_opening_has_one_spelling(case: Case, spelled: Callable[[str], str]) -> None:
    for what in ("nonce", "tokens_sha256"):
        shown = case.shown
        opening = shown["opening"]["output"]
        opening[what] = spelled(opening[what])
        document = json.dumps(shown).encode()
        transcript = Transcript(answer=case.text.encode())
        assert failed(document, transcript=transcript) == ["output commitment"]


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_stands_beside_the_signed_text(case: Case, tmp_path: Path, name: str) -> None:
    change, sentence = BESIDE[name]
    document = change(case)
    assert document != case.document
    (check,) = checked(document)
    assert (check.name, check.ok) == ("format", False) and sentence in check.meaning, check
    done = run(case, tmp_path, document=document)
    assert done.returncode == 1 and sentence in done.stdout.decode()


WITHIN: dict[str, tuple[str, str]] = {  # put into the signed text after its first brace
    "an unknown field": ('"paid":true,', "unknown field `paid`"),
    "a field twice": ('"payment_amount":"0",', "`payment_amount` is there twice"),
    "NaN": ('"routing":NaN,', "NaN is no number"),
}


@pytest.mark.parametrize("name", WITHIN)
def test_nothing_in_a_signed_text_has_two_readings(case: Case, forger: Forger, name: str) -> None:
    """Also where the coordinator, or the node, has signed it like that."""
    more, sentence = WITHIN[name]
    shown = json.loads(forger.document(case))
    text = shown["signed_receipt"].replace("{", "{" + more, 1)
    signature = forger.identity.sign(RECEIPT_DOMAIN, text.encode()).hex()
    (check,) = checked(
        json.dumps({**shown, "signed_receipt": text, "coordinator_signature": signature}).encode()
    )
    assert (check.name, check.ok) == ("format", False) and sentence in check.meaning, check

    more = more.replace("payment_amount", "model").replace("routing", "sampling")
    sentence = sentence.replace("payment_amount", "model")
    proof = forger.proof(case).signed.replace("{", "{" + more, 1)
    signed = SignedProof(proof, forger.identity.sign(PROOF_DOMAIN, proof.encode()).hex())
    document = forger.document(case, proofs=[signed], node_id=forger.identity.node_id)
    (check,) = [one for one in checked(document) if not one.ok]
    assert check.name == "proof 0" and sentence in check.meaning, check


@pytest.mark.parametrize("around", ["\ufeff{}", "{} x", "{}{}", "{}\0"])
def test_nothing_stands_around_a_signed_text(case: Case, forger: Forger, around: str) -> None:
    shown = json.loads(forger.document(case))
    text = around.replace("{}", shown["signed_receipt"])
    signature = forger.identity.sign(RECEIPT_DOMAIN, text.encode()).hex()
    changed = {**shown, "signed_receipt": text, "coordinator_signature": signature}
    assert failed(json.dumps(changed).encode()) == ["format"]


@pytest.mark.parametrize("more", ['"note":"",', '"signature":"",'])
def test_nothing_stands_beside_the_text_of_a_proof(case: Case, forger: Forger, more: str) -> None:
    shown = json.loads(forger.document(case))
    text = shown["signed_receipt"].replace('"proofs":[{', '"proofs":[{' + more, 1)
    signature = forger.identity.sign(RECEIPT_DOMAIN, text.encode()).hex()
    changed = {**shown, "signed_receipt": text, "coordinator_signature": signature}
    assert failed(json.dumps(changed).encode()) == ["format"]


SPELLINGS: dict[str, Callable[[str], str]] = {
    "a line break": lambda text: text + "\n",
    "capitals": str.upper,
    "a space": lambda text: f" {text}",
    "other digits": lambda text: text.replace("1", "\uff11").replace("0", "\u0660"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "field",
    ["request_id", "coordinator_id", "node_id", "model_digest", "prompt_commitment",
     "output_commitment", "timestamp"],
)  # fmt: skip
def test_signed_fields_have_one_spelling(
    case: Case, forger: Forger, field: str, spelling: str
) -> None:
    other = SPELLINGS[spelling](case.signed[field])
    if other == case.signed[field]:
        assert (field, spelling) == ("timestamp", "capitals")
    else:
        assert failed(forger.document(case, **{field: other})) == ["format"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_signature_and_an_amount_have_one_spelling(
    case: Case, forger: Forger, spelling: str
) -> None:
    shown, change = case.shown, SPELLINGS[spelling]
    signature = change(shown["coordinator_signature"])
    if signature != shown["coordinator_signature"]:
        changed = {**shown, "coordinator_signature": signature}
        assert failed(json.dumps(changed).encode()) == ["coordinator signature"]
    amount = change(case.signed["payment_amount"])
    if amount != case.signed["payment_amount"]:
        assert failed(forger.document(case, payment_amount=amount)) == ["payment"]
