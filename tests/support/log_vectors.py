"""Receipts with proofs that a log has them, right ones and wrong ones: a part of the files in
`tests/vectors/receipts`, which `receipt_vectors` writes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import rfc8785
from msgspec.structs import replace

from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, entry_proof, merkle
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import EntryProof
from pinaivu_box.log.note import Note, NoteSignature
from tests.support import receipt_vectors as made
from tests.support.keys import known_identity

EPOCH = 1796050800000  # 2026-11-30T15:00:00Z
ORIGIN = checkpoint.origin(made.OWN.node_id, EPOCH)
WITNESSES = [known_identity(number) for number in (4, 5, 6)]
SEEN_AT = 1796050815  # by the first witness; by each further one a second later
EXACT: dict[str, Any] = {
    "v": 4,
    "exactness": "bitwise:haswell llama.cpp 1 f16",
    "logits_sha256": "5e" * 32,
}
LAST_SECOND = 253402300799  # of the year 9999


@cache
def one_receipt() -> bytes:
    """The signed bytes of the receipt that the log has, of a leg that a peer served."""
    return rfc8785.dumps(made.receipt(made.proof(made.PEER, **EXACT)))


def entry_proof_of(
    index: int, size: int, witnesses: Sequence[Identity] = (), origin: str = ORIGIN
) -> EntryProof:
    """That a log of so many entries, of which all others are made up, has the receipt there."""
    entries = [hashlib.sha256(b"entry %d" % number).digest() for number in range(size)]
    entries[index] = entry_proof.entry_of(one_receipt())
    leaves = [merkle.leaf_hash(entry) for entry in entries]
    hashes = [merkle.root(leaves[start:end]) for start, end in merkle.inclusion_ranges(index, size)]
    signed = Checkpoint(origin, size, merkle.root(leaves))
    owner = next(i for i in (made.OWN, made.PEER) if i.node_id == signed.node_id)
    return EntryProof(index, tuple(hashes), cosigned(checkpoint.sign(owner, signed), witnesses))


def in_a_large_log(index: int, size: int, witnesses: Sequence[Identity] = ()) -> EntryProof:
    """The same of a log of which nothing exists but the hashes beside the receipt's way to the
    root."""
    current, hashes = merkle.leaf_hash(entry_proof.entry_of(one_receipt())), []
    for number, (start, _) in enumerate(merkle.inclusion_ranges(index, size)):
        sibling = hashlib.sha256(b"subtree %d" % number).digest()
        pair = (current, sibling) if start > index else (sibling, current)
        current = merkle.node_hash(*pair)
        hashes.append(sibling)
    note = checkpoint.sign(made.OWN, Checkpoint(ORIGIN, size, current))
    return EntryProof(index, tuple(hashes), cosigned(note, witnesses))


def cosigned(note: Note, witnesses: Sequence[Identity]) -> Note:
    lines = [
        checkpoint.cosign(witness, note.text, SEEN_AT + number)
        for number, witness in enumerate(witnesses)
    ]
    return Note(note.text, (*note.signatures, *lines))


def document(inclusion: EntryProof | str | None, **beside: object) -> bytes:
    """The receipt as the API serves it, with what proves its inclusion."""
    text = inclusion if isinstance(inclusion, str | None) else str(inclusion)
    return made.document(json.loads(one_receipt()), inclusion=text, **beside)


def log_vectors() -> dict[str, bytes]:
    return {
        f"log_{name}": document(inclusion)
        for part in (_shapes(), _other_trees(), _other_checkpoints(), _witnesses(), _spellings())
        for name, inclusion in part.items()
    } | {
        "log_inclusion_that_is_no_text": made.document(json.loads(one_receipt()), inclusion=1),
        "log_inclusion_twice": document(entry_proof_of(3, 7)).replace(
            b'"inclusion":', b'"inclusion": null, "inclusion":'
        ),
    }


Inclusions = dict[str, EntryProof | str | None]


def _shapes() -> Inclusions:
    """Each way in which an entry can be in a tree; all of these are right."""
    places = {
        "alone": (0, 1), "of_two_the_first": (0, 2), "of_two_the_last": (1, 2),
        "of_three_the_last": (2, 3), "of_seven_the_first": (0, 7), "of_seven_the_fourth": (3, 7),
        "of_seven_the_fifth": (4, 7), "of_seven_the_last": (6, 7), "of_eight_the_sixth": (5, 8),
        "of_nine_the_last": (8, 9), "of_1000": (700, 1000),
    }  # fmt: skip
    shapes: Inclusions = {name: entry_proof_of(*place) for name, place in places.items()}
    of_epoch_0 = checkpoint.origin(made.OWN.node_id, 0)
    return shapes | {
        "none": None,
        "of_ten_million": in_a_large_log(7_654_321, 10_000_000, WITNESSES[:1]),
        "of_the_largest_size": in_a_large_log(2**53 - 2, 2**53),
        "of_epoch_0": entry_proof_of(1, 2, origin=of_epoch_0),
    }


def _other_trees() -> Inclusions:
    """Proofs that do not lead to the root."""
    right = entry_proof_of(3, 7)
    first, second, third = right.hashes
    alone = entry_proof_of(0, 1)
    return {
        "another_index": replace(right, index=4),
        "an_index_beyond": replace(right, index=7),
        # These lead to the root, if nobody looks at the size.
        "an_index_beyond_a_single_entry": replace(alone, index=1),
        "an_index_beyond_a_full_tree": replace(entry_proof_of(5, 8), index=13),
        "an_index_of_16_digits": replace(right, index=10**16 - 1),
        "another_hash": replace(right, hashes=(first, second, bytes(32))),
        "a_hash_missing": replace(right, hashes=(first, second)),
        "a_hash_too_many": replace(right, hashes=(first, second, third, third)),
        "a_hash_where_none_is": replace(alone, hashes=(first,)),
        "hashes_swapped": replace(right, hashes=(second, first, third)),
        "too_many_hashes": replace(right, hashes=(first,) * 64),
        "a_short_hash": replace(right, hashes=(first, second, third[:31])),
        "the_tree_of_others": replace(right, note=entry_proof_of(2, 7).note),
        "the_hash_of_the_leaf_as_root": replace(
            alone, note=_signed(Checkpoint(ORIGIN, 1, entry_proof.entry_of(one_receipt())))
        ),
    }


def _signed(signed: Checkpoint, by: Identity = made.OWN) -> Note:
    key = checkpoint.log_key(signed.origin)
    signature = by.signing_key.sign(signed.text.encode()).signature
    return Note(signed.text, (NoteSignature(key.name, key.id, signature),))


def _other_checkpoints() -> Inclusions:
    right = entry_proof_of(3, 7, WITNESSES[:1])
    own, cosignature = right.note.signatures
    signed = checkpoint.read(right.note)
    at_peer = checkpoint.origin(made.PEER.node_id, EPOCH)
    late = checkpoint.origin(made.OWN.node_id, EPOCH + 1)

    def of(note: Note) -> EntryProof:
        return replace(right, note=note)

    def with_text(text: str) -> EntryProof:
        signature = made.OWN.signing_key.sign(text.encode()).signature
        return of(Note(text, (own._replace(signature=signature),)))

    return {
        "another_size": of(Note(signed._replace(size=8).text, right.note.signatures)),
        "another_root": of(Note(signed._replace(root=bytes(32)).text, right.note.signatures)),
        "another_epoch": of(Note(signed._replace(origin=late).text, right.note.signatures)),
        "a_checkpoint_of_another": entry_proof_of(3, 7, origin=at_peer),
        "a_checkpoint_signed_by_another": of(_signed(signed, made.PEER)),
        "a_checkpoint_signed_as_a_witness": of(
            Note(signed.text, (own._replace(signature=cosignature.signature),))
        ),
        "a_checkpoint_that_only_a_witness_signed": of(Note(signed.text, (cosignature,))),
        "a_checkpoint_without_signatures": str(right)[: str(right).index("\u2014")],
        "a_checkpoint_with_an_extension": with_text(signed.text + "more\n"),
        "a_checkpoint_without_a_root": with_text(f"{ORIGIN}\n7\n"),
        "a_checkpoint_with_a_short_root": with_text(f"{ORIGIN}\n7\nAAAA\n"),
        "an_empty_log": EntryProof(0, (), _signed(Checkpoint(ORIGIN, 0, merkle.EMPTY_ROOT))),
        "an_empty_log_with_entries": EntryProof(0, (), _signed(signed._replace(size=0))),
        "a_huge_size": of(_signed(signed._replace(size=2**53 + 1))),
        "the_largest_size": of(_signed(signed._replace(size=2**53))),
        "another_origin": with_text(signed.text.replace("pinaivu/log/", "example.com/")),
    }


def _witnesses() -> Inclusions:
    right = entry_proof_of(3, 7, WITNESSES)
    text, (own, first, *rest) = right.note

    def of(*signatures: NoteSignature) -> EntryProof:
        return replace(right, note=Note(text, (own, *signatures)))

    def at(time: int) -> NoteSignature:
        return checkpoint.cosign(WITNESSES[0], text, time)

    of_the_box = checkpoint.cosign(made.OWN, text, SEEN_AT)
    other_text = checkpoint.cosign(WITNESSES[0], text.replace("\n7\n", "\n8\n"), SEEN_AT)
    other_key = bytes([first.key_id[0] ^ 1]) + first.key_id[1:]
    foreign = first._replace(name="witness.example.com/w1")
    return {
        "one_witness": of(first),
        "three_witnesses": right,
        "a_witness_before_the_log": replace(right, note=Note(text, (first, own))),
        "a_witness_at_the_epoch": of(at(0)),
        "a_witness_in_the_year_9999": of(at(LAST_SECOND)),
        "a_witness_in_the_year_10000": of(at(LAST_SECOND + 1)),
        "a_witness_beyond_all_time": of(at(2**63)),
        "a_witness_of_another_checkpoint": of(other_text, *rest),
        "a_witness_with_another_time": of(
            first._replace(signature=at(SEEN_AT + 1).signature[:8] + first.signature[8:])
        ),
        "a_witness_with_another_key_id": of(first._replace(key_id=other_key)),
        "a_witness_twice": of(first, *rest, first),
        "a_witness_twice_with_another_key_id": of(first, first._replace(key_id=other_key)),
        "a_witness_without_a_time": of(first._replace(signature=first.signature[8:])),
        "a_witness_in_anothers_name": of(rest[0]._replace(signature=first.signature)),
        "the_box_as_a_witness": of(of_the_box),
        "a_witness_of_another_kind": of(foreign),
        "a_log_key_of_another_type": of(own._replace(key_id=other_key)),
    }


def _spellings() -> Inclusions:
    """Texts that say the same, or nearly, in another form, and texts that say nothing."""
    proof = entry_proof_of(3, 7, WITNESSES[:1])
    text = str(proof)
    hash_line = base64.b64encode(proof.hashes[0]).decode()
    root_line = text.split("\n\n")[1].split("\n")[2]
    signature = text.rstrip("\n").rsplit(" ", 1)[1]  # ends in one =, so two bits are free

    def bits(line: str) -> str:
        """Another spelling of the same bytes: a bit is set that says nothing."""
        body = line.rstrip("=")
        last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        return body[:-1] + last[last.index(body[-1]) | 1] + line[len(body) :]

    changes: dict[str, Callable[[str], str]] = {
        "no_proof": lambda text: "",
        "another_header": lambda text: text.replace("@v1", "@v2"),
        "extra_data": lambda text: text.replace("index", "extra AAAA\nindex"),
        "an_index_with_a_zero": lambda text: text.replace("index 3", "index 03"),
        "an_index_with_a_sign": lambda text: text.replace("index 3", "index +3"),
        "an_index_in_other_digits": lambda text: text.replace("index 3", "index \u0663"),
        "an_index_of_17_digits": lambda text: text.replace("index 3", "index " + "3" * 17),
        "no_index": lambda text: text.replace("index 3\n", ""),
        "a_size_with_a_zero": lambda text: text.replace("\n7\n", "\n07\n"),
        "lines_that_end_as_in_windows": lambda text: text.replace("\n", "\r\n"),
        "an_empty_line_more": lambda text: text.replace("\n\n", "\n\n\n"),
        "no_last_newline": lambda text: text.rstrip("\n"),
        "a_newline_too_many": lambda text: text + "\n",
        "text_behind": lambda text: text + "more",
        "a_space_behind_a_hash": lambda text: text.replace(hash_line, hash_line + " "),
        "a_hash_in_another_spelling": lambda text: text.replace(hash_line, bits(hash_line)),
        "a_hash_without_padding": lambda text: text.replace(hash_line, hash_line.rstrip("=")),
        "a_root_in_another_spelling": lambda text: text.replace(root_line, bits(root_line)),
        "a_signature_with_padding_too_many": lambda text: text.replace(signature, signature + "="),
        "a_hash_in_hex": lambda text: text.replace(hash_line, proof.hashes[0].hex()),
        "a_hyphen_for_a_dash": lambda text: text.replace("\u2014", "-"),
        "two_spaces": lambda text: text.replace("\u2014 ", "\u2014  "),
        "a_mark_of_byte_order": lambda text: "\ufeff" + text,
        "a_control_character": lambda text: text.replace("witness/", "witness/\x00"),
        "a_name_with_a_plus": lambda text: text.replace("witness/", "witness/+"),
        "a_name_with_a_wide_space": lambda text: text.replace("witness/", "witness/\u3000"),
        "too_many_signatures": lambda text: text + "".join(
            f"\u2014 name{number} AAAAAAA=\n" for number in range(64)
        ),
        "too_long": lambda text: text + f"\u2014 name {'AAAA' * 16384}\n",
    }  # fmt: skip
    return {name: change(text) for name, change in changes.items()}
