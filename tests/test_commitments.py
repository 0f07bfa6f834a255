"""What a receipt commits to: text, tokens, log-probabilities, vectors; and the receipts of before.

`receipts_v1.json` holds receipts of version 1 as a box of that version signed them, with the
requests and the answers.  The canonical bytes are computed here a second time, from
`docs/receipts.md` alone.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pinaivu_box.receipts.verify import Transcript, VerificationCheck, verify_receipt
from tests.support.process_box import Box
from tests.support.receipt_verifier import verify_offline

OLD: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).with_name("receipts_v1.json")).read_text()
)
CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "Say hello."}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vectors": (EMBED, {"input": ["a cat", "the sea", "a cat"]}),
    "short vectors": (EMBED, {"input": "the sea", "dimensions": 120}),
    "base64": (EMBED, {"input": ["a cat", "the sea"], "encoding_format": "base64"}),
    "chat": (CHAT, {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}),
    "choices": (CHAT, {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "n": 2}),
    "completion": (COMPLETE, {"prompt": ["One,", "Zwölf"], "max_tokens": 4, "logprobs": 2}),
    "echo": (COMPLETE, {"prompt": "Zwölf", "max_tokens": 3, "logprobs": 1, "echo": True}),
    "stop": (CHAT, {"messages": MESSAGES, "max_tokens": 40, "logprobs": True, "stop": ["fox"]}),
    "plain": (CHAT, {"messages": MESSAGES, "max_tokens": 6}),
}
VECTORS = ("vectors", "short vectors", "base64")
LOGPROBS = ("chat", "choices", "completion", "echo", "stop")


class Kept:
    """A request, its answer and its receipt, as the owner of the key keeps them."""

    def __init__(self, box: Box, path: str, request: dict[str, Any]) -> None:
        self.request = {"model": "fake:1", **request}
        answer = box.http("POST", path, json=self.request)
        assert answer.status_code == 200, answer.text
        self.data = answer.content
        self.document = box.http("GET", f"/v1/receipts/{self.answer['request_id']}").content

    @property
    def answer(self) -> dict[str, Any]:
        """A fresh copy, to be changed."""
        return dict(json.loads(self.data))

    @property
    def opening(self) -> dict[str, Any]:
        return dict(json.loads(self.document)["opening"])

    @property
    def receipt(self) -> dict[str, Any]:
        return dict(json.loads(json.loads(self.document)["signed_receipt"]))

    def failed(self, answer: Any = None) -> list[str]:
        """The checks that an answer (or else its own) does not pass."""
        data = self.data if answer is None else json.dumps(answer).encode()
        echoed = [self.request["prompt"]] if self.request.get("echo") else []
        given = Transcript(answer=data, echoed=echoed)
        return names(verify_receipt(self.document, transcript=given))


def checks(document: bytes, answer: bytes) -> list[VerificationCheck]:
    return verify_receipt(document, transcript=Transcript(answer=answer))


def names(of: list[VerificationCheck]) -> list[str]:
    return [one.name for one in of if not one.ok]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kept]]:
    home = tmp_path_factory.mktemp("commitments") / "home"
    home.mkdir()
    box = Box(home, "--model", "fake:1=fake:1").start()
    yield {name: Kept(box, *asked) for name, asked in BODIES.items()}
    box.end()


# -- an implementation of `docs/receipts.md` by somebody else ------------------------------------


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def named(name: bytes) -> bytes:
    return struct.pack("<I", len(name)) + name


def number(value: float | None) -> bytes:
    return b"\0" if value is None else b"\1" + struct.pack("<d", value)


def record(token: bytes, logprob: float | None, top: list[tuple[bytes, float]]) -> bytes:
    likeliest = b"".join(named(name) + number(value) for name, value in top)
    return named(token) + number(logprob) + struct.pack("<I", len(top)) + likeliest


def records(choice: dict[str, Any]) -> bytes:
    logprobs = choice["logprobs"]
    if logprobs is None:
        return b""
    if "content" in logprobs:
        return b"".join(
            record(
                bytes(one["bytes"]),
                one["logprob"],
                [(bytes(likely["bytes"]), likely["logprob"]) for likely in one["top_logprobs"]],
            )
            for one in logprobs["content"]
        )
    return b"".join(
        record(
            token.encode(),
            logprob,
            sorted((name.encode(), value) for name, value in (top or {}).items()),
        )
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
    )


def vector(given: list[float] | str) -> bytes:
    data = (
        base64.b64decode(given)
        if isinstance(given, str)
        else b"".join(struct.pack("<f", one) for one in given)
    )
    return struct.pack("<I", len(data) // 4) + data


@pytest.mark.parametrize("name", BODIES)
def test_the_commitment_can_be_computed_from_the_documentation(
    kept: dict[str, Kept], name: str
) -> None:
    of = kept[name]
    opening, receipt, choices = of.opening["output"], of.receipt, of.answer.get("choices", [])
    if name in VECTORS:
        text, digests = "", [sha256()]
        vectors = sha256(*(vector(one["embedding"]) for one in of.answer["data"]))
    else:
        texts = [one["text"] if "text" in one else one["message"]["content"] for one in choices]
        texts = [text.removeprefix("Zwölf") if name == "echo" else text for text in texts]
        text = texts[0] if len(texts) == 1 else json.dumps(texts, separators=(",", ":"))
        digests, vectors = [sha256(records(one)) for one in choices], sha256()
    assert receipt["v"] == 2
    assert (
        receipt["output_commitment"]
        == sha256(
            b"pinaivu/commitment/v2\n",
            bytes.fromhex(opening["nonce"]),
            sha256(text.encode()),
            bytes.fromhex(opening["tokens_sha256"]),
            sha256(*digests),
            vectors,
        ).hex()
    )
    for signed, leg in zip(receipt["proofs"], of.opening["legs"], strict=True):
        proof = json.loads(signed["signed"])
        assert proof["v"] == (2 if name in VECTORS else 4)
        own = digests[proof["choice"]]
        assert leg["logprobs_sha256"] == sha256(own).hex()
        assert leg["vectors_sha256"] == vectors.hex()


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_is_the_one_committed_to(kept: dict[str, Kept], name: str) -> None:
    assert kept[name].failed() == []
    if name == "echo":  # without the request nobody knows where its text begins
        assert names(checks(kept[name].document, kept[name].data)) == ["output commitment"]
    other = next(one for key, one in kept.items() if key != name)
    assert "answer" in names(checks(other.document, kept[name].data))


# -- vectors ---------------------------------------------------------------------------------------


def encoded(packed: bytes, like: list[float] | str) -> list[float] | str:
    if isinstance(like, str):
        return base64.b64encode(packed).decode()
    return list(struct.unpack(f"<{len(packed) // 4}f", packed))


@pytest.mark.parametrize("name", VECTORS)
def test_any_byte_of_a_vector_that_is_flipped_is_found(kept: dict[str, Kept], name: str) -> None:
    answer = kept[name].answer
    for place, one in enumerate(answer["data"]):
        held = one["embedding"]
        packed = vector(held)[4:]
        every = 1 if name == "short vectors" else 23 if place == 0 else 97
        for at in range(0, len(packed), every):
            for bit in (1, 128) if at % 4 == 3 else (1,):
                changed = bytearray(packed)
                changed[at] ^= bit
                if not isinstance(held, str) and b"\x80\x7f" in changed:
                    continue  # JSON has no infinity
                one["embedding"] = encoded(bytes(changed), held)
                assert kept[name].failed(answer) == ["vectors commitment"], (place, at, bit)
        one["embedding"] = held
    assert kept[name].failed(answer) == []


Change = Callable[[list[Any]], Any]
WRONG_VECTORS: dict[str, Change] = {
    "one number less": lambda vectors: vectors[0].pop(),
    "one number less in each": lambda vectors: [one.pop() for one in vectors],
    "one number more": lambda vectors: vectors[0].append(0.0),
    "one vector less": lambda vectors: vectors.pop(),
    "one vector more": lambda vectors: vectors.append(vectors[0]),
    "none": lambda vectors: vectors.clear(),
    "in another order": lambda vectors: vectors.insert(0, vectors.pop()),
    "cut elsewhere": lambda vectors: vectors[1].insert(0, vectors[0].pop()),
    "a number that is no float32": lambda vectors: vectors.__setitem__(0, [0.1, *vectors[0][1:]]),
    "a number beyond float32": lambda vectors: vectors[0].__setitem__(0, 1e39),
    "no base64": lambda vectors: vectors.__setitem__(0, "AAA"),
    "base64 of half a number": lambda vectors: vectors.__setitem__(0, "AAAA"),
}


@pytest.mark.parametrize("name", WRONG_VECTORS)
def test_other_vectors_or_dimensions_are_found(kept: dict[str, Kept], name: str) -> None:
    of = kept["vectors"]
    vectors = [one["embedding"] for one in of.answer["data"]]
    assert of.failed(vectors) == []  # the vectors alone are enough
    WRONG_VECTORS[name](vectors)
    assert of.failed(vectors)
    body = of.answer
    body["data"] = [{"index": n, "embedding": one} for n, one in enumerate(vectors)]
    assert of.failed(body)


def test_the_same_vectors_are_the_same_in_any_form(kept: dict[str, Kept]) -> None:
    """Numbers, base64, and numbers as short as float32 allows."""
    of = kept["vectors"]
    vectors = [one["embedding"] for one in of.answer["data"]]
    packed = [vector(one)[4:] for one in vectors]
    assert of.failed([base64.b64encode(one).decode() for one in packed]) == []
    short = [[float(str(np.float32(number))) for number in one] for one in vectors]
    assert short != vectors
    assert of.failed(short) == []
    near = [[number * (1 + 2**-40) for number in one] for one in vectors]
    assert [vector(one)[4:] for one in near] == packed
    assert of.failed(near) == ["answer"]  # these are numbers that the box cannot have sent
    assert of.failed(["not", "vectors"]) == ["answer"]
    assert names(checks(of.document, b"some text")) == ["answer"]


# -- log-probabilities -----------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[list[Any] | dict[str, Any], Any]]:
    """Everything in it that is neither a list nor a dictionary: what holds it, and where."""
    for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if isinstance(one, list | dict):
            yield from places(one)
        else:
            yield value, key


def another(value: Any) -> Any:
    """As close to it as its type allows."""
    if isinstance(value, str):
        return value + "x" if value else "x"
    if isinstance(value, int):
        return (value + 1) % 256
    if isinstance(value, float):
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return struct.unpack("<d", struct.pack("<q", bits ^ 1))[0]
    return -1.0


@pytest.mark.parametrize("name", LOGPROBS)
def test_any_log_probability_or_token_that_is_changed_is_found(
    kept: dict[str, Kept], name: str
) -> None:
    of = kept[name]
    held = of.answer
    changed = 0
    for choice in held["choices"]:
        choice["logprobs"].pop("text_offset", None)  # follows from the text
        choice["logprobs"].pop("refusal", None)
        for where, key in places(choice["logprobs"]):
            value = where[key]
            where[key] = another(value)
            assert of.failed(held), (key, value)
            where[key] = value
            changed += 1
    assert changed > 5
    assert of.failed(held) == []


WRONG_LOGPROBS: dict[str, Callable[[list[Any]], Any]] = {
    "one token less": lambda content: content.pop(),
    "one token more": lambda content: content.append(content[-1]),
    "in another order": lambda content: content.reverse(),
    "none": lambda content: content.clear(),
    "one of the likeliest less": lambda content: content[0]["top_logprobs"].pop(),
    "the likeliest in another order": lambda content: content[0]["top_logprobs"].reverse(),
    "no bytes": lambda content: content[0].__setitem__("bytes", None),
    "bytes that are none": lambda content: content[0].__setitem__("bytes", [300]),
    "the bytes of another text": lambda content: content[0].__setitem__("bytes", [88]),
}


@pytest.mark.parametrize("name", WRONG_LOGPROBS)
def test_other_log_probabilities_are_found(kept: dict[str, Kept], name: str) -> None:
    answer = kept["chat"].answer
    WRONG_LOGPROBS[name](answer["choices"][0]["logprobs"]["content"])
    (found,) = kept["chat"].failed(answer)
    assert found in ("log-probabilities commitment", "answer")


def test_log_probabilities_that_were_taken_out_or_put_in_are_found(kept: dict[str, Kept]) -> None:
    with_, without = kept["chat"].answer, kept["plain"].answer
    logprobs = with_["choices"][0]["logprobs"]
    with_["choices"][0]["logprobs"] = None
    without["choices"][0]["logprobs"] = logprobs
    assert kept["chat"].failed(with_) == ["log-probabilities commitment"]
    assert kept["plain"].failed(without) == ["log-probabilities commitment"]


def test_the_choices_log_probabilities_are_apart(kept: dict[str, Kept]) -> None:
    answer = kept["choices"].answer
    first, second = (one["logprobs"]["content"] for one in answer["choices"])
    second.insert(0, first.pop())
    assert kept["choices"].failed(answer) == ["log-probabilities commitment"]


def test_text_alone_can_still_be_checked(kept: dict[str, Kept]) -> None:
    of = kept["chat"]
    text = of.answer["choices"][0]["message"]["content"]
    assert names(checks(of.document, text.encode())) == []
    assert names(checks(of.document, text.encode() + b".")) == ["output commitment"]
    assert names(checks(of.document, b"\xff")) == ["answer"]


@pytest.mark.parametrize("more", [{"reasoning_content": "hm"}, {"tool_calls": [{"id": "x"}]}])
def test_text_that_is_not_in_the_answer_is_not_said_to_be_right(
    kept: dict[str, Kept], more: dict[str, Any]
) -> None:
    """Its log-probabilities are checked all the same."""
    answer = kept["chat"].answer
    answer["choices"][0]["message"] |= more
    assert kept["chat"].failed(answer) == ["output commitment"]
    answer["choices"][0]["logprobs"]["content"].pop()
    assert kept["chat"].failed(answer) == ["output commitment", "log-probabilities commitment"]


@pytest.mark.parametrize("part", ["nonce", "tokens_sha256", "text_sha256", "logprobs_sha256",
                                  "vectors_sha256"])  # fmt: skip
def test_an_opening_is_of_this_very_commitment(kept: dict[str, Kept], part: str) -> None:
    """Whoever gives another digest with the vectors that lead to it gets nowhere."""
    for of in (kept["vectors"], kept["chat"]):
        for value in ("0" * 64, "", "zz", "0" * 62):
            document = json.loads(of.document)
            document["opening"]["output"][part] = value
            assert names(checks(json.dumps(document).encode(), of.data))


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vectors", "base64", "chat", "completion", "echo"])
def test_the_command_takes_bodies_of_request_and_answer(
    kept: dict[str, Kept], tmp_path: Path, name: str
) -> None:
    of = kept[name]
    receipt, request, answer = (tmp_path / one for one in ("receipt", "request", "answer"))
    receipt.write_bytes(of.document)
    request.write_text(json.dumps(of.request))
    answer.write_bytes(of.data)
    given = (str(receipt), "--request", str(request), "--answer", str(answer))
    done = verify_offline(*given, "--json", home=tmp_path / "none")
    found = {one["name"]: one["ok"] for one in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    what = "vectors" if name in VECTORS else "log-probabilities"
    assert {"prompt commitment", "answer", f"{what} commitment"} <= set(found)
    changed = {key: [*value] if isinstance(value, list) else [value]
               for key, value in of.request.items() if key in ("input", "prompt")}  # fmt: skip
    changed = {**of.request, **{key: [*value, "more"] for key, value in changed.items()}}
    if name == "chat":
        changed["messages"] = [{"role": "user", "content": "Say nothing."}]
    request.write_text(json.dumps(changed))
    done = verify_offline(*given, home=tmp_path / "none")
    assert done.returncode == 1
    assert b"FAILED prompt commitment" in done.stdout


# -- receipts of version 1 -------------------------------------------------------------------------


@pytest.mark.parametrize("name", OLD)
def test_a_receipt_of_version_1_verifies(name: str, tmp_path: Path) -> None:
    """Of a chat, several choices or prompts, an answer of two legs, one of a peer, and vectors."""
    document = json.dumps(OLD[name]["receipt"]).encode()
    assert names(verify_receipt(document)) == []
    signed = json.loads(OLD[name]["receipt"]["signed_receipt"])
    assert (signed["v"], len(signed["proofs"])) == (1, {"choices": 3, "completions": 2, "legs": 2}
                                                    .get(name, 1))  # fmt: skip
    for at in range(0, len(document), 97):
        changed = bytearray(document)
        changed[at] ^= 1
        if changed[at : at + 1] not in b'"\\' and b"opening" not in document[max(0, at - 9) : at]:
            told = names(verify_receipt(bytes(changed)))
            assert told or at > document.index(b'"opening"'), at


@pytest.mark.parametrize("name", OLD)
def test_of_version_1_the_text_is_checked_and_the_rest_is_said_to_be_open(name: str) -> None:
    old = OLD[name]
    answer = old["answer"]
    data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
    found = names(checks(json.dumps(old["receipt"]).encode(), data))
    uncommitted = {"chat", "completions", "embeddings", "peer embeddings"}
    assert found == (["answer"] if name in uncommitted else [])
    if "choices" in answer:
        plain = copy.deepcopy(answer)
        for choice in plain["choices"]:
            choice["logprobs"] = None
        document = json.dumps(old["receipt"]).encode()
        assert names(checks(document, json.dumps(plain).encode())) == []
        text = plain["choices"][0]
        (text if "text" in text else text["message"])["text" if "text" in text else "content"] += (
            "."
        )
        assert "output commitment" in names(checks(document, json.dumps(plain).encode()))


def test_a_version_that_is_not_known_is_said(kept: dict[str, Kept]) -> None:
    document = json.loads(kept["plain"].document)
    document["signed_receipt"] = document["signed_receipt"].replace('"v":2}', '"v":4}')
    first = verify_receipt(json.dumps(document).encode())[0]
    assert not first.ok and "version 4" in first.meaning and "1, 2, 3" in first.meaning
