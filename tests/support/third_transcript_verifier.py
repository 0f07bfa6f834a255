"""The checks of a transcript, written from `docs/receipts.md` and nothing else, beside those of its
receipt (`third_verifier`)."""

from __future__ import annotations

import hashlib
from typing import Any

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey

from tests.support.third_verifier import (
    OBJECTS,
    Json,
    NotRead,
    Verdicts,
    check,
    example,
    of_proofs,
    parse,
    read,
    unbase64,
    verdicts,
)

OBJECTS |= {
    "transcript": "A transcript", "transcript prompt": "A transcript prompt",
    "transcript leg": "A transcript leg", "opening": "An opening",
}  # fmt: skip


def with_transcript(document: bytes, transcript: bytes, secret: str | None) -> Verdicts:
    """The checks of a receipt and those of its transcript."""
    checks = verdicts(document)
    if len(checks) < 3:
        return checks  # nothing else is made
    view = read(document.decode(), "The document")
    receipt = read(view["signed_receipt"], "The receipt")
    try:
        found = read_transcript(transcript, secret)
        proofs = proofs_of(receipt)
        fits(found, receipt, proofs)
        openings = openings_of(view["opening"] or {}, proofs)
    except (NotRead, UnicodeDecodeError):
        return [*checks, ("transcript", False)]
    legs = [
        (f"transcript {number}", holds(found, proof, *openings[number]))
        for number, proof in enumerate(proofs)
    ]
    return [*checks, ("transcript", True), *legs]


def read_transcript(data: bytes, secret: str | None) -> Json:
    value = parse(data.decode())
    if isinstance(value, dict) and "prompts" in value:
        return read(data.decode(), "A transcript")
    answer = read(data.decode(), "The answer")
    if (answer["transcript"] is None) == (answer["sealed"] is None):
        raise NotRead("one of both")
    found = answer["transcript"]
    if found is None:
        found = read(opened(answer, secret), "A transcript")
    else:
        check(found, "A transcript")
    if found["request_id"] != answer["request_id"]:
        raise NotRead("another request")
    result: Json = found
    return result


def opened(answer: Json, secret: str | None) -> str:
    """As the example on the page does it, which is run."""
    unbase64(answer["sealed"])
    if secret is None:
        raise NotRead("no key")
    names: Json = {"api_key": secret, "sealed": answer["sealed"]}
    try:
        exec(example("the JSON in a sealed transcript"), names)
    except (CryptoError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise NotRead("another key") from error
    public = bytes(PrivateKey(names["private"]).public_key).hex()
    if answer["sealed_to"] not in (None, public):
        raise NotRead("sealed to another key")
    return str(names["content"])


def proofs_of(receipt: Json) -> list[Json]:
    """Raises NotRead unless all of them hold."""
    made = [name for name, _ in of_proofs(receipt)]
    if "legs" not in made or not receipt["proofs"]:
        raise NotRead("proofs")
    found = []
    for each in receipt["proofs"]:
        value: Json = parse(each["signed"])
        check(value, "Legs of upstreams" if value.get("kind") else "The proof")
        found.append(value)
    return found


def is_of_upstream(proof: Json) -> bool:
    return "upstream" in proof


def fits(transcript: Json, receipt: Json, proofs: list[Json]) -> None:
    """Raises NotRead."""
    prompts = [each["prompt"] for each in transcript["prompts"]]
    legs = [(each["choice"], each["leg"]) for each in transcript["legs"]]
    made = [proof for proof in proofs if not is_of_upstream(proof)]
    right = (
        transcript["request_id"] == receipt["request_id"]
        and transcript["model"] == receipt["model"]
        and len(set(prompts)) == len(prompts)
        and len(set(legs)) == len(legs)
        and set(prompts) <= {proof["prompt"] for proof in made}
        and set(legs) <= {(proof["choice"], proof["leg"]) for proof in made}
    )
    if not right:
        raise NotRead("another transcript")


def openings_of(opening: Json, proofs: list[Json]) -> list[tuple[Json, Json]]:
    prompts: Any = opening.get("prompts", [opening.get("prompt")])
    legs: Any = opening.get("legs")
    for several in (prompts, legs):
        if not isinstance(several, list):
            raise NotRead("openings")
        for each in several:
            check(each, "An opening")
    if len(legs) != len(proofs) or any(not 0 <= proof["prompt"] < len(prompts) for proof in proofs):
        raise NotRead("openings")
    return [(prompts[proof["prompt"]], leg) for proof, leg in zip(proofs, legs, strict=True)]


def holds(transcript: Json, proof: Json, prompt: Json, output: Json) -> bool:
    if is_of_upstream(proof):
        return False
    asked = [each for each in transcript["prompts"] if each["prompt"] == proof["prompt"]]
    where = (proof["choice"], proof["leg"])
    made = [each for each in transcript["legs"] if (each["choice"], each["leg"]) == where]
    return (
        bool(asked and made)
        and committed(asked[0]["asked"], asked[0]["tokens"], prompt, 1)
        == proof["prompt_commitment"]
        and committed(made[0]["text"], made[0]["tokens"], output, 1 if proof["v"] == 1 else 2)
        == proof["output_commitment"]
        and len(asked[0]["tokens"]) == proof["prompt_tokens"]
        and len(made[0]["tokens"]) == proof["completion_tokens"]
    )


def committed(text: str, tokens: list[int], opening: Json, version: int) -> str:
    """Empty if the opening is not of the text and the tokens, or of another version."""

    def digest(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    parts: list[Any] = [
        bytes.fromhex(opening["nonce"]),
        digest(text.encode()),
        digest(b"".join(token.to_bytes(4, "little") for token in tokens)),
    ]
    extras = [opening[name] for name in ("text_sha256", "logprobs_sha256", "vectors_sha256")]
    if opening["tokens_sha256"] != parts[2].hex():
        return ""
    if version == 1 and any(extras):
        return ""
    if version == 2:
        if extras[0] != parts[1].hex() or not all(extras):
            return ""
        parts += map(bytes.fromhex, extras[1:])
    return digest(b"pinaivu/commitment/v%d\n" % version + b"".join(parts)).hex()
