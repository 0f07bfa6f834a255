"""A verifier of receipts that was written from `docs/receipts.md` and nothing else: it imports no
module of this program, and reads the forms of all objects from the tables of that page.

Where it and the vectors differ, the page says something else than the verifiers do.  Of a check it
says only whether it holds.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

PAGE = Path(__file__).parents[2] / "docs" / "receipts.md"
OPENINGS = {"prompt", "prompts", "output", "legs", "stop"}
OPENING = {"nonce", "tokens_sha256", "text_sha256", "logprobs_sha256", "vectors_sha256"}
SHOWN = ("request_id", "node_id", "model", "timestamp", "payment_amount")
Json = dict[str, Any]
Verdicts = list[tuple[str, bool]]


class Field(NamedTuple):
    """A row of a table.  `absent`: "required", "absent" (it may be), or JSON: what it counts as."""

    name: str
    type: str
    absent: str


class NotRead(ValueError):
    """The text has not the form of the page."""


def verdicts(
    document: bytes,
    *,
    node_key: str | None = None,
    witnesses: tuple[str, ...] = (),
    quorum: int | None = None,
    require_log: bool = False,
) -> Verdicts:
    """The checks in their order, each with whether it holds.  Keys are node ids."""
    try:
        view = read(document.decode(), "The document")
        check_opening(view)
        receipt = read(view["signed_receipt"], "The receipt")
    except (NotRead, UnicodeDecodeError):
        return [("format", False)]
    coordinator, text = receipt["coordinator_id"], view["signed_receipt"]
    signature = view["coordinator_signature"]
    checks = [
        ("format", receipt["v"] in (1, 2, 3)),
        ("coordinator signature", signed(coordinator, "pinaivu/receipt/v1", text, signature)),
    ]
    if not all(ok for _, ok in checks):
        return checks
    checks.append(("shown fields", all(view[name] == receipt[name] for name in SHOWN)))
    checks += of_proofs(receipt)
    if view["inclusion"] is None:
        checks.append(("log", not require_log and not witnesses))
    else:
        needed = len(set(witnesses)) if quorum is None else quorum
        checks += of_log(view["inclusion"], text, coordinator, set(witnesses), needed)
    if node_key is not None:
        checks.append(("trusted key", coordinator == node_key))
    return checks


# -- forms, from the tables of the page ----------------------------------------------------------


def tables() -> dict[str, list[list[str]]]:
    """The cells of each table, by the last heading or sentence with a colon before it."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("|"):
            found.setdefault(title, []).append([cell.strip() for cell in line[1:-1].split("|")])
        elif line.startswith("#") or re.fullmatch(r"(A|An) [^.]*:|Usage:|The answer:", line):
            title = line.strip("#: ").split(",")[0]
    return {title: rows[2:] for title, rows in found.items()}


TABLES = tables()
PATTERNS = {row[0]: row[1].split("`")[1] for row in TABLES["Types"] if row[1].startswith("`")}
OBJECTS = {
    "usage": "Usage", "price": "A price", "engine": "An engine", "signed text": "A signed text",
}  # fmt: skip


def fields_of(title: str) -> Iterator[Field]:
    for names, kind, absent, _ in TABLES[title]:
        for name in re.findall("`([^`]+)`", names):
            yield Field(name, kind, absent.strip("`") or "required")


def read(text: str, title: str) -> Json:
    value = parse(text)
    check(value, title)
    found: Json = value
    return found


def check(value: Any, title: str) -> None:
    """The form of an object; what is absent is added.  Raises NotRead."""
    if not isinstance(value, dict):
        raise NotRead(title)
    fields = list(fields_of(title))
    if set(value) - {field.name for field in fields}:
        raise NotRead(f"{title}: other fields")
    for field in fields:
        if field.name in value:
            check_type(value[field.name], field.type)
        elif field.absent == "required":
            raise NotRead(f"{title}: no {field.name}")
        elif field.absent != "absent":
            value[field.name] = json.loads(field.absent)


def check_type(value: Any, kind: str) -> None:
    if kind.endswith(" or null"):
        if value is not None:
            check_type(value, kind.removesuffix(" or null"))
    elif "`" in kind:
        allowed = [json.loads(one) if one.isdigit() else one for one in re.findall("`(.*?)`", kind)]
        if value not in allowed or isinstance(value, bool | float):
            raise NotRead(kind)
    elif kind.startswith("list of "):
        if not isinstance(value, list):
            raise NotRead(kind)
        for each in value:
            check_type(each, kind.removeprefix("list of ").removesuffix("s"))
    elif kind in OBJECTS:
        check(value, OBJECTS[kind])
    else:
        check_plain(value, kind)


def check_plain(value: Any, kind: str) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind in PATTERNS:
        ok = isinstance(value, str) and re.fullmatch(PATTERNS[kind], value) is not None
    else:
        ok = {
            "text": isinstance(value, str),
            "object": isinstance(value, dict),
            "boolean": isinstance(value, bool),
            "integer": is_integer,
            "count": is_integer and abs(value) < 2**53,
            "count from 0": is_integer and 0 <= value < 2**53,
            "token": is_integer and 0 <= value < 2**32,
        }[kind]
    if not ok:
        raise NotRead(kind)


def check_opening(view: Json) -> None:
    if view["object"] != "receipt":
        raise NotRead("object")
    for name, value in (view["opening"] or {}).items():
        if name not in OPENINGS:
            raise NotRead("opening")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and set(each) - OPENING:
                raise NotRead("opening")


# -- JSON, signatures, Base64 --------------------------------------------------------------------


def parse(text: str) -> Any:
    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=no_number, parse_float=finite
        )
    except RecursionError:
        raise NotRead("nested too deeply") from None
    except ValueError as error:
        raise NotRead(str(error)) from None
    check_texts(value, 0)
    return value


def pairs(members: list[tuple[str, Any]]) -> Json:
    if len(dict(members)) < len(members):
        raise NotRead("a name is there twice")
    return dict(members)


def no_number(text: str) -> None:
    raise NotRead(text)


def finite(text: str) -> float:
    if abs(float(text)) == float("inf"):
        raise NotRead(text)
    return float(text)


def check_texts(value: Any, depth: int) -> None:
    if depth > 900 or (isinstance(value, str) and re.search("[\ud800-\udfff]", value)):
        raise NotRead("half of a pair, or nested too deeply")
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    for each in inside if isinstance(inside, list) else ():
        check_texts(each, depth + 1)


def signed(node_id: str, domain: str, text: str, signature: str) -> bool:
    if not re.fullmatch("[0-9a-f]{128}", signature):
        return False
    return verifies(node_id, f"{domain}\n{text}".encode(), bytes.fromhex(signature))


def verifies(node_id: str, message: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(public_key(node_id)).verify(message, signature)
    except (BadSignatureError, ValueError):
        return False
    return True


def public_key(node_id: str) -> bytes:
    return bytes.fromhex(node_id.removeprefix("node_"))


def unbase64(text: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise NotRead("Base64") from None
    if base64.b64encode(data).decode() != text:
        raise NotRead("another spelling")
    return data


# -- proofs --------------------------------------------------------------------------------------


def of_proofs(receipt: Json) -> Verdicts:
    checks: Verdicts = []
    proofs: list[Json] = []
    for number, each in enumerate(receipt["proofs"]):
        try:
            value = parse(each["signed"])
            kind = value.get("kind") if isinstance(value, dict) else None
            if kind is not None:
                check(value, "Legs of upstreams")
            else:
                check(value, "The proof")
        except NotRead:
            checks.append((f"proof {number}", False))
            continue
        if kind is not None:
            fits = statement_holds(value, each, receipt)
            checks.append((f"leg {number}", fits))
        else:
            fits = proof_holds(value, each, receipt)
            checks.append((f"proof {number}", fits and witness_holds(value, receipt)))
        if fits:
            proofs.append(value)
    if len(proofs) == len(receipt["proofs"]):
        checks += [("legs", legs_hold(receipt, proofs)), ("usage", usage_holds(receipt, proofs))]
        if proofs:
            checks.append(("payment", payment_holds(receipt, proofs)))
    return checks


def same(one: Json, other: Json, *names: str) -> bool:
    return all(one[name] == other[name] for name in names)


def proof_holds(proof: Json, text: Json, receipt: Json) -> bool:
    signer = proof["witness"] or proof["node_id"]
    has = [name in proof for name in ("exactness", "logits_sha256")]
    least = 2 if proof["v"] == 4 else proof["v"]
    return (
        signed(signer, "pinaivu/proof/v1", text["signed"], text["signature"])
        and proof["v"] in (1, 2, 4)
        and least <= receipt["v"]
        and has == [proof["v"] == 4] * 2
        and same(proof, receipt, "request_id", "model", "model_digest")
    )


def witness_holds(proof: Json, receipt: Json) -> bool:
    if proof["witness"] is None:
        return True
    names = ("request_id", "choice", "leg", "completion_tokens", "output_commitment")
    text = " ".join(str(proof[name]) for name in names)
    return proof["witness"] == receipt["coordinator_id"] and (
        proof["mark"] is None or signed(proof["node_id"], "pinaivu/mark/v1", text, proof["mark"])
    )


def statement_holds(statement: Json, text: Json, receipt: Json) -> bool:
    signers = (statement["node_id"], receipt["coordinator_id"])
    return (
        any(signed(s, "pinaivu/upstream/v1", text["signed"], text["signature"]) for s in signers)
        and receipt["v"] == 3
        and same(statement, receipt, "request_id", "model")
    )


def first_of_prompts(proofs: list[Json]) -> dict[int, Json]:
    first: dict[int, Json] = {}
    for proof in proofs:
        first.setdefault(proof["prompt"], proof)
    return first


def legs_hold(receipt: Json, proofs: list[Json]) -> bool:
    legs: dict[int, int] = {}
    of_kind: dict[tuple[int, bool], str] = {}
    for proof in proofs:
        if proof["leg"] != legs.get(proof["choice"], 0):
            return False
        legs[proof["choice"]] = proof["leg"] + 1
        kind = (proof["prompt"], "kind" in proof)
        if of_kind.setdefault(kind, proof["prompt_commitment"]) != proof["prompt_commitment"]:
            return False
    first = first_of_prompts(proofs)
    commitments = [first[number]["prompt_commitment"] for number in sorted(first)]
    joined = b"pinaivu/commitments/v1\n" + bytes.fromhex("".join(commitments))
    whole = commitments[0] if len(commitments) == 1 else hashlib.sha256(joined).hexdigest()
    return bool(proofs) and whole == receipt["prompt_commitment"]


def usage_holds(receipt: Json, proofs: list[Json]) -> bool:
    usage, first = receipt["usage"], first_of_prompts(proofs).values()
    return (
        bool(proofs)
        and all(proof["completion_tokens"] >= 0 for proof in proofs)
        and usage["completion_tokens"] == sum(proof["completion_tokens"] for proof in proofs)
        and usage["prompt_tokens"] == sum(proof["prompt_tokens"] for proof in first)
        and usage["cached_tokens"] == sum(proof["cached_tokens"] for proof in first)
        and 0 <= usage["cached_tokens"] <= usage["prompt_tokens"]
        and receipt["node_id"] == proofs[-1]["node_id"]
    )


def payment_holds(receipt: Json, proofs: list[Json]) -> bool:
    first = first_of_prompts(proofs).values()
    due = 0
    try:
        for proof in proofs:
            prices = receipt["price"] or proof["price"]
            prompt, cached, completion = (
                per_token(prices[name]) for name in ("prompt", "cached", "completion")
            )
            if proof in first:
                due += (proof["prompt_tokens"] - proof["cached_tokens"]) * prompt
                due += proof["cached_tokens"] * cached
            due += proof["completion_tokens"] * completion
    except NotRead:
        return False
    price = receipt["price"] or proofs[-1]["price"]
    paid = (receipt["payment_amount"], receipt["currency"])
    return paid == (decimal(due), price["currency"])


def per_token(price: str) -> int:
    """In 10^-9."""
    if not re.fullmatch(r"-?[0-9]{1,30}([.][0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", price):
        raise NotRead("price")
    number = Fraction(price) * 10**6
    if not 0 <= number <= 10**12 or number.denominator != 1:
        raise NotRead("price")
    return int(number)


def decimal(amount: int) -> str:
    text = f"{amount // 10**9}.{amount % 10**9:09}"
    return text.rstrip("0").rstrip(".")


# -- the log -------------------------------------------------------------------------------------


def of_log(
    inclusion: str, receipt: str, coordinator: str, named: set[str], needed: int
) -> Verdicts:
    try:
        index, hashes, checkpoint, signatures = read_inclusion(inclusion)
    except NotRead:
        return [("inclusion", False)]
    origin, size, root = checkpoint.split("\n")[:3]
    owner = origin.split("/")[2]
    own = [data for name, key_id, data in signatures if is_own(name, key_id, origin, owner)]
    others = [each for each in signatures if not is_own(*each[:2], origin, owner)]
    seen = [cosigner(name, key_id, data, checkpoint) for name, key_id, data in others]
    is_seen = None not in seen and owner not in seen
    return [
        ("inclusion", leads(receipt.encode(), index, int(size), hashes, unbase64(root))),
        (
            "checkpoint signature",
            owner == coordinator and bool(own) and verifies(owner, checkpoint.encode(), own[0]),
        ),
        ("witnesses", is_seen and (not named or len(named & set(seen)) >= needed)),
    ]


def read_inclusion(text: str) -> tuple[int, list[bytes], str, list[tuple[str, bytes, bytes]]]:
    if re.search(r"[\x00-\x09\x0b-\x1f]", text) or not text.endswith("\n"):
        raise NotRead("control characters, or no last newline")
    number = "(0|[1-9][0-9]{0,15})"
    lines = re.fullmatch(
        rf"c2sp[.]org/tlog-proof@v1\nindex {number}\n((?:[^\n]+\n)*)\n"
        rf"((pinaivu/log/node_[0-9a-f]{{64}}/{number}\n){number}\n([^\n]+)\n)\n((?:[^\n]+\n)+)",
        text,
    )
    if not lines:
        raise NotRead("lines")
    index, hash_lines, checkpoint, _, _, size, root, signatures = lines.groups()
    if len(text.split("\n\n", 1)[1].encode()) > 65536:
        raise NotRead("too long")
    hashes = [unbase64(line) for line in hash_lines.splitlines()]
    root_hash = unbase64(root)
    empty = hashlib.sha256(b"").digest()
    if len(hashes) > 63 or any(len(each) != 32 for each in (*hashes, root_hash)):
        raise NotRead("hashes")
    if int(size) > 2**53 or (int(size) == 0 and root_hash != empty):
        raise NotRead("size")
    found = [read_signature(line) for line in signatures[:-1].split("\n")]
    if len(found) > 64 or len({each[:2] for each in found}) < len(found):
        raise NotRead("signatures")
    return int(index), hashes, checkpoint, found


def read_signature(line: str) -> tuple[str, bytes, bytes]:
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] != "\u2014" or not re.fullmatch(r"[^\s+]{1,256}", parts[1]):
        raise NotRead("signature")
    data = unbase64(parts[2])
    if len(data) < 5:
        raise NotRead("signature")
    return parts[1], data[:4], data[4:]


def is_own(name: str, key_id: bytes, origin: str, owner: str) -> bool:
    return name == origin and key_id == key_id_of(origin, 1, owner)


def key_id_of(name: str, kind: int, node_id: str) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key(node_id)).digest()[:4]


def cosigner(name: str, key_id: bytes, data: bytes, checkpoint: str) -> str | None:
    """Whose cosignature it is; None if it is nobody's."""
    prefix = "pinaivu/witness/"
    node_id = name.removeprefix(prefix)
    if not name.startswith(prefix) or not re.fullmatch("node_[0-9a-f]{64}", node_id):
        return None
    time = int.from_bytes(data[:8], "big")
    message = f"cosignature/v1\ntime {time}\n{checkpoint}".encode()
    right = key_id == key_id_of(name, 4, node_id) and len(data) == 72 and time <= 253402300799
    return node_id if right and verifies(node_id, message, data[8:]) else None


def leads(receipt: bytes, index: int, size: int, hashes: list[bytes], root: bytes) -> bool:
    """As the example on the page, which is run for it."""
    names: Json = {"receipt": receipt, "index": index, "size": size}
    names |= {"hashes": hashes, "root": root}
    exec(example("whether `hashes` lead"), names)
    return names["included"] is True


def example(beginning: str) -> str:
    """The Python example on the page that begins with this comment."""
    found = re.findall(r"```python\n(# .*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [code for code in found if code.startswith(f"# {beginning}")]
    return str(code)
