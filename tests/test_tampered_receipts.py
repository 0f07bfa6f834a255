"""A receipt with a proof, a proof of inclusion, a checkpoint and a cosignature: whatever is changed
in it, both verifiers refuse it, and say where it was changed.

`tests/bench/flipped_bytes` does so with each byte of all right receipts in `tests/vectors`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import rfc8785

from pinaivu_box.receipts.receipt import RECEIPT_DOMAIN
from pinaivu_box.receipts.verify import LogPolicy, verify_receipt
from tests.support import receipt_vectors as made
from tests.support.both_verifiers import by_page, told
from tests.support.javascript import Scripts
from tests.support.log_vectors import WITNESSES, document, entry_proof_of
from tests.support.receipt_mutations import flips

Json = dict[str, Any]
RECEIPT: Json = json.loads(document(entry_proof_of(3, 7, WITNESSES[:1])))
del RECEIPT["object"]  # which the API leaves out
WHOLE = msgspec.json.encode(RECEIPT)
INCLUSION: str = RECEIPT["inclusion"]
LINES = INCLUSION.splitlines()
# Of a verifier that knows which witness has to be there.
POLICY = LogPolicy(witnesses=(WITNESSES[0].node_id,))
FORM, NO_LOG, INCLUDED, SIGNED, SEEN = (
    {"format"}, {"log"}, {"inclusion"}, {"checkpoint signature"}, {"witnesses"},
)  # fmt: skip
# Which of the checks may be the first that fails where a part of the receipt was changed.
OF_FIELDS = {
    "coordinator_signature": {"coordinator signature"},
    "signed_receipt": FORM | {"coordinator signature"},
    **dict.fromkeys(made.SHOWN, FORM | {"shown fields"}),
}
OF_LINES = {
    "header": INCLUDED,
    "index": INCLUDED,
    "hash": INCLUDED,
    "empty line": INCLUDED,
    "origin": INCLUDED | SIGNED,
    "size": INCLUDED | SIGNED,
    "root": INCLUDED,
    "log's signature": INCLUDED | SIGNED,
    "cosignature": INCLUDED | SEEN,
}
KINDS = ["header", "index", *["hash"] * 3, "empty line", "origin", "size", "root", "empty line"]
KINDS += ["log's signature", "cosignature"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    return Scripts(tmp_path_factory.mktemp("scripts"))


def first_failed(data: bytes) -> str | None:
    failed = (check.name for check in verify_receipt(data, log=POLICY) if not check.ok)
    return next(failed, None)


def assert_refused(scripts: Scripts, changed: dict[str, tuple[bytes, set[str]]]) -> None:
    """By both verifiers, in the same words, first by one of the checks that are named."""
    found = by_page(scripts, (data for data, _ in changed.values()), log=POLICY)
    for (name, (data, expected)), page in zip(changed.items(), found, strict=True):
        checks = verify_receipt(data, log=POLICY)
        assert told(page) == told(checks), name
        failed = [check.name for check in checks if not check.ok]
        assert failed and failed[0] in expected, f"{name}: {failed}"


def with_inclusion(lines: list[str]) -> bytes:
    return msgspec.json.encode({**RECEIPT, "inclusion": "".join(f"{line}\n" for line in lines)})


def with_fields(fields: Json) -> bytes:
    return msgspec.json.encode(fields)


def test_unchanged_it_verifies(scripts: Scripts) -> None:
    checks = verify_receipt(WHOLE, log=POLICY)
    assert all(check.ok for check in checks)
    assert by_page(scripts, [WHOLE], log=POLICY) == [checks]
    assert len(LINES) == len(KINDS)


# -- each byte -----------------------------------------------------------------------------------


def parts() -> list[set[str]]:
    """For each byte of the receipt, the checks of which one has to find that it was changed."""
    expected = [FORM] * len(WHOLE)
    for name, checks in OF_FIELDS.items():
        start = WHOLE.index(b'"%s":"' % name.encode()) + len(name) + 4
        end = start + len(json.dumps(RECEIPT[name], ensure_ascii=False).encode()) - 2
        assert WHOLE[start - 1 : start] == WHOLE[end : end + 1] == b'"'
        expected[start:end] = [checks] * (end - start)
    at = WHOLE.index(b'"inclusion":"') + len('"inclusion":"')
    for kind, line in zip(KINDS, LINES, strict=True):
        length = len(line.encode()) + len("\\n")
        assert WHOLE[at : at + length] == line.encode() + b"\\n"
        # An escape that is none is no JSON.
        expected[at : at + length] = [OF_LINES[kind] | FORM] * length
        at += length
    assert WHOLE[at:] == b'"}'
    return expected


def test_each_byte_is_found_by_both(scripts: Scripts) -> None:
    expected = parts()
    assert_refused(
        scripts,
        {f"byte {at}": (changed, expected[at]) for at, changed in flips(WHOLE, range(len(WHOLE)))},
    )


def test_each_bit_of_the_proof_of_inclusion_is_found() -> None:
    expected, start = parts(), WHOLE.index(b'"inclusion"')
    for at, bit in itertools.product(range(start, len(WHOLE)), range(8)):
        changed = WHOLE[:at] + bytes([WHOLE[at] ^ (1 << bit)]) + WHOLE[at + 1 :]
        assert first_failed(changed) in expected[at] | FORM, f"byte {at}, bit {bit}"


def test_each_byte_removed_or_doubled_is_found() -> None:
    for at in range(len(WHOLE)):
        removed = WHOLE[:at] + WHOLE[at + 1 :]
        doubled = WHOLE[:at] + WHOLE[at : at + 1] + WHOLE[at:]
        assert first_failed(removed), f"byte {at} removed"
        assert first_failed(doubled), f"byte {at} doubled"


# -- each field ----------------------------------------------------------------------------------


def test_each_field_beside_what_was_signed(scripts: Scripts) -> None:
    changed: dict[str, tuple[bytes, set[str]]] = {}
    for name, value in RECEIPT.items():
        rest = {other: RECEIPT[other] for other in RECEIPT if other != name}
        member = msgspec.json.encode({name: value})[1:-1]
        # Without a proof that a log has it, it is one of which nothing is known.
        changed[f"{name} removed"] = with_fields(rest), NO_LOG if name == "inclusion" else FORM
        changed[f"{name} doubled"] = WHOLE[:-1] + b"," + member + b"}", FORM
        changed[f"{name} null"] = (
            with_fields({**RECEIPT, name: None}),
            NO_LOG if name == "inclusion" else FORM,
        )
    for one, other in itertools.combinations(RECEIPT, 2):
        swapped = with_fields({**RECEIPT, one: RECEIPT[other], other: RECEIPT[one]})
        allowed = FORM | {"coordinator signature", "shown fields"} | INCLUDED
        changed[f"{one} and {other} swapped"] = swapped, allowed
    assert_refused(scripts, changed)


def test_each_line_of_the_proof_of_inclusion(scripts: Scripts) -> None:
    changed: dict[str, tuple[bytes, set[str]]] = {}
    for at, (kind, line) in enumerate(zip(KINDS, LINES, strict=True)):
        # A line that is missing moves what follows into its place.
        allowed = OF_LINES[kind]
        changed[f"{kind} {at} removed"] = with_inclusion(LINES[:at] + LINES[at + 1 :]), allowed
        changed[f"{kind} {at} doubled"] = (
            with_inclusion([*LINES[:at], line, *LINES[at:]]),
            INCLUDED,
        )
    for one, other in itertools.combinations(range(len(LINES)), 2):
        if KINDS[one] == "log's signature" or LINES[one] == LINES[other]:
            continue  # the order of signatures says nothing
        lines = list(LINES)
        lines[one], lines[other] = lines[other], lines[one]
        changed[f"{KINDS[one]} {one} and {KINDS[other]} {other} swapped"] = (
            with_inclusion(lines),
            INCLUDED,
        )
    assert_refused(scripts, changed)


def test_each_word_of_the_signatures(scripts: Scripts) -> None:
    own, seen = (line.split(" ") for line in LINES[-2:])
    changed: dict[str, tuple[bytes, set[str]]] = {}
    for at, what in enumerate(("dash", "name", "signature")):
        for words, kind in ((own, "log's signature"), (seen, "cosignature")):
            rest = [line for line in LINES[-2:] if line != " ".join(words)]
            for how, new in (
                ("removed", words[:at] + words[at + 1 :]),
                ("doubled", [*words[:at], words[at], *words[at:]]),
            ):
                data = with_inclusion([*LINES[:-2], *rest, " ".join(new)])
                changed[f"{what} of the {kind} {how}"] = data, INCLUDED
    names = [*LINES[:-2], " ".join((own[0], seen[1], own[2])), " ".join((seen[0], own[1], seen[2]))]
    changed["names swapped"] = with_inclusion(names), SIGNED
    assert_refused(scripts, changed)


# -- what was signed -----------------------------------------------------------------------------


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all objects in a value, its own first."""
    if isinstance(value, dict):
        yield path
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from objects(item, (*path, name))


def at_path(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def changes(fields: Json) -> Iterator[tuple[str, str]]:
    """Canonical texts of these fields in which one was removed, doubled or swapped with another."""
    for path in objects(fields):
        names = list(at_path(fields, path))
        for name in names:
            copy = json.loads(json.dumps(fields))
            value = at_path(copy, path).pop(name)
            yield f"{path}: {name} removed", text_of(copy)
            at_path(copy, path)["\x00"] = value
            member = f"{json.dumps(name)}:{text_of(value)}"
            marked = f'"\\u0000":{text_of(value)}'
            once, end = text_of(copy).split(marked)
            yield f"{path}: {name} doubled", f"{once}{member},{member}{end}"
        for one, other in itertools.combinations(names, 2):
            copy = json.loads(json.dumps(fields))
            inside = at_path(copy, path)
            if inside[one] != inside[other]:
                inside[one], inside[other] = inside[other], inside[one]
                yield f"{path}: {one} and {other} swapped", text_of(copy)


def text_of(value: Any) -> str:
    return rfc8785.dumps(value).decode()


def test_each_field_of_the_signed_receipt(scripts: Scripts) -> None:
    receipt = json.loads(RECEIPT["signed_receipt"])
    assert_refused(
        scripts,
        {
            name: (
                with_fields({**RECEIPT, "signed_receipt": text}),
                FORM | {"coordinator signature"},
            )
            for name, text in changes(receipt)
        },
    )


def test_the_coordinator_can_change_no_field_of_a_proof_that_another_box_signed(
    scripts: Scripts,
) -> None:
    """It signs the receipt anew, and its log has the new one."""
    receipt = json.loads(RECEIPT["signed_receipt"])
    (proof,) = receipt["proofs"]
    changed: dict[str, tuple[bytes, set[str]]] = {}
    for name, text in changes(json.loads(proof["signed"])):
        signed = text_of({**receipt, "proofs": [{**proof, "signed": text}]})
        signature = made.OWN.sign(RECEIPT_DOMAIN, signed.encode()).hex()
        fields = {**RECEIPT, "signed_receipt": signed, "coordinator_signature": signature}
        changed[name] = with_fields(fields), {"proof 0"}
    assert any("logits_sha256" in name for name in changed)
    assert any("exactness" in name for name in changed)
    assert_refused(scripts, changed)


# -- what says the same --------------------------------------------------------------------------


def test_what_says_nothing_changes_no_verdict(scripts: Scripts) -> None:
    """Spaces and order outside of what was signed, and the order of signatures."""
    documents = [
        json.dumps(RECEIPT, indent=2, ensure_ascii=False).encode() + b"\n",
        json.dumps(RECEIPT).encode(),
        with_fields(dict(reversed(RECEIPT.items()))),
        with_fields({**RECEIPT, "object": "receipt"}),
        with_inclusion([*LINES[:-2], LINES[-1], LINES[-2]]),
    ]
    expected = verify_receipt(WHOLE, log=POLICY)
    assert [verify_receipt(each, log=POLICY) for each in documents] == [expected] * len(documents)
    assert by_page(scripts, documents, log=POLICY) == [expected] * len(documents)
