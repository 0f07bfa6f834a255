"""The verifier of the pages: it says what `pinaivu receipts verify` says, of right and wrong ones.

Its Ed25519 is held against RFC 8032, the vectors of Wycheproof, and libsodium on made-up points.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from pinaivu_box.receipts.verify import VerificationCheck, verify_receipt
from tests.support import receipt_vectors
from tests.support.both_verifiers import by_page, told
from tests.support.javascript import Scripts
from tests.support.receipt_mutations import flips, rewritten
from tests.support.torsion import crafted_signatures

VECTORS = Path(__file__).parent / "vectors"
RECEIPTS = {
    file.stem: file.read_bytes()
    for file in sorted(receipt_vectors.FOLDER.glob("*.json"))
    if file != receipt_vectors.EXPECTED
}
SIGNATURES = """
import { verify } from "./ed25519.js";
const bytes = (hex) => new Uint8Array(Buffer.from(hex, "hex"));
const answer = ([key, message, signature]) => verify(bytes(signature), bytes(message), bytes(key));
"""
DIGESTS = """
import { sha256, sha512 } from "./sha2.js";
const hex = (digest) => Buffer.from(digest).toString("hex");
const answer = (message) => {
  const bytes = new Uint8Array(Buffer.from(message, "hex"));
  return [hex(sha256(bytes)), hex(sha512(bytes))];
};
"""
Signature = tuple[str, str, str]  # the key, the message and the signature, in hex


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    return Scripts(tmp_path_factory.mktemp("scripts"))


def assert_same(scripts: Scripts, documents: dict[str, bytes]) -> list[list[VerificationCheck]]:
    """Returns what the pages' verifier says of them."""
    found = by_page(scripts, documents.values())
    for (name, document), checks in zip(documents.items(), found, strict=True):
        assert told(checks) == told(verify_receipt(document)), name
    return found


# -- receipts ------------------------------------------------------------------------------------


def test_both_verifiers_say_the_same_of_each_vector(scripts: Scripts) -> None:
    assert_same(scripts, RECEIPTS)


def test_the_vectors_are_what_is_expected_of_them() -> None:
    expected = json.loads(receipt_vectors.EXPECTED.read_text())
    assert receipt_vectors.vectors() == RECEIPTS
    assert expected == {
        name: [check.name for check in verify_receipt(document) if not check.ok]
        for name, document in RECEIPTS.items()
    }
    assert sum(not names for names in expected.values()) >= 14


def test_receipts_of_earlier_versions_verify(scripts: Scripts) -> None:
    old = json.loads((Path(__file__).parent / "receipts_v1.json").read_text())
    documents = {name: json.dumps(case["receipt"]).encode() for name, case in old.items()}
    found = assert_same(scripts, documents)
    assert all(check.ok for checks in found for check in checks)


def test_a_named_key_is_compared_with_the_signer(scripts: Scripts) -> None:
    document = RECEIPTS["one_box"]
    for key in (receipt_vectors.OWN.node_id, "AB" * 32):
        (checks,) = by_page(scripts, [document], key)
        assert checks == verify_receipt(document, node_key=key)
        assert checks[-1].name == "trusted key"


def test_a_flipped_byte_is_found_by_both(scripts: Scripts) -> None:
    """Of each right receipt some bytes; `tests/bench/flipped_bytes` flips all of them."""
    chance = random.Random(18)
    documents = {
        f"{name}, byte {at}": changed
        for name in ("one_box", "a_node_was_lost", "a_box_and_an_upstream")
        for at, changed in flips(RECEIPTS[name], chance.sample(range(len(RECEIPTS[name])), 30))
    }
    found = assert_same(scripts, documents)
    assert not [
        name
        for name, checks in zip(documents, found, strict=True)
        if all(check.ok for check in checks)
    ]


def test_rightly_signed_nonsense_gets_the_same_verdict(scripts: Scripts) -> None:
    """Members that are missing, doubled, of another type or beyond all bounds, signed anew."""
    chance = random.Random(20)
    documents = {str(number): rewritten(chance) for number in range(250)}
    found = assert_same(scripts, documents)
    expected = map(verify_receipt, documents.values())
    # What is JSON, and still no receipt, is refused in the same words, too.
    words = {
        (page[0].meaning, command[0].meaning)
        for page, command in zip(found, expected, strict=True)
        if "`" in command[0].meaning
    }
    assert len(words) > 30
    assert [page for page, _ in words] == [command for _, command in words]


# -- Ed25519 and SHA-2 ---------------------------------------------------------------------------


def by_libsodium(key: str, message: str, signature: str) -> bool:
    try:
        VerifyKey(bytes.fromhex(key)).verify(bytes.fromhex(message), bytes.fromhex(signature))
    except (BadSignatureError, ValueError):
        return False
    return True


def test_signatures_of_rfc_8032_verify(scripts: Scripts) -> None:
    cases = json.loads((VECTORS / "rfc8032_ed25519.json").read_text())["tests"]
    asked = [(case["key"], case["message"], case["signature"]) for case in cases]
    assert scripts.ask(SIGNATURES, asked) == [True] * len(cases)
    for case in cases:  # they were copied rightly
        signing = SigningKey(bytes.fromhex(case["secret"]))
        assert signing.verify_key.encode().hex() == case["key"]
        assert signing.sign(bytes.fromhex(case["message"])).signature.hex() == case["signature"]


def test_wycheproof_signatures_are_judged_rightly(scripts: Scripts) -> None:
    groups = json.loads((VECTORS / "wycheproof_ed25519.json").read_text())["testGroups"]
    asked = [
        (group["key"], test["msg"], test["sig"]) for group in groups for test in group["tests"]
    ]
    expected = [test["result"] == "valid" for group in groups for test in group["tests"]]
    assert len(asked) > 100
    assert scripts.ask(SIGNATURES, asked) == expected
    assert [by_libsodium(*one) for one in asked] == expected


def test_unusual_points_are_judged_as_by_libsodium(scripts: Scripts) -> None:
    """Keys and R of small and of mixed order, other spellings of points, S beyond the order."""
    asked: list[Signature] = crafted_signatures()
    expected = [by_libsodium(*one) for one in asked]
    assert scripts.ask(SIGNATURES, asked) == expected
    assert any(expected) and not all(expected)


def test_digests_are_those_of_sha_2(scripts: Scripts) -> None:
    """Around the ends of blocks, where the padding changes."""
    lengths = [*range(5), *range(50, 70), *range(105, 135), 191, 192, 239, 240, 256, 5000]
    messages = [random.Random(length).randbytes(length) for length in lengths]
    expected: list[Any] = [
        [hashlib.sha256(message).hexdigest(), hashlib.sha512(message).hexdigest()]
        for message in messages
    ]
    assert scripts.ask(DIGESTS, [message.hex() for message in messages]) == expected
