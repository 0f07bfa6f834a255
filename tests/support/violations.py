"""What a serving member can say that is not so, and how its reputation puts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.receipts.receipt import PROOF_DOMAIN, EngineBuild, Price
from pinaivu_box.transport.link import Stream
from tests.support.fake_peer import Violation
from tests.support.keys import known_identity

OTHER = known_identity(77)  # somebody else's key
NAN = float("nan")
ELSE = "ab" * 32
NONE = "invalid proof"


def about(**changes: Any) -> Violation:
    """A proof that it signs itself, about something else."""
    return Violation(proof=lambda proof: replace(proof, **changes))


def counts(name: str, more: int) -> Violation:
    return Violation(proof=lambda proof: replace(proof, **{name: getattr(proof, name) + more}))


def signed_by(identity: Identity) -> Violation:
    def again(proved: leg_wire.LegProof) -> leg_wire.LegProof:
        return leg_wire.LegProof(
            proved.signed, identity.sign(PROOF_DOMAIN, proved.signed.encode()).hex()
        )

    return Violation(proved=again)


def text_of_proof(change: Any) -> Violation:
    """Signed by itself, whatever it is."""

    def again(proved: leg_wire.LegProof) -> leg_wire.LegProof:
        signed = change(proved.signed)
        identity = known_identity(66)
        return leg_wire.LegProof(signed, identity.sign(PROOF_DOMAIN, signed.encode()).hex())

    return Violation(proved=again)


def spelled(name: str, change: Callable[[str], str]) -> Violation:
    """What it gives of its proof, otherwise written."""
    return Violation(proved=lambda one: replace(one, **{name: change(getattr(one, name))}))


def otherwise(name: str, change: Callable[[str], str]) -> Violation:
    """A proof that it signs itself, with one of its words otherwise written."""
    return Violation(proof=lambda one: replace(one, **{name: change(getattr(one, name))}))


def began(**changes: Any) -> Violation:
    return Violation(began=lambda one: replace(one, **changes))


def nan(one: leg_wire.LegStarted) -> leg_wire.LegStarted:
    return replace(one, sampling=replace(one.sampling, temperature=NAN))


def last(**changes: Any) -> Violation:
    return Violation(last=lambda one: replace(one, outputs=[replace(one.outputs[0], **changes)]))


def first(**changes: Any) -> Violation:
    return Violation(first=lambda one: replace(one, outputs=[replace(one.outputs[0], **changes)]))


def dearer(*prices: str, currency: str = "credits") -> Violation:
    return about(price=Price(currency, *prices))


NO = leg_wire.LegRefused("x", "I\x1b[2J\n\nwill not", other=True)
FAULT = leg_wire.LegRefused("invalid_body", "so there")
LOGPROB = TokenLogprob(b"a", -1.0, [])
# What it does, and how its reputation puts it.
VIOLATIONS: dict[str, tuple[Violation, str]] = {
    "a proof that somebody else signed": (signed_by(OTHER), "signature of the proof"),
    "a signature that is none": (
        Violation(proved=lambda p: replace(p, signature="0" * 128)), "signature of the proof"
    ),
    "tokens that were not made": (counts("completion_tokens", 1), "another completion_tokens"),
    "fewer tokens than it made": (counts("completion_tokens", -1), "another completion_tokens"),
    "a longer prompt": (counts("prompt_tokens", 1000), "another prompt_tokens"),
    "a prompt that was cached": (counts("cached_tokens", 3), "another cached_tokens"),
    "a negative count": (about(shifted_tokens=-5), "another shifted_tokens"),
    "another prompt": (about(prompt_commitment=ELSE), "another prompt_commitment"),
    "another output": (about(output_commitment=ELSE), "another output_commitment"),
    "another request": (about(request_id="req_" + "1" * 26), "another request_id"),
    "another leg": (counts("leg", 1), "another leg"),
    "another choice": (counts("choice", 1), "another choice"),
    "another model": (about(model="fake:2"), "another model"),
    "a queue without end": (first(queue_ms=float("inf")), "not what was expected"),
    "more in its cache than there is": (first(cached_tokens=2**30), "tokens than there are"),
    "another file in the proof": (about(model_digest=ELSE), "another model_digest"),
    "another server": (about(node_id=OTHER.node_id), "another node_id"),
    "another engine": (about(engine=EngineBuild("better", "H100")), "another engine"),
    "another seed in the proof": (about(sampling={"seed": "8"}), "another sampling"),
    "another end": (about(finish_reason="stop"), "another finish_reason"),
    "a witness of its own": (about(witness=OTHER.node_id), "another witness"),
    "a mark in its proof": (about(mark="ab" * 64), "another mark"),
    "an older version": (about(v=1), "another v"),
    "a newer version": (about(v=3), "another v"),
    "a version that nobody asked for": (began(proof=3), "a version"),
    "numbers in an older version": (about(logits_sha256=ELSE), "the fields of its version"),
    "an exactness without numbers": (
        Violation(
            began=lambda one: replace(one, exactness="statistical"),
            proof=lambda one: replace(one, v=4, exactness="statistical"),
        ),
        "the fields of its version",
    ),
    "an exactness that was not promised": (
        Violation(
            began=lambda one: replace(one, exactness="statistical"),
            proof=lambda one: replace(one, v=4, exactness="bitwise:x", logits_sha256=ELSE),
        ),
        "another exactness",
    ),
    "the older version, and the newer proof": (began(proof=1), "mark"),
    "a higher price": (dearer("0.001", "0.001", "0.002"), "higher price than offered"),
    "another currency": (dearer("0", "0", "0", currency="gold"), "higher price than offered"),
    "a price that is none": (dearer("x", "0", "0"), "a price in the proof"),
    "a line break after its signature": (spelled("signature", lambda t: t + "\n"), "expected"),
    "its signature in capitals": (spelled("signature", str.upper), "expected"),
    "spaces in its signature": (spelled("signature", lambda t: f" {t[:-1]}"), "expected"),
    "a line break after its mark": (Violation(mark=lambda t: t + "\n"), "expected"),
    "its mark in capitals": (Violation(mark=str.upper), "expected"),
    "a line break after its proof": (text_of_proof(lambda t: t + "\n"), "canonical form"),
    "a byte order mark before it": (text_of_proof(lambda t: "\ufeff" + t), NONE),
    "a field twice": (text_of_proof(lambda t: t[:-1] + ',"v":1}'), NONE),
    "a digest in capitals": (began(digest=ELSE.upper()), "expected"),
    "a line break after a digest": (began(digest=ELSE + "\n"), "expected"),
    "a nonce in capitals": (began(nonce=ELSE.upper()), "expected"),
    "a line break after a nonce": (began(nonce=ELSE + "\n"), "expected"),
    "a device with a line break": (began(device="cpu\n"), "expected"),
    "a build that moves the cursor": (began(build="\x1b[2J"), "expected"),
    "another spelling of the server": (otherwise("node_id", str.upper), NONE),
    "a line break after the server": (otherwise("node_id", lambda t: t + "\n"), NONE),
    "a request with a line break": (otherwise("request_id", lambda t: t + "\n"), NONE),
    "a file in capitals": (otherwise("model_digest", str.upper), NONE),
    "a commitment in capitals": (otherwise("output_commitment", str.upper), NONE),
    "a prompt with a line break": (
        otherwise("prompt_commitment", lambda t: t + "\n"), NONE
    ),
    "a time with a line break": (otherwise("started_at", lambda t: t + "\n"), NONE),
    "a time that is none": (about(started_at="=1+1"), NONE),
    "a time before it began": (about(duration_ms=-1), NONE),
    "a price with a line break": (dearer("0\n", "0", "0"), "a price in the proof"),
    "a price in other digits": (dearer("\u0660", "0", "0"), "a price in the proof"),
    "spaces in its proof": (text_of_proof(lambda t: t.replace(",", ", ")), "canonical form"),
    "one more field": (text_of_proof(lambda t: t[:-1] + ',"z":1}'), NONE),
    "no proof in the proof": (text_of_proof(lambda t: "[]"), NONE),
    "a proof nested too deeply": (text_of_proof(lambda t: "[" * 90_000), NONE),
    "no proof at all": (Violation(proved=lambda _: None), "no proof"),
    "two proofs": (Violation(proved=lambda p: [p, p]), "unexpected message"),
    "another file": (began(digest=ELSE), "another file"),
    "another seed": (Violation(sampling={"seed": 8}), "other sampling parameters"),
    "a penalty": (Violation(sampling={"presence_penalty": 1.0}), "other sampling parameters"),
    "a bias": (Violation(sampling={"logit_bias": {"5": 100.0}}), "other sampling parameters"),
    "a temperature that is none": (Violation(sampling={"temperature": 9.0}), "expected"),
    "a temperature that is no number": (Violation(began=nan), "expected"),
    "a top-k that is none": (Violation(sampling={"top_k": -1}), "expected"),
    "a way of writing calls that is none": (began(tool_style="runes"), "format of tool calls"),
    "two beginnings": (Violation(began=lambda one: [one, one]), "unexpected message"),
    "no beginning": (Violation(began=lambda _: None), "unexpected message"),
    "two prompts": (Violation(read=lambda one: [one, one]), "unexpected message"),
    "no prompt": (Violation(read=lambda _: None), "unexpected message"),
    "a prompt without end": (
        Violation(read=lambda one: replace(one, tokens=[1] * 100_000)), "prompt"
    ),
    "a mark of nothing": (Violation(mark=lambda _: "00" * 64), "mark"),
    "an output that is empty": (
        Violation(first=lambda one: replace(one, outputs=[])), "unexpected message"
    ),
    "more tokens than were asked for": (Violation(count=21), "more tokens"),
    "much more text than tokens": (Violation(text=lambda text: text + "a" * 100_000), "text"),
    "an end that is none": (last(finish_reason="because"), "unknown finish reason"),
    "an end that nobody wanted": (Violation(reason="cancelled"), "cancelled"),
    "it goes on after the end": (first(finish_reason="length"), "proof"),
    "an end within": (
        Violation(last=lambda one: replace(one, outputs=one.outputs * 2)), "after the end"
    ),
    "a stop string that nobody gave": (last(stop_string="secret"), "stop"),
    "log-probabilities that nobody wanted": (first(logprobs=[LOGPROB]), "log-prob"),
    "vectors that nobody wanted": (first(vectors=[b"1234"]), "vectors"),
    "it gives up in the middle": (Violation(last=lambda _: NO), "gave up: I"),
    "it finds fault in the middle": (Violation(last=lambda _: FAULT), "so there"),
}  # fmt: skip


async def ends(peer: str, stream: Stream) -> None:
    await leg_wire.receive(stream, leg_wire.to_serving)
    await stream.finish()
