"""A receipt with its transcript: both verifiers say the same of right and wrong ones, and whatever
is changed in a transcript or an opening is found.

The opening of sealed transcripts in the browser is held against libsodium and RFC 7748.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.public import PrivateKey, SealedBox

from pinaivu_box.receipts import transcript_sealing
from pinaivu_box.receipts.verify import VerificationCheck
from tests.support import transcript_vectors
from tests.support.both_verifiers import by_page_with_transcripts, told
from tests.support.in_process_command import run_command
from tests.support.javascript import Scripts
from tests.support.receipt_mutations import flips
from tests.support.transcript_vectors import SECRET, Given, by_command

Changed = tuple[bytes, bytes, str | None]
EXPECTED: dict[str, list[str]] = json.loads(transcript_vectors.EXPECTED.read_text())
VECTORS = {
    name: Given(**json.loads((transcript_vectors.FOLDER / f"{name}.json").read_text()))
    for name in EXPECTED
}
ONE = VECTORS["one_box"]
SEALED_BOX = """
import { blake2b } from "./blake2b.js";
import { keyPair, openSealed } from "./sealed_box.js";
import { hkdfSha256 } from "./sha2.js";
import { multiplied, publicKeyOf } from "./x25519.js";
const bytes = (hex) => new Uint8Array(Buffer.from(hex, "hex"));
const hex = (found) => found && Buffer.from(found).toString("hex");
const does = {
  multiply: (key, point) => hex(multiplied(bytes(key), bytes(point))),
  publicKey: (key) => hex(publicKeyOf(bytes(key))),
  hash: (message, length) => hex(blake2b(bytes(message), length)),
  derive: (key, info) => hex(hkdfSha256(bytes(key), bytes(info))),
  open: (sealed, key) => hex(openSealed(bytes(sealed), keyPair(bytes(key)))),
};
const answer = ([what, ...given]) => does[what](...given);
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    return Scripts(tmp_path_factory.mktemp("scripts"))


def assert_same(scripts: Scripts, given: dict[str, Changed]) -> list[list[VerificationCheck]]:
    """Returns what the pages' verifier says."""
    found = by_page_with_transcripts(scripts, given.values())
    for (name, one), checks in zip(given.items(), found, strict=True):
        assert told(checks) == told(by_command(*one)), name
    return found


def test_both_verifiers_say_the_same_of_each_vector(scripts: Scripts) -> None:
    found = assert_same(scripts, {name: given.bytes for name, given in VECTORS.items()})
    assert {
        name: [check.name for check in checks if not check.ok]
        for name, checks in zip(VECTORS, found, strict=True)
    } == EXPECTED


def test_the_vectors_are_what_is_made() -> None:
    assert transcript_vectors.vectors() == VECTORS
    assert sum(not names for names in EXPECTED.values()) >= 12


@pytest.mark.parametrize("name", ["one_box", "two_legs", "sealed"])
def test_what_holds_is_said_of_each_leg(name: str) -> None:
    checks = [check for check in by_command(*VECTORS[name].bytes) if "transcript" in check.name]
    legs = 2 if name == "two_legs" else 1
    assert [check.name for check in checks] == [
        "transcript", *(f"transcript {number}" for number in range(legs))
    ]  # fmt: skip
    assert all("token by token" in check.meaning for check in checks[1:])


def test_each_byte_of_a_transcript_is_found_where_something_commits_to_it(
    scripts: Scripts,
) -> None:
    """All but the values of what nothing commits to: tools, constraint, template, system."""
    receipt, transcript, _ = ONE.bytes
    free = transcript.index(b'"tools"'), transcript.index(b'"v"')
    changed: dict[str, Changed] = {
        f"byte {at}": (receipt, other, None)
        for at, other in flips(transcript, range(len(transcript)))
        if not free[0] <= at < free[1]
    }
    found = assert_same(scripts, changed)
    missed = [
        name
        for name, checks in zip(changed, found, strict=True)
        if all(check.ok for check in checks)
    ]
    assert not missed


def test_each_byte_of_the_openings_is_found(scripts: Scripts) -> None:
    receipt, transcript, _ = ONE.bytes
    whole = receipt.index(b'"opening"')
    # Of the whole output, which several legs may have made, the answer is compared.
    output = receipt.index(b'"output"'), receipt.index(b'"legs"')
    changed: dict[str, Changed] = {
        f"byte {at}": (other, transcript, None)
        for at, other in flips(receipt, range(whole, len(receipt)))
        if not output[0] <= at < output[1]
    }
    found = assert_same(scripts, changed)
    assert all(any(not check.ok for check in checks) for checks in found)


def test_each_byte_of_a_sealed_one_is_found(scripts: Scripts) -> None:
    receipt, transcript, secret = VECTORS["sealed"].bytes
    chance = random.Random(7)
    changed: dict[str, Changed] = {
        f"byte {at}": (receipt, other, secret)
        for at, other in flips(transcript, chance.sample(range(len(transcript)), 150))
    }
    found = assert_same(scripts, changed)
    assert all(any(not check.ok for check in checks) for checks in found)


def test_the_command_reads_each_form(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(f"{SECRET}\n")
    key.chmod(0o600)
    receipt, transcript = tmp_path / "receipt.json", tmp_path / "transcript.json"

    def verified(name: str, *more: str) -> tuple[int, list[dict[str, Any]]]:
        receipt.write_text(VECTORS[name].receipt)
        transcript.write_text(VECTORS[name].transcript)
        done = run_command(
            "receipts", "verify", str(receipt), "--json", "--transcript", str(transcript), *more,
            home=tmp_path / "none", check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout)

    for name in ("one_box", "alone", "sealed"):
        code, checks = verified(name, "--key-file", str(key))
        assert code == 0 and checks[-1]["name"] == "transcript 0"
    for name in ("sealed", "no_json", "another_text"):
        code, checks = verified(name)
        failed = [check for check in checks if not check["ok"]]
        assert code == 1 and [check["name"] for check in failed] == (
            EXPECTED[name] or ["transcript"]
        )


def test_the_commands_of_the_pages_are_run(tmp_path: Path) -> None:
    pages = Path(__file__).parent.parent / "docs"
    (receipt, transcript, _), key = VECTORS["sealed"], tmp_path / "key"
    for name, text in (("receipt.json", receipt), ("transcript.json", transcript)):
        (tmp_path / name).write_text(text)
    key.write_text(SECRET)
    key.chmod(0o600)
    found = 0
    for page in ("receipts.md", "transcripts.md"):
        text = (pages / page).read_text()
        for line in re.findall(r"^    pinaivu (receipts verify .* --transcript .*)$", text, re.M):
            words = [str(tmp_path / word) if "." in word else word for word in line.split()]
            words = [str(key) if word == "FILE" else word for word in words]
            done = run_command(*words, home=None, env={"PINAIVU_API_KEY": SECRET})
            assert "ok     transcript 0:" in done.stdout
            found += 1
    assert found == 2


def test_what_a_command_opens_can_be_given_to_another(tmp_path: Path) -> None:
    """`receipts transcript` opens a sealed one, and who has no key verifies with what it prints."""
    receipt, sealed, opened = (tmp_path / name for name in ("receipt", "sealed", "opened"))
    receipt.write_text(VECTORS["sealed"].receipt)
    sealed.write_text(VECTORS["sealed"].transcript)
    printed = run_command(
        "receipts", "transcript", str(sealed), home=None, env={"PINAIVU_API_KEY": SECRET}
    ).stdout
    opened.write_text(printed)
    again = run_command("receipts", "transcript", str(opened), home=None)
    assert again.stdout == printed
    done = run_command("receipts", "verify", str(receipt), "--transcript", str(opened), home=None)
    assert "ok     transcript 0:" in done.stdout


# -- sealed boxes in JavaScript ------------------------------------------------------------------


def test_x25519_is_that_of_rfc_7748(scripts: Scripts) -> None:
    cases = [  # section 5.2
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ]
    asked = [("multiply", key, point) for key, point, _ in cases]
    assert scripts.ask(SEALED_BOX, asked) == [result for *_, result in cases]


def test_x25519_is_that_of_libsodium(scripts: Scripts) -> None:
    """Also of points whose spelling is not canonical."""
    chance = random.Random(25519)
    pairs = [(chance.randbytes(32), chance.randbytes(32)) for _ in range(30)]
    pairs += [(chance.randbytes(32), bytes([value]) + b"\xff" * 31) for value in range(0xF0, 0x100)]
    expected = [crypto_scalarmult(key, point).hex() for key, point in pairs]
    expected += [crypto_scalarmult_base(key).hex() for key, _ in pairs]
    asked = [("multiply", key.hex(), point.hex()) for key, point in pairs]
    keys = [("publicKey", key.hex()) for key, _ in pairs]
    assert scripts.ask(SEALED_BOX, [*asked, *keys]) == expected


def test_blake2b_is_that_of_hashlib(scripts: Scripts) -> None:
    chance = random.Random(2)
    messages = [chance.randbytes(length) for length in (0, 1, 64, 127, 128, 129, 255, 256, 300)]
    asked = [("hash", message.hex(), size) for message in messages for size in (24, 64)]
    assert scripts.ask(SEALED_BOX, asked) == [
        hashlib.blake2b(message, digest_size=size).hexdigest()
        for message in messages
        for size in (24, 64)
    ]


def test_keys_are_derived_as_the_box_derives_them(scripts: Scripts) -> None:
    info = b"pinaivu/transcript-key/v1"
    asked = [("derive", secret.encode().hex(), info.hex()) for secret in (SECRET, "x", "")]
    assert scripts.ask(SEALED_BOX, asked) == [
        transcript_sealing.hkdf_sha256(secret.encode(), info).hex() for secret in (SECRET, "x", "")
    ]


def test_what_libsodium_sealed_is_opened_and_nothing_else(scripts: Scripts) -> None:
    key = PrivateKey(bytes(range(1, 33)))
    chance = random.Random(3)
    contents = [chance.randbytes(length) for length in (0, 1, 31, 32, 33, 63, 64, 65, 1000, 70_000)]
    sealed = [bytes(SealedBox(key.public_key).encrypt(content)) for content in contents]
    asked = [("open", one.hex(), bytes(key).hex()) for one in sealed]
    assert scripts.ask(SEALED_BOX, asked) == [content.hex() for content in contents]
    wrong = [other for _, other in flips(sealed[3], range(len(sealed[3])))]
    wrong += [b"", bytes(47), bytes(48), bytes(100), sealed[3][:-1], sealed[3] + b"\0"]
    asked = [("open", one.hex(), bytes(key).hex()) for one in wrong]
    asked += [("open", sealed[3].hex(), bytes(range(2, 34)).hex())]
    assert scripts.ask(SEALED_BOX, asked) == [None] * len(asked)
