"""Requests that a peer has served, as the coordinator has them at their end, to be audited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulid import ULID

from pinaivu_box.amount import Prices
from pinaivu_box.engine.messages import Output, Prompt, Sampling, SamplingParams
from pinaivu_box.gateway.backend import Job, Proved, Started
from pinaivu_box.gateway.metering import prove
from pinaivu_box.gateway.records import ChoiceRecord, LegRecord, RequestRecord
from pinaivu_box.identity import Identity
from pinaivu_box.models.catalog import Model
from pinaivu_box.policy import Policy
from pinaivu_box.receipts.commitment import new_nonce
from pinaivu_box.receipts.receipt import EngineBuild, Price, sign_proof
from pinaivu_box.receipts.transcript_sealing import public_half
from pinaivu_box.store.keys import Key

EXACTNESS = "bitwise:avx2 of tests"
SECRET = "sk-pnv-" + "a" * 44
WORD = "Wolpertinger"
PRICE = Price("credits", "0", "0", "1")


def key(**policy: Any) -> Key:
    """One with the secret SECRET."""
    shown = ("sk-pnv-aaaaaa", "aaaa")
    return Key(
        "key_1", "acct_owner", "owner", "", *shown, Policy(**policy), 0,
        transcript_key=public_half(SECRET),
    )  # fmt: skip


def job(**more: Any) -> Job:
    fields: dict[str, Any] = {
        "request_id": f"req_{ULID()}".lower(),
        "model": Model("m:1", Path("fake:0"), recorded_digest="ab" * 32),
        "messages": [{"role": "user", "content": WORD}],
        "sampling": SamplingParams(seed=7),
        "max_tokens": 20,
        "stop": [],
        "tenant": "key_1",
    }
    return Job(**{**fields, **more})


def leg(peer: Identity, of: Job, text: str = "A spotted answer.") -> LegRecord:
    """One that the peer has proved."""
    started = Started(
        peer.node_id, "ab" * 32, EngineBuild("b1", "cpu"), Sampling(seed=7), "tags", False,
        nonce=new_nonce(), exactness=EXACTNESS,
    )  # fmt: skip
    record = LegRecord(of, started)
    record.take(Prompt([1, 2, 3]))
    end = Output(text, list(text.encode()), "stop", 0.5, 0)
    end.numbers = bytes(32)
    record.take(end)
    proof, opening = prove(record, PRICE)
    record.take(Proved(proof, sign_proof(peer, proof), opening, b"\0" * 64))
    return record


def request(peer: Identity, *, legs: int = 1, own: LegRecord | None = None, **more: Any) -> Any:
    """The record of one request of `legs` choices that the peer served; `own` is a leg that ran on
    this box, and the record's only one."""
    choices = []
    first = job(**more)
    for number in range(legs):
        one = job(**{**more, "request_id": first.request_id, "choice": number})
        choices.append(ChoiceRecord(one, [own or leg(peer, one)]))
    record = RequestRecord(choices, "key_1", Prices("0", "0"))
    record.metered = True
    return record
