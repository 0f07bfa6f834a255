"""Transcripts beside their receipts, right ones and wrong ones, for all who verify:
`tests/vectors/transcripts`.

`python -m tests.support.transcript_vectors` writes the files anew, with the names of the checks
that fail of each in `expected.json`.  A file has the `receipt` and the `transcript` as texts, and
the API key (`secret`) that opens a sealed one.  The keys are known, so the bytes are always the
same.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from nacl.public import Box, PrivateKey, PublicKey

from pinaivu_box.receipts import commitment, transcript_sealing
from pinaivu_box.receipts.commitment import Extras, Opening
from pinaivu_box.receipts.receipt import LegStatement
from pinaivu_box.receipts.verify import Transcript, VerificationCheck, verify_receipt
from tests.support import receipt_vectors

FOLDER = Path(__file__).parent.parent / "vectors" / "transcripts"
EXPECTED = FOLDER / "expected.json"
SECRET = "sk-pnv-" + "v" * 44
EXACT = {"v": 4, "exactness": "bitwise:haswell llama.cpp 1 f16", "logits_sha256": "ab" * 32}
REQUEST = "req_01m8jw26mke71a7sxaax08p8mq"
LARGEST = 2**32 - 1
Json = dict[str, Any]


class Given(NamedTuple):
    """What a verifier is given."""

    receipt: str
    transcript: str
    secret: str | None = None

    @property
    def bytes(self) -> tuple[bytes, bytes, str | None]:
        return self.receipt.encode(), self.transcript.encode(), self.secret


def by_command(receipt: bytes, transcript: bytes, secret: str | None) -> list[VerificationCheck]:
    """What `pinaivu receipts verify` says."""
    return verify_receipt(receipt, transcript=Transcript(recorded=transcript, secret=secret))


class Exchange:
    """A request with its proofs, what opens their commitments, and its transcript; whatever is
    changed in them is in `given`."""

    def __init__(self, *legs: tuple[int, int, str], prompts: int = 1, **more: Any) -> None:
        """`legs`: choice, number and text of each; the prompt of a choice has its number, as far as
        there are so many.  `more` are fields of the proofs."""
        self.prompts: list[Json] = [
            {
                "prompt": number,
                "asked": commitment.prompt_text(
                    [{"role": "user", "content": f"Grüße {number} \U0001f98a"}], ["zebra"]
                ),
                "tokens": [0, number, 65536, LARGEST],
            }
            for number in range(prompts)
        ]
        self.legs: list[Json] = [
            {"choice": choice, "leg": leg, "tokens": [*text.encode()], "text": text}
            for choice, leg, text in legs
        ]
        self.opened = [
            commitment.commit(one["asked"], one["tokens"], _nonce(f"prompt {number}"))
            for number, one in enumerate(self.prompts)
        ]
        self.proofs: list[LegStatement] = []
        self.openings: list[Opening] = []
        for number, leg in enumerate(self.legs):
            prompt = leg["choice"] % prompts
            extras = [] if more.get("v") == 1 else [_extras(leg["text"])]
            output, opening = commitment.commit(
                leg["text"], leg["tokens"], _nonce(f"leg {number}"), extras
            )
            fields = {
                "choice": leg["choice"], "leg": leg["leg"], "prompt": prompt,
                "prompt_commitment": self.opened[prompt][0], "output_commitment": output,
                "prompt_tokens": len(self.prompts[prompt]["tokens"]), "cached_tokens": 0,
                "completion_tokens": len(leg["tokens"]),
            }  # fmt: skip
            self.proofs.append(receipt_vectors.proof(**{**fields, **more}))
            self.openings.append(opening)

    @property
    def opening(self) -> Json:
        """As the owner of the key gets it."""
        prompts = [msgspec.to_builtins(opening) for _, opening in self.opened]
        legs = [msgspec.to_builtins(opening) for opening in self.openings]
        several = {"prompts": prompts} if len(prompts) > 1 else {}
        return {"prompt": prompts[0], "output": legs[0], "legs": legs, **several}

    @property
    def receipt(self) -> Json:
        shown: Json = json.loads(receipt_vectors.document(receipt_vectors.receipt(*self.proofs)))
        return {**shown, "opening": self.opening}

    @property
    def transcript(self) -> Json:
        return {
            "request_id": REQUEST, "model": receipt_vectors.MODEL, "prompts": self.prompts,
            "legs": self.legs, "tools": None, "constraint": {"kind": "regex", "text": "a+"},
            "template": {"enable_thinking": True}, "system": "", "v": 1,
        }  # fmt: skip

    def given(
        self,
        *,
        receipt: Callable[[Json], object] = lambda receipt: None,
        transcript: Callable[[Json], object] = lambda transcript: None,
        view: Callable[[Json], object] = lambda view: None,
        text: Callable[[str], str] = lambda text: text,
        secret: str | None = None,
    ) -> Given:
        """With these changes: to the receipt as it is shown, to the transcript, to the answer of
        the API that it is in, and to the text of that."""
        shown, kept = self.receipt, copy.deepcopy(self.transcript)
        receipt(shown)
        transcript(kept)
        answer: Json = {"request_id": REQUEST, "transcript": kept, "sealed": None,
                        "sealed_to": None, "object": "transcript"}  # fmt: skip
        view(answer)
        return Given(_text(shown), text(_text(answer)), secret)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _nonce(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _extras(text: str) -> Extras:
    extras = Extras()
    extras.add([commitment.logprob_record(text.encode(), -0.5, [])])
    return extras


def sealed(transcript: Json | bytes, secret: str = SECRET) -> bytes:
    """As crypto_box_seal does it, with a known key in the place of one drawn at random."""
    content = transcript if isinstance(transcript, bytes) else _text(transcript).encode()
    sender = PrivateKey(bytes(range(32)))
    to = transcript_sealing.public_half(secret)
    nonce = hashlib.blake2b(bytes(sender.public_key) + to, digest_size=24).digest()
    cipher = Box(sender, PublicKey(to)).encrypt(content, nonce).ciphertext
    return bytes(sender.public_key) + cipher


def _sealing(change: Callable[[Json], object] = lambda view: None) -> Callable[[Json], None]:
    """Seals the transcript of the API's answer, then makes a change."""

    def seal(view: Json) -> None:
        content = sealed(view["transcript"])
        to = transcript_sealing.public_half(SECRET).hex()
        view.update(transcript=None, sealed=base64.b64encode(content).decode(), sealed_to=to)
        change(view)

    return seal


def _flipped(view: Json, at: int) -> None:
    data = bytearray(base64.b64decode(view["sealed"]))
    data[at] ^= 1
    view["sealed"] = base64.b64encode(data).decode()


def _put(path: str, value: Any) -> Callable[[Json], None]:
    """Sets what stands at a path such as `legs.0.text`."""

    def put(fields: Any) -> None:
        *steps, last = path.split(".")
        for step in steps:
            fields = fields[int(step) if step.isdigit() else step]
        fields[int(last) if last.isdigit() else last] = value

    return put


def vectors() -> dict[str, Given]:
    return _right() | _other_transcripts() | _other_receipts() | _other_forms() | _sealed()


def _one(**more: Any) -> Exchange:
    return Exchange((0, 0, "Füchse \U0001f98a sind rot."), **more)


def _two_legs() -> Exchange:
    return Exchange((0, 0, "The first leg, "), (0, 1, "and the second."))


def _right() -> dict[str, Given]:
    one = _one()
    return {
        "one_box": one.given(),
        "alone": one.given(text=lambda _: _text(one.transcript)),
        "alone_with_spaces": one.given(text=lambda _: json.dumps(one.transcript, indent=2) + "\n"),
        "without_what_may_be_absent": one.given(
            transcript=lambda kept: [
                kept.pop(name) for name in ("tools", "constraint", "template", "system", "v")
            ],
            view=lambda view: [view.pop(name) for name in ("sealed", "sealed_to", "object")],
        ),
        "an_exact_leg": _one(**EXACT).given(),
        "a_proof_of_version_1": _one(v=1).given(),
        "no_tokens": Exchange((0, 0, "")).given(),
        "two_legs": _two_legs().given(),
        "two_choices": Exchange((0, 0, "One."), (1, 0, "Two.")).given(),
        "two_prompts": Exchange((0, 0, "One."), (1, 0, "Two."), prompts=2).given(),
        "legs_in_another_order": _two_legs().given(transcript=lambda kept: kept["legs"].reverse()),
    }


def _other_transcripts() -> dict[str, Given]:
    one, two = _one(), _two_legs()
    tokens, text = one.legs[0]["tokens"], one.legs[0]["text"]

    def truncated(kept: Json) -> None:
        kept["legs"][0].update(tokens=tokens[:-1], text=text[:-1])

    def cut_prompt(kept: Json) -> None:
        kept["prompts"][0]["tokens"].pop(1)

    def with_leg(kept: Json) -> None:
        kept["legs"].append({"choice": 1, "leg": 0, "tokens": [], "text": ""})

    def with_prompt(kept: Json) -> None:
        kept["prompts"].append({"prompt": 1, "asked": "{}", "tokens": []})

    def swapped(kept: Json) -> None:
        first, second = kept["legs"]
        first["leg"], second["leg"] = 1, 0

    return {
        "another_request_asked": one.given(transcript=_put("prompts.0.asked", '{"messages":[]}')),
        "another_space_in_what_was_asked": one.given(
            transcript=_put("prompts.0.asked", one.prompts[0]["asked"] + " ")
        ),
        "other_tokens_of_the_prompt": one.given(transcript=_put("prompts.0.tokens.1", 7)),
        "a_token_of_the_prompt_cut": one.given(transcript=cut_prompt),
        "another_text": one.given(transcript=_put("legs.0.text", text.replace("rot", "rar"))),
        "another_token": one.given(transcript=_put("legs.0.tokens.0", tokens[0] + 1)),
        "truncated": one.given(transcript=truncated),
        "a_token_more": one.given(transcript=_put("legs.0.tokens", [*tokens, 0])),
        "another_request_id": one.given(
            transcript=_put("request_id", REQUEST[:-1] + "r"),
            view=_put("request_id", REQUEST[:-1] + "r"),
        ),
        "another_request_id_inside": one.given(transcript=_put("request_id", REQUEST[:-1] + "r")),
        "another_request_id_outside": one.given(view=_put("request_id", REQUEST[:-1] + "r")),
        "another_model": one.given(transcript=_put("model", "other:1")),
        "a_leg_missing": two.given(transcript=lambda kept: kept["legs"].pop()),
        "a_leg_twice": one.given(transcript=lambda kept: kept["legs"].append(kept["legs"][0])),
        "a_leg_too_many": one.given(transcript=with_leg),
        "a_prompt_missing": one.given(transcript=lambda kept: kept["prompts"].pop()),
        "a_prompt_twice": one.given(
            transcript=lambda kept: kept["prompts"].append(kept["prompts"][0])
        ),
        "a_prompt_too_many": one.given(transcript=with_prompt),
        "legs_swapped": two.given(transcript=swapped),
    }


def _other_receipts() -> dict[str, Given]:
    one, two = _one(), _two_legs()
    upstream = _one()
    leg = receipt_vectors.upstream_leg(choice=1)
    upstream.proofs.append(leg)
    upstream.openings.append(commitment.commit("text", None, _nonce("upstream"), [Extras()])[1])
    lost = _one()
    signed = receipt_vectors.receipt(*lost.proofs)
    signed["proofs"][0]["signature"] = "0" * 128

    def with_another_proof(shown: Json) -> None:
        shown.update({"opening": lost.opening, **json.loads(receipt_vectors.document(signed))})

    return {
        "no_opening": one.given(receipt=_put("opening", None)),
        "no_openings_of_legs": one.given(receipt=lambda shown: shown["opening"].pop("legs")),
        "too_few_openings_of_legs": two.given(receipt=lambda shown: shown["opening"]["legs"].pop()),
        "openings_swapped": two.given(receipt=lambda shown: shown["opening"]["legs"].reverse()),
        "no_opening_of_the_second_prompt": Exchange(
            (0, 0, "One."), (1, 0, "Two."), prompts=2
        ).given(receipt=lambda shown: shown["opening"].pop("prompts")),
        "no_opening_of_the_prompt": one.given(receipt=lambda shown: shown["opening"].pop("prompt")),
        "another_nonce": one.given(receipt=_put("opening.legs.0.nonce", "0" * 64)),
        "another_nonce_of_the_prompt": one.given(receipt=_put("opening.prompt.nonce", "0" * 64)),
        "a_nonce_in_capitals": one.given(receipt=_put("opening.prompt.nonce", "AB" * 32)),
        "a_nonce_that_is_none": one.given(receipt=_put("opening.prompt.nonce", None)),
        **{
            f"another_{name}": one.given(receipt=_put(f"opening.legs.0.{name}", "0" * 64))
            for name in ("tokens_sha256", "text_sha256", "logprobs_sha256", "vectors_sha256")
        },
        "an_opening_without_vectors": one.given(
            receipt=lambda shown: shown["opening"]["legs"][0].pop("vectors_sha256")
        ),
        "a_commitment_without_log_probabilities": _of_version_1(),
        "the_tokens_as_the_text": _tokens_as_text(),
        "too_many_prompt_tokens": _one(prompt_tokens=40).given(),
        "too_many_completion_tokens": _one(completion_tokens=400).given(),
        "too_few_completion_tokens": _one(completion_tokens=3).given(),
        "an_upstream": upstream.given(),
        "a_proof_that_does_not_hold": lost.given(receipt=with_another_proof),
    }


def _of_version_1() -> Given:
    """A proof of version 2 whose commitment does not cover log-probabilities."""
    one = _one()
    leg = one.legs[0]
    output, opening = commitment.commit(leg["text"], leg["tokens"], _nonce("leg 0"))
    one.openings = [opening]
    one.proofs = [msgspec.structs.replace(one.proofs[0], output_commitment=output)]
    return one.given()


def _tokens_as_text() -> Given:
    """Another answer with the very commitment of a right one, whose parts are the same bytes cut
    elsewhere: so it would be opened if openings had any length."""
    one = Exchange((0, 0, "Foxes are red."))
    leg, opening = one.legs[0], one.openings[0]
    # The digest of the text becomes a part of the nonce, and that of the tokens, whose bytes are
    # ASCII and zeros, that of the text.
    text = b"".join(token.to_bytes(4, "little") for token in leg["tokens"]).decode()
    of_choice = _extras(leg["text"]).logprobs
    tokens = [int.from_bytes(of_choice[at : at + 4], "little") for at in range(0, 32, 4)]
    half = len(opening.vectors_sha256) // 2
    other = {
        "nonce": opening.nonce + opening.text_sha256, "text_sha256": opening.tokens_sha256,
        "tokens_sha256": opening.logprobs_sha256,
        "logprobs_sha256": opening.vectors_sha256[:half],
        "vectors_sha256": opening.vectors_sha256[half:],
    }  # fmt: skip
    one.proofs = [msgspec.structs.replace(one.proofs[0], completion_tokens=len(tokens))]

    def other_answer(kept: Json) -> None:
        kept["legs"][0].update(text=text, tokens=tokens)

    return one.given(receipt=_put("opening.legs.0", other), transcript=other_answer)


def _other_forms() -> dict[str, Given]:
    one = _one()
    ascii_only = Exchange((0, 0, "Foxes are red."))
    sealed_too = {"sealed": "AAAA"}
    return {
        "no_json": one.given(text=lambda text: text[:-1]),
        "no_object": one.given(text=lambda _: "[]"),
        "no_transcript": one.given(view=_put("transcript", None)),
        "a_receipt_in_its_place": one.given(text=lambda _: _text(one.receipt)),
        "plain_and_sealed": one.given(view=lambda view: view.update(sealed_too)),
        "another_object": one.given(view=_put("object", "receipt")),
        "another_field_outside": one.given(view=_put("note", "x")),
        "another_field": one.given(transcript=_put("note", "x")),
        "another_field_of_a_leg": one.given(transcript=_put("legs.0.note", "x")),
        "a_field_missing": one.given(transcript=lambda kept: kept["legs"][0].pop("text")),
        "a_field_twice": one.given(
            text=lambda text: text.replace('"legs":', '"legs": [], "legs":', 1)
        ),
        "another_version": one.given(transcript=_put("v", 2)),
        "a_negative_token": one.given(transcript=_put("legs.0.tokens.0", -1)),
        "a_token_beyond_32_bits": one.given(transcript=_put("legs.0.tokens.0", 2**32)),
        "a_token_with_a_point": one.given(
            text=lambda text: text.replace("[0, 0, 65536", "[0.0, 0, 65536", 1)
        ),
        "half_a_pair": ascii_only.given(
            text=lambda text: text.replace("Foxes are", "\\ud83e are", 1)
        ),
        "a_number_that_is_none": one.given(
            text=lambda text: text.replace('"enable_thinking": true', '"enable_thinking": NaN', 1)
        ),
    }


def _sealed() -> dict[str, Given]:
    one = _one()
    other = one.given(view=_sealing(), secret=SECRET[:-1] + "w")
    twice = _text(one.transcript).replace('"legs":', '"legs": [], "legs":', 1).encode()

    def no_transcript(view: Json) -> None:
        view["sealed"] = base64.b64encode(sealed(b"{}")).decode()

    def with_a_field_twice(view: Json) -> None:
        view["sealed"] = base64.b64encode(sealed(twice)).decode()

    def of_another_request(view: Json) -> None:
        kept = {**one.transcript, "request_id": REQUEST[:-1] + "r"}
        view["sealed"] = base64.b64encode(sealed(kept)).decode()

    changes: dict[str, Callable[[Json], object]] = {
        "sealed": lambda view: None,
        "sealed_without_the_key_that_it_is_sealed_to": _put("sealed_to", None),
        "sealed_to_another_key": _put("sealed_to", "ab" * 32),
        "sealed_with_another_sender": lambda view: _flipped(view, 0),
        "sealed_with_another_tag": lambda view: _flipped(view, 32),
        "sealed_with_another_byte": lambda view: _flipped(view, 60),
        "sealed_and_cut": lambda view: view.update(sealed=view["sealed"][:-4]),
        "sealed_and_cut_short": lambda view: view.update(sealed="AAAA"),
        "sealed_in_another_alphabet": lambda view: view.update(sealed=view["sealed"][:-4] + "A-_="),
        "sealed_nothing": no_transcript,
        "sealed_with_a_field_twice": with_a_field_twice,
        "sealed_of_another_request": of_another_request,
    }
    return {
        **{
            name: one.given(view=_sealing(change), secret=SECRET)
            for name, change in changes.items()
        },
        "sealed_of_another_text": one.given(
            transcript=_put("legs.0.text", "Other words."), view=_sealing(), secret=SECRET
        ),
        "sealed_without_a_secret": other._replace(secret=None),
        "sealed_with_another_secret": other,
        "plain_with_a_secret": one.given(secret=SECRET),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.glob("*.json"):
        file.unlink()
    expected: dict[str, list[str]] = {}
    for name, given in vectors().items():
        data = json.dumps(given._asdict(), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.json").write_text(data)
        expected[name] = [check.name for check in by_command(*given.bytes) if not check.ok]
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
