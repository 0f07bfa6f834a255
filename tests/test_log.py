"""The log, pure: against the vectors of Certificate Transparency and C2SP, and against the
definitions of RFC 6962, which are written here a second time, as recursions."""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as some
from nacl.signing import SigningKey

from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, entry_proof, merkle, note, tiles
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import EntryProof
from pinaivu_box.log.note import NoteError, NoteKey, NoteSignature
from pinaivu_box.log.tiles import Tile, TilePath

# Entries and roots of the trees over the first one, two, ... of them, as Google's tests of
# Certificate Transparency have them (merkletree in certificate-transparency).
CT_ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# The example of C2SP signed-note.
C2SP_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
C2SP_NOTE = (
    "This is an example message.\n\n"
    "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuw"
    "HjG1Yu72IneyaQM=\n"
)
LEAVES = [merkle.leaf_hash(struct.pack(">I", number)) for number in range(1100)]
BOX, WITNESS = Identity(SigningKey(b"b" * 32)), Identity(SigningKey(b"w" * 32))


def largest_power_below(size: int) -> int:
    power = 1
    while power * 2 < size:
        power *= 2
    return power


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, over hashes of leaves."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else hashlib.sha256().digest()
    k = largest_power_below(len(leaves))
    return hashlib.sha256(b"\1" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = largest_power_below(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def subproof(m: int, leaves: list[bytes], known: bool) -> list[bytes]:
    """SUBPROOF of section 2.1.2."""
    if m == len(leaves):
        return [] if known else [mth(leaves)]
    k = largest_power_below(len(leaves))
    if m <= k:
        return [*subproof(m, leaves[:k], known), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), mth(leaves[:k])]


def tiled(leaves: list[bytes]) -> Callable[[merkle.Subtree], bytes]:
    """The tree as tiles; gives the hash of each complete subtree."""
    stored, level, hashes = {}, 0, leaves
    while hashes:
        for first in range(0, len(hashes), 256):
            stored[level, first // 256] = b"".join(hashes[first : first + 256])
        full = len(hashes) // 256 * 256
        hashes = [mth(hashes[first : first + 256]) for first in range(0, full, 256)]
        level += 1
    return lambda subtree: tiles.subtree_hash(subtree, stored)


def inclusion(index: int, leaves: list[bytes]) -> list[bytes]:
    hash_of = tiled(leaves)
    ranges = merkle.inclusion_ranges(index, len(leaves))
    return [merkle.range_hash(start, end, hash_of) for start, end in ranges]


def consistency(old: int, leaves: list[bytes]) -> list[bytes]:
    hash_of = tiled(leaves)
    ranges = merkle.consistency_ranges(old, len(leaves))
    return [merkle.range_hash(start, end, hash_of) for start, end in ranges]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    leaves = [merkle.leaf_hash(entry) for entry in CT_ENTRIES[:size]]
    assert merkle.root(leaves).hex() == CT_ROOTS[size - 1]
    assert merkle.range_hash(0, size, tiled(leaves)).hex() == CT_ROOTS[size - 1]


def test_the_root_of_nothing() -> None:
    assert merkle.root([]).hex() == hashlib.sha256().hexdigest()


SIZES = some.integers(1, len(LEAVES))


@given(SIZES, some.data())
def test_inclusion_proofs_are_those_of_the_definition(size: int, data: some.DataObject) -> None:
    leaves, index = LEAVES[:size], data.draw(some.integers(0, size - 1))
    proof, root = inclusion(index, leaves), mth(leaves)
    assert proof == path(index, leaves)
    assert merkle.includes(root, size, index, leaves[index], proof)


@given(SIZES, some.data())
def test_consistency_proofs_are_those_of_the_definition(size: int, data: some.DataObject) -> None:
    leaves, old = LEAVES[:size], data.draw(some.integers(1, size))
    proof = consistency(old, leaves)
    assert proof == subproof(old, leaves, True)
    assert merkle.is_consistent(old, mth(leaves[:old]), size, mth(leaves), proof)


@given(SIZES, some.data())
def test_a_wrong_inclusion_proof_is_refused(size: int, data: some.DataObject) -> None:
    leaves, index = LEAVES[:size], data.draw(some.integers(0, size - 1))
    proof, root = inclusion(index, leaves), mth(leaves)
    other = data.draw(some.integers(0, size - 1).filter(lambda value: value != index or size == 1))
    assert other == index or not merkle.includes(root, size, other, leaves[index], proof)
    assert other == index or not merkle.includes(root, size, index, leaves[other], proof)
    assert not merkle.includes(root, size, index, leaves[index], [*proof, root])
    assert not merkle.includes(root, size, index + size, leaves[index], proof)
    assert not merkle.includes(root, size, -1, leaves[index], proof)
    for place in range(len(proof)):
        assert not merkle.includes(
            root, size, index, leaves[index], proof[:place] + proof[place + 1 :]
        )
        changed = [*proof[:place], merkle.leaf_hash(proof[place]), *proof[place + 1 :]]
        assert not merkle.includes(root, size, index, leaves[index], changed)


@given(SIZES, some.data())
def test_a_wrong_consistency_proof_is_refused(size: int, data: some.DataObject) -> None:
    leaves, old = LEAVES[:size], data.draw(some.integers(1, size))
    proof, root, old_root = consistency(old, leaves), mth(leaves), mth(leaves[:old])
    regrown = mth([merkle.leaf_hash(b"another"), *leaves[1:old]])
    assert not merkle.is_consistent(old, regrown, size, root, proof)
    assert not merkle.is_consistent(old, old_root, size, regrown, proof)
    assert not merkle.is_consistent(old, old_root, size, root, [*proof, root])
    assert not merkle.is_consistent(size + 1, old_root, size, root, proof)
    for place in range(len(proof)):
        shorter = proof[:place] + proof[place + 1 :]
        assert not merkle.is_consistent(old, old_root, size, root, shorter)


def test_an_empty_tree_begins_every_tree_and_has_one_root() -> None:
    assert merkle.is_consistent(0, merkle.EMPTY_ROOT, 5, mth(LEAVES[:5]), [])
    assert not merkle.is_consistent(0, LEAVES[0], 5, mth(LEAVES[:5]), [])
    assert not merkle.is_consistent(0, merkle.EMPTY_ROOT, 5, mth(LEAVES[:5]), [LEAVES[0]])


def test_a_note_of_another_program_is_read_and_verified() -> None:
    key = NoteKey("example.com/foo", base64.b64decode(C2SP_KEY.split("+", 2)[2])[1:])
    assert key.text == C2SP_KEY
    signed = note.read(C2SP_NOTE)
    assert str(signed) == C2SP_NOTE and signed.signatures[0].is_by(key)
    assert signed.text == "This is an example message.\n"


def a_checkpoint(size: int = 3) -> Checkpoint:
    return Checkpoint(checkpoint.origin(BOX.node_id, 17), size, merkle.root(LEAVES[:size]))


def cosigned() -> note.Note:
    signed = checkpoint.sign(BOX, a_checkpoint())
    return note.joined(signed, [checkpoint.cosign(WITNESS, signed.text, 1_700_000_000)])


def test_a_checkpoint_is_read_as_it_was_written() -> None:
    signed = note.read(str(cosigned()))
    assert signed == cosigned() and checkpoint.read(signed) == a_checkpoint()
    assert checkpoint.is_signed(signed, a_checkpoint())
    assert checkpoint.witnesses_named(signed) == [WITNESS.node_id]
    found = checkpoint.cosignature(signed, WITNESS.node_id)
    assert found == (WITNESS.node_id, 1_700_000_000)
    assert checkpoint.cosignature(signed, BOX.node_id) is None


def test_the_signed_bytes_of_a_cosignature_are_those_of_c2sp() -> None:
    line = cosigned().signatures[1]
    message = b"cosignature/v1\ntime 1700000000\n" + cosigned().text.encode()
    public = WITNESS.signing_key.verify_key
    assert line.signature[:8] == struct.pack(">Q", 1_700_000_000)
    public.verify(message, line.signature[8:])
    name = f"pinaivu/witness/{WITNESS.node_id}"
    assert line.name == name
    assert line.key_id == hashlib.sha256(f"{name}\n\x04".encode() + bytes(public)).digest()[:4]


def test_who_signs_checkpoints_of_others_is_refused() -> None:
    with pytest.raises(NoteError):
        checkpoint.sign(WITNESS, a_checkpoint())
    key = checkpoint.log_key(a_checkpoint().origin)
    forged = WITNESS.signing_key.sign(a_checkpoint().text.encode()).signature
    line = NoteSignature(key.name, key.id, forged)
    assert not checkpoint.is_signed(note.Note(a_checkpoint().text, (line,)), a_checkpoint())


def test_no_byte_of_a_cosigned_checkpoint_can_be_changed() -> None:
    data = str(cosigned()).encode()
    for place in range(len(data)):
        for bit in (1, 32):
            changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            assert verified(changed) != (a_checkpoint(), [WITNESS.node_id]), changed


def verified(data: bytes) -> tuple[Checkpoint, list[str]] | None:
    """What a reader believes of it: the checkpoint, and who cosigned it."""
    try:
        signed = note.read(data.decode())
        found = checkpoint.read(signed)
        names = checkpoint.witnesses_named(signed)
        for name in names:
            checkpoint.cosignature(signed, name)
    except (NoteError, UnicodeDecodeError):
        return None
    return (found, names) if checkpoint.is_signed(signed, found) else None


ORIGIN = checkpoint.origin(BOX.node_id, 17)
ROOT = note.encode(LEAVES[0])
EMPTY = note.encode(merkle.EMPTY_ROOT)


@pytest.mark.parametrize(
    "text",
    [
        f"{ORIGIN}\n3\n{ROOT}\nextension\n",
        f"{ORIGIN}\n03\n{ROOT}\n",
        f"{ORIGIN}\n-3\n{ROOT}\n",
        f"{ORIGIN}\n\u0663\n{ROOT}\n",
        f"{ORIGIN}\n{2**53 + 1}\n{ROOT}\n",
        f"{ORIGIN}\n{'9' * 5000}\n{ROOT}\n",
        f"{ORIGIN}\n0\n{ROOT}\n",
        f"{ORIGIN}\n3\n{ROOT[:-4]}\n",
        f"{ORIGIN}\n3\n{ROOT[:-2]}=\n",
        f"{ORIGIN}/\n3\n{ROOT}\n",
        f"{ORIGIN.upper()}\n3\n{ROOT}\n",
        f"{ORIGIN.rpartition('/')[0]}/017\n3\n{ROOT}\n",
        f"example.com/log\n3\n{ROOT}\n",
        f"{ORIGIN}\n3\n",
        "\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    signed = BOX.signing_key.sign(text.encode()).signature
    line = NoteSignature(ORIGIN, NoteKey(ORIGIN, b"").id, signed)
    with pytest.raises(NoteError):
        checkpoint.read(note.read(str(note.Note(text, (line,)))))


def test_a_checkpoint_of_an_empty_log_is_one() -> None:
    empty = Checkpoint(ORIGIN, 0, merkle.EMPTY_ROOT)
    assert checkpoint.read(note.read(str(checkpoint.sign(BOX, empty)))) == empty


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n\n", "\n"),
        lambda text: text.replace("— ", "- "),
        lambda text: text[:-1],
        lambda text: text + "\n",
        lambda text: text + text.splitlines()[-1] + "\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n3\n", "\n\x003\n"),
        lambda text: text + "— a b\n",
        lambda text: text + "— a+b AAAAAAAA\n",
        lambda text: text + "— a AAAAAAB=\n",
        lambda text: text + "— a AAAA\n",
        lambda text: text + "".join(f"— a{number} AAAAAAAA\n" for number in range(64)),
        lambda text: text + "— " + "a" * 70_000 + " AAAAAAAA\n",
        lambda text: "",
    ],
)
def test_what_is_no_signed_note_is_refused(change: Callable[[str], str]) -> None:
    with pytest.raises(NoteError):
        note.read(change(str(cosigned())))


def test_signatures_of_unknown_keys_are_kept_and_count_for_nothing() -> None:
    text = f"{cosigned()}— example.com/another AAAAAAAA\n"
    signed = note.read(text)
    assert str(signed) == text and checkpoint.is_signed(signed, a_checkpoint())
    assert checkpoint.witnesses_named(signed) == [WITNESS.node_id]


def test_joined_signatures_are_in_order_and_there_once() -> None:
    first, second = (checkpoint.cosign(WITNESS, cosigned().text, time) for time in (1, 2))
    other = checkpoint.cosign(BOX, cosigned().text, 3)
    signed = checkpoint.sign(BOX, a_checkpoint())
    joined = note.joined(note.joined(signed, [first]), [other, second])
    assert joined.signatures == (*signed.signatures, first, other)


def test_a_proof_of_an_entry_is_read_as_it_was_written_and_verified() -> None:
    rng = random.Random(1)
    for size in (1, 2, 3, 255, 256, 257, 1000):
        index = rng.randrange(size)
        leaves = [merkle.leaf_hash(struct.pack(">I", number)) for number in range(size)]
        state = Checkpoint(ORIGIN, size, mth(leaves))
        proof = EntryProof(index, tuple(inclusion(index, leaves)), checkpoint.sign(BOX, state))
        read = entry_proof.read(str(proof))
        assert read == proof and read.includes(struct.pack(">I", index), state)
        assert not read.includes(struct.pack(">I", index + 1), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("@v1", "@v2"),
        lambda text: text.replace("index 1", "index 01"),
        lambda text: text.replace("index 1", "index -1"),
        lambda text: text.replace("index 1\n", ""),
        lambda text: text.replace("index 1\n", "index 1\nAAAA\n"),
        lambda text: text.replace("index 1\n", "index 1\n" + f"{ROOT}\n" * 64),
        lambda text: text.replace("index 1\n", "extra AAAA\nindex 1\n"),
        lambda text: "\n" + text,
        lambda text: text.partition("\n\n")[0],
    ],
)
def test_what_is_no_proof_of_an_entry_is_refused(change: Callable[[str], str]) -> None:
    hashes = tuple(inclusion(1, LEAVES[:3]))
    text = str(EntryProof(1, hashes, checkpoint.sign(BOX, a_checkpoint())))
    assert entry_proof.read(text).hashes == hashes
    with pytest.raises(NoteError):
        entry_proof.read(change(text))


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 0), "0/000"),
        (Tile(0, 999, 1), "0/999.p/1"),
        (Tile(1, 1000), "1/x001/000"),
        (Tile(63, 1_234_067, 255), "63/x001/x234/067.p/255"),
    ],
)
def test_tiles_have_the_paths_of_c2sp(tile: Tile, path: str) -> None:
    assert tiles.path_of(tile) == path
    assert tiles.read_path(path) == TilePath(tile, False)


def test_bundles_of_entries_have_paths_of_their_own() -> None:
    assert tiles.read_path("entries/x001/002.p/3") == TilePath(Tile(0, 1002, 3), True)


@pytest.mark.parametrize(
    "path",
    [
        "", "0", "0/", "0/0", "0/00", "0/0000", "00/000", "64/000", "0/x000/001", "0/001/002",
        "0/x001", "0/000.p/0", "0/000.p/256", "0/000.p/01", "0/000/", "0/000\n", "-1/000",
        "0/\u0660\u0660\u0660", "entries/", "data/000",
    ],
)  # fmt: skip
def test_other_paths_are_no_tiles(path: str) -> None:
    assert tiles.read_path(path) is None


def test_the_tiles_of_a_tree_are_those_of_the_example_in_c2sp() -> None:
    """273 full tiles and one of 112 hashes, one full and one of 17 above, and one of a hash."""
    widths = [tiles.width_of(0, index, 70_000) for index in range(275)]
    assert widths == [256] * 273 + [112, 0]
    assert [tiles.width_of(1, index, 70_000) for index in range(3)] == [256, 17, 0]
    assert [tiles.width_of(2, index, 70_000) for index in range(2)] == [1, 0]
    assert tiles.width_of(3, 0, 70_000) == 0
