"""The log of receipts of real boxes: what it proves, and what it says when it was changed."""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from nacl.signing import VerifyKey

from pinaivu_box.log import checkpoint, entry_proof, merkle, note
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import entry_of
from tests.support.fake_model import FAKE
from tests.support.process_box import Box, StartBox

ARGUMENTS = ("--model", f"{FAKE}=fake:0")


def ask(box: Box) -> str:
    """The id of a request that has ended."""
    body = {"model": FAKE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def text(box: Box, path: str) -> str:
    answer = box.http("GET", f"/v1/log/{path}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return answer.text


def newest(box: Box) -> Checkpoint:
    return read(text(box, "checkpoint"))


def read(signed: str) -> Checkpoint:
    """A checkpoint that its box has signed."""
    found = note.read(signed)
    said = checkpoint.read(found)
    assert checkpoint.is_signed(found, said)
    return said


def receipt_of(box: Box, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = box.http("GET", f"/v1/receipts/{request_id}").json()
    return found


def proven(box: Box, request_id: str) -> entry_proof.EntryProof:
    """The proof in a receipt, verified."""
    receipt = receipt_of(box, request_id)
    proof = entry_proof.read(receipt["inclusion"])
    assert proof.includes(entry_of(receipt["signed_receipt"].encode()), read(str(proof.note)))
    return proof


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(*ARGUMENTS)


# -- what a running box shows ----------------------------------------------------------------------


def test_a_receipt_is_in_the_log_once_it_is_shown(box: Box) -> None:
    first, second = ask(box), ask(box)
    one, two = proven(box, first), proven(box, second)
    assert (one.index, two.index) == (one.index, one.index + 1)
    assert text(box, f"proof/{second}") == receipt_of(box, second)["inclusion"]
    listed = box.http("GET", "/v1/receipts?limit=2").json()["data"]
    assert [row["request_id"] for row in listed] == [second, first]
    assert not any("inclusion" in row for row in listed)


def test_a_checkpoint_stays_until_the_log_has_grown(box: Box) -> None:
    ask(box)
    before = proven(box, ask(box)).note
    assert note.read(text(box, "checkpoint")) == before == note.read(text(box, "checkpoint"))
    after = proven(box, ask(box)).note
    assert read(str(after)).size == read(str(before)).size + 1


def test_sizes_are_proven_consistent(box: Box) -> None:
    known = {}
    for _ in range(5):
        said = read(str(proven(box, ask(box)).note))
        known[said.size] = said.root
    for old in known:
        for new in known:
            if old > new:
                continue
            lines = text(box, f"consistency?from={old}&to={new}").splitlines()
            proof = [base64.b64decode(line) for line in lines]
            assert merkle.is_consistent(old, known[old], new, known[new], proof)
    assert text(box, f"consistency?from=0&to={max(known)}") == ""


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("from=1&to=99999", "to"),
        ("from=9&to=1", "from"),
        ("from=-1&to=1", "from"),
        ("to=1", "from"),
    ],
)
def test_sizes_that_the_log_has_not_are_refused(box: Box, query: str, where: str) -> None:
    ask(box)
    assert text(box, "checkpoint")  # whichever test is first
    answer = box.http("GET", f"/v1/log/consistency?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", where]


def test_requests_at_once_have_entries_of_their_own(box: Box) -> None:
    with ThreadPoolExecutor(64) as pool:
        ids = list(pool.map(lambda _: ask(box), range(64)))
        proofs = list(pool.map(lambda request_id: proven(box, request_id), ids))
    assert len({proof.index for proof in proofs}) == 64


def test_the_log_says_what_it_is(box: Box) -> None:
    shown = box.http("GET", "/v1/log").json()
    said = newest(box)
    assert shown["origin"] == said.origin and said.node_id == shown["origin"].split("/")[2]
    assert shown["vkey"] == checkpoint.log_key(said.origin).text
    assert (shown["earlier"], shown["restart"]) == ([], None)
    assert read(shown["checkpoint"]).size == shown["size"]


def test_who_may_not_see_a_receipt_may_not_see_its_proof(box: Box) -> None:
    request_id = ask(box)
    box.http("POST", "/v1/admin/accounts", json={"name": "another"})
    made = box.http("POST", "/v1/admin/keys", json={"account": "another"}).json()
    for path in (f"/v1/log/proof/{request_id}", "/v1/log/proof/req_none"):
        answer = box.http("GET", path, key=made["key"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "receipt_not_found")
    assert box.http("GET", "/v1/log/checkpoint", key=made["key"]).status_code == 200


# -- the tiles, read as C2SP tlog-tiles has them ---------------------------------------------------


class TiledLog:
    """A reader of its own: nothing in it is the box's."""

    def __init__(self, box: Box) -> None:
        self._box = box
        origin, size, root, *_ = text(box, "checkpoint").split("\n")
        self.size, self.root = int(size), base64.b64decode(root)
        key = bytes.fromhex(origin.split("/")[2].removeprefix("node_"))
        signed, signature = text(box, "checkpoint").split("\n\n")
        line = signature.splitlines()[0]
        assert line.startswith(f"— {origin} ")
        VerifyKey(key).verify(f"{signed}\n".encode(), base64.b64decode(line.split(" ")[2])[4:])

    def _resource(self, kind: str, number: int, width: int) -> bytes:
        path = f"{number % 1000:03}"
        while number := number // 1000:
            path = f"x{number % 1000:03}/{path}"
        part = f".p/{width}" if width < 256 else ""
        answer = self._box.http("GET", f"/v1/log/tile/{kind}/{path}{part}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["cache-control"] == "no-cache"  # another log may come to be there
        return answer.content

    def hashes(self, level: int) -> list[bytes]:
        """All of a level, over its full and its partial tiles."""
        count = self.size // 256**level
        found = []
        for number in range((count + 255) // 256):
            width = min(256, count - 256 * number)
            data = self._resource(str(level), number, width)
            assert len(data) == 32 * width
            found += [data[i : i + 32] for i in range(0, len(data), 32)]
        return found

    def entries(self) -> list[bytes]:
        found = []
        for number in range((self.size + 255) // 256):
            width = min(256, self.size - 256 * number)
            data = self._resource("entries", number, width)
            while data:
                length = int.from_bytes(data[:2], "big")
                found.append(data[2 : 2 + length])
                data = data[2 + length :]
        return found


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, over hashes of leaves."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def test_an_independent_reader_finds_the_receipts_in_the_tiles(box: Box) -> None:
    ids = [ask(box) for _ in range(3)]
    proven(box, ids[-1])
    read_log = TiledLog(box)
    leaves, entries = read_log.hashes(0), read_log.entries()
    assert leaves == [hashlib.sha256(b"\x00" + entry).digest() for entry in entries]
    assert mth(leaves) == read_log.root and len(leaves) == read_log.size
    expected = [receipt_of(box, one)["signed_receipt"].encode() for one in ids]
    assert entries[-3:] == [hashlib.sha256(signed).digest() for signed in expected]


@pytest.mark.parametrize(
    "path",
    ["0/000", "0/999", "1/000", "9/000", "64/000", "0/0", "0/000.p/0", "0/000.p/256", "x", "",
     "entries/x000/000", "entries/000", "0/000/../000"],
)  # fmt: skip
def test_tiles_that_are_not_there(module_box: StartBox, path: str, empty: Box) -> None:
    answer = empty.http("GET", f"/v1/log/tile/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.fixture(scope="module")
def empty(module_box: StartBox) -> Box:
    return module_box(*ARGUMENTS)


def test_an_empty_log_has_a_checkpoint(empty: Box) -> None:
    said = newest(empty)
    assert (said.size, said.root) == (0, hashlib.sha256(b"").digest())
    assert TiledLog(empty).hashes(0) == []
