"""A witness as C2SP tlog-witness describes it (`add-checkpoint`), served over HTTP: written from
that text and RFC 9162 with PyNaCl, and without this package."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

EMPTY = hashlib.sha256(b"").digest()


class Refused(Exception):
    def __init__(self, status: int, body: str = "", kind: str = "text/plain") -> None:
        super().__init__(status)
        self.status, self.body, self.kind = status, body, kind


class C2spWitness:
    """`logs`: the Ed25519 keys of logs, by origin.  `last`: size and root of the last checkpoint
    that was cosigned, by origin.  `answered` are the statuses of its answers, in their order."""

    def __init__(self, name: str, logs: dict[str, bytes]) -> None:
        self.name, self.logs = name, logs
        self.key = SigningKey(hashlib.sha256(name.encode()).digest())
        self.last: dict[str, tuple[int, bytes]] = {}
        self.answered: list[int] = []
        self.url = ""
        self._lock = threading.Lock()

    @property
    def vkey(self) -> str:
        """Of signature type 0x04 (C2SP signed-note, tlog-cosignature)."""
        material = b"\x04" + self.key.verify_key.encode()
        encoded = base64.b64encode(material).decode()
        return f"{self.name}+{key_id(self.name, material).hex()}+{encoded}"

    def add_checkpoint(self, body: str) -> str:
        """The lines of cosignatures.  Raises Refused."""
        head, separator, signed = body.partition("\n\n")
        first, *proof_lines = head.split("\n")
        if not separator or not first.startswith("old ") or len(proof_lines) > 63:
            raise Refused(400)
        old = decimal(first.removeprefix("old "))
        proof = [base64.b64decode(line, validate=True) for line in proof_lines]
        text, _, signatures = signed.partition("\n\n")
        text += "\n"
        origin, size_line, root_line = text.split("\n")[:3]
        size, root = decimal(size_line), base64.b64decode(root_line, validate=True)
        if origin not in self.logs:
            raise Refused(404)
        self._verify(origin, text, signatures)
        if old > size:
            raise Refused(400)
        with self._lock:
            last_size, last_root = self.last.get(origin, (0, EMPTY))
            if old != last_size:
                raise Refused(409, f"{last_size}\n", "text/x.tlog.size")
            if not is_consistent(old, last_root, size, root, proof):
                raise Refused(422)
            self.last[origin] = size, root
        return self._cosigned(text)

    def _verify(self, origin: str, text: str, signatures: str) -> None:
        public = self.logs[origin]
        for line in signatures.splitlines():
            dash, name, encoded = line.split(" ")
            data = base64.b64decode(encoded, validate=True)
            if dash == "\u2014" and name == origin and data[:4] == key_id(name, b"\x01" + public):
                try:
                    VerifyKey(public).verify(text.encode(), data[4:])
                except BadSignatureError:
                    break
                return
        raise Refused(403)

    def _cosigned(self, text: str) -> str:
        now = int(time.time())
        signature = self.key.sign(f"cosignature/v1\ntime {now}\n{text}".encode()).signature
        material = b"\x04" + self.key.verify_key.encode()
        own = key_id(self.name, material) + now.to_bytes(8, "big") + signature
        # It has an ML-DSA-44 key too, which a client may not know and then has to ignore.
        other = key_id(self.name, b"\x06" + bytes(1312)) + now.to_bytes(8, "big") + bytes(2420)
        lines = [f"\u2014 {self.name} {base64.b64encode(data).decode()}\n" for data in (other, own)]
        return "".join(lines)


def key_id(name: str, material: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + material).digest()[:4]


def decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or (text != "0" and text.startswith("0")):
        raise Refused(400)
    return int(text)


def is_consistent(old: int, old_root: bytes, new: int, root: bytes, proof: list[bytes]) -> bool:
    """RFC 9162, section 2.1.4.2, and what tlog-witness says of the sizes 0 and the same."""
    if old == 0:
        return not proof and (new > 0 or root == EMPTY)
    if old == new:
        return not proof and old_root == root
    if old & (old - 1) == 0:
        proof = [old_root, *proof]
    if not proof:
        return False
    position, last = old - 1, new - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    first = second = proof[0]
    for sibling in proof[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            first, second = node(sibling, first), node(sibling, second)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            second = node(second, sibling)
        position, last = position >> 1, last >> 1
    return last == 0 and first == old_root and second == root


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


@contextmanager
def served(witness: C2spWitness) -> Iterator[C2spWitness]:
    """At `witness.url`, the submission prefix."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            status, text, kind = 404, "", "text/plain"
            if self.path == "/submit/add-checkpoint":
                try:
                    status, text = 200, witness.add_checkpoint(body)
                except Refused as refused:
                    status, text, kind = refused.status, refused.body, refused.kind
                except ValueError:
                    status = 400
            witness.answered.append(status)
            data = text.encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:  # it has another prefix for monitors
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    witness.url = f"http://127.0.0.1:{server.server_port}/submit"
    try:
        yield witness
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
