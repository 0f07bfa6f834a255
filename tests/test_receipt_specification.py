"""`docs/receipts.md` holds what a verifier needs: one that was written from it alone says of every
vector what the others say, and its tables, examples and checks are those of the code."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from pathlib import Path

import msgspec
import pytest

from pinaivu_box.receipts import verify_transcript
from pinaivu_box.receipts.commitment import Opening
from pinaivu_box.receipts.given_transcript import TranscriptDocument
from pinaivu_box.receipts.receipt import (
    EngineBuild,
    Price,
    Proof,
    Receipt,
    ReceiptView,
    SignedProof,
    TokenUsage,
    UpstreamLeg,
)
from pinaivu_box.receipts.transcript import (
    CommittedTranscript,
    LegTranscript,
    PromptTranscript,
)
from pinaivu_box.receipts.verify import LogPolicy, verify_receipt
from tests.support import (
    receipt_vectors,
    third_transcript_verifier,
    third_verifier,
    transcript_vectors,
)
from tests.support.in_process_command import run_command
from tests.support.keys import known_identity
from tests.support.log_vectors import WITNESSES, document, entry_proof_of
from tests.support.receipt_mutations import flips, rewritten

EXPECTED: dict[str, list[str]] = json.loads(receipt_vectors.EXPECTED.read_text())
OF_TRANSCRIPTS: dict[str, list[str]] = json.loads(transcript_vectors.EXPECTED.read_text())
PAGE = third_verifier.PAGE.read_text()
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "The document": ReceiptView,
    "The receipt": Receipt,
    "A signed text": SignedProof,
    "Usage": TokenUsage,
    "A price": Price,
    "The proof": Proof,
    "An engine": EngineBuild,
    "Legs of upstreams": UpstreamLeg,
    "An opening": Opening,
    "The answer": TranscriptDocument,
    "A transcript": CommittedTranscript,
    "A transcript prompt": PromptTranscript,
    "A transcript leg": LegTranscript,
}
KEYS = tuple(witness.node_id for witness in WITNESSES)


def vector(name: str) -> bytes:
    return (receipt_vectors.FOLDER / f"{name}.json").read_bytes()


def of_the_command(data: bytes, log: LogPolicy | None = None) -> list[tuple[str, bool]]:
    return [(check.name, check.ok) for check in verify_receipt(data, log=log)]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_verifier_written_from_the_page_says_what_is_expected(name: str) -> None:
    found = third_verifier.verdicts(vector(name))
    assert [check for check, ok in found if not ok] == EXPECTED[name]
    assert found == of_the_command(vector(name))


def test_it_finds_each_changed_byte_where_the_others_do() -> None:
    data = document(entry_proof_of(3, 7, WITNESSES[:1]))
    policy = LogPolicy(witnesses=KEYS[:1])
    for at, changed in flips(data, range(len(data))):
        found = third_verifier.verdicts(changed, witnesses=KEYS[:1])
        assert found == of_the_command(changed, policy), f"byte {at}"


def test_it_judges_rightly_signed_nonsense_as_the_others_do() -> None:
    chance = random.Random(26)
    for number in range(600):
        changed = rewritten(chance)
        assert third_verifier.verdicts(changed) == of_the_command(changed), f"{number}: {changed!r}"


@pytest.mark.parametrize("quorum", [None, 1, 2, 3])
@pytest.mark.parametrize("named", [KEYS[:1], KEYS, (*KEYS[:2], known_identity(7).node_id)])
def test_it_needs_the_witnesses_that_are_named(named: tuple[str, ...], quorum: int | None) -> None:
    for data in (document(entry_proof_of(3, 7, WITNESSES[1:])), document(None)):
        found = third_verifier.verdicts(data, witnesses=named, quorum=quorum)
        assert found == of_the_command(data, LogPolicy(witnesses=named, quorum=quorum))


def test_it_needs_a_log_and_a_key_that_are_asked_for() -> None:
    data = document(None)
    assert ("log", False) in third_verifier.verdicts(data, require_log=True)
    own = receipt_vectors.OWN.node_id
    assert third_verifier.verdicts(data, node_key=own)[-1] == ("trusted key", True)
    assert third_verifier.verdicts(data, node_key=KEYS[0])[-1] == ("trusted key", False)


@pytest.mark.parametrize("name", OF_TRANSCRIPTS)
def test_it_judges_transcripts_as_is_expected(name: str) -> None:
    given = json.loads((transcript_vectors.FOLDER / f"{name}.json").read_text())
    document = (given["receipt"].encode(), given["transcript"].encode(), given["secret"])
    found = third_transcript_verifier.with_transcript(*document)
    assert [check for check, ok in found if not ok] == OF_TRANSCRIPTS[name]
    expected = transcript_vectors.by_command(*document)
    assert found == [(check.name, check.ok) for check in expected]


# -- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", STRUCTS)
def test_each_field_is_in_its_table(title: str) -> None:
    documented = {field.name: field.absent for field in third_verifier.fields_of(title)}
    fields = {field.name: field for field in msgspec.structs.fields(STRUCTS[title])}
    assert documented.keys() == fields.keys()
    for name, absent in documented.items():
        field = fields[name]
        if absent == "required":
            assert field.required, name
        elif absent == "absent":
            assert field.default is msgspec.UNSET, name
        else:
            made = () if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            assert json.loads(absent) in (field.default, made), name


def test_each_check_is_described() -> None:
    described = {row[0].strip("`") for row in third_verifier.TABLES["The checks"]}
    made = {
        name for name, _ in (pair for name in EXPECTED for pair in of_the_command(vector(name)))
    }
    made = {re.sub("[0-9]+", "N", name) for name in made}
    assert made | {"trusted key"} == described
    failing = {re.sub("[0-9]+", "N", name) for names in EXPECTED.values() for name in names}
    assert described - failing == {"log", "trusted key"}, "no vector fails at these"


def test_each_check_of_a_transcript_is_described() -> None:
    described = {row[0].strip("`") for row in third_verifier.TABLES["The checks of a transcript"]}
    found = [re.sub("[0-9]+", "N", name) for names in OF_TRANSCRIPTS.values() for name in names]
    assert set(found) - {"proof N"} == described == {"transcript", "transcript N"}


@pytest.mark.parametrize("name", ["prompt", "output", "log-probabilities", "vectors"])
def test_checks_of_the_exchange_are_named(name: str) -> None:
    assert f'"{name}' in Path(verify_transcript.__file__).read_text()
    assert f"`{name} commitment`" in PAGE


def test_the_example_of_a_proof_of_inclusion_is_a_vector() -> None:
    (example,) = re.findall(r"```\n(c2sp\.org/tlog-proof.*?)```", PAGE, re.DOTALL)
    assert example == json.loads(vector("log_one_witness"))["inclusion"]
    (header,) = re.findall(r"```\n(cosignature/v1\n.*?)```", PAGE, re.DOTALL)
    time = int(header.split()[-1])
    found = [c.meaning for c in verify_receipt(vector("log_one_witness")) if c.name == "witnesses"]
    assert time == 1796050815 and "2026-11-30T15:00:15.000Z" in found[0]


def test_the_examples_of_digests_are_run(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")]
    for path in paths:
        path.write_bytes(path.name.encode())
    parts = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    names: dict[str, object] = {"paths": paths}
    exec(third_verifier.example("the digest of a model in several files"), names)
    joined = b"pinaivu/model-parts/v1\n" + struct.pack(">I", 2) + b"".join(parts)
    assert names["digest"] == hashlib.sha256(joined).hexdigest()

    names = {"base": "ab" * 32, "adapters": [(paths[0], 0.5)]}
    exec(third_verifier.example("the digest of a model with adapters"), names)
    one = bytes.fromhex("ab" * 32) + struct.pack(">I", 1) + parts[0] + struct.pack(">f", 0.5)
    assert names["digest"] == hashlib.sha256(b"pinaivu/model-adapters/v1\n" + one).hexdigest()


def test_the_commands_about_the_log_are_run(tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    file.write_bytes(vector("log_three_witnesses"))
    lines = re.findall(r"^    pinaivu (receipts verify .*)$", PAGE, re.MULTILINE)
    commands = [
        line.split() for line in lines if "--request" not in line and "--transcript" not in line
    ]
    for words in commands:
        keys = iter([receipt_vectors.OWN.node_id, *KEYS])
        filled = [next(keys) if word == "HEX" else word for word in words]
        filled[filled.index("receipt.json")] = str(file)
        assert "FAILED" not in run_command(*filled, home=None).stdout
    assert {word for words in commands for word in words if word.startswith("--")} == {
        "--node-key", "--witness", "--quorum", "--require-log"
    }  # fmt: skip


def test_it_imports_nothing_of_what_it_is_compared_with() -> None:
    source = Path(third_verifier.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (pinaivu_box|tests)", source, re.MULTILINE)
    source = Path(third_transcript_verifier.__file__).read_text()
    modules = re.findall(r"^\s*(?:from|import) ((?:pinaivu_box|tests)\S*)", source, re.MULTILINE)
    assert modules == ["tests.support.third_verifier"]
