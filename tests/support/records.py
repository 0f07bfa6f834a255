"""Boxes with keys, and what they sign, for the tests of this folder."""

from __future__ import annotations

import hashlib

from pinaivu_box.gossip.adverts import Advert, GoneReport, Offer
from pinaivu_box.identity import Identity
from pinaivu_box.membership.records import (
    Certificate,
    Record,
    Revocation,
    key_of,
    network_key,
    seal,
)
from pinaivu_box.membership.roster import Roster
from tests.support.keys import NETWORK

NOW = 1_800_000_000.0  # Unix seconds


def certificate(
    inviter: Identity,
    node: Identity,
    *,
    name: str = "box",
    serial: int = 1,
    admin: bool = False,
    epoch: int = 0,
    network: str = NETWORK,
    at: float = NOW,
    signed_by: Identity | None = None,
) -> Record:
    made = Certificate(
        network_key(network), key_of(node.node_id), key_of(inviter.node_id), name,
        round(at * 1000), serial, admin, epoch,
    )  # fmt: skip
    return seal(signed_by or inviter, "member", made)


def revocation(
    signer: Identity, node: Identity, *, epoch: int = 0, signed_by: Identity | None = None
) -> Record:
    made = Revocation(
        network_key(NETWORK), key_of(node.node_id), key_of(signer.node_id), 0, "lost", epoch
    )
    return seal(signed_by or signer, "revocation", made)


def roster(*records: Record) -> Roster:
    made = Roster(NETWORK)
    made.admit(records)
    return made


def offer(model: str = "m:1", **changes: object) -> Offer:
    values: dict[str, object] = {
        "id": model, "digest": hashlib.sha256(model.encode()).digest(), "sequences": 4,
        "sequences_free": 4, "kv_free": 16384, "queue": 0, "ttft_ms": 120, "tokens_per_s": 60,
        "prices": ("0.001", "0.0005", "0.002"),
    }  # fmt: skip
    return Offer(**(values | changes))  # type: ignore[arg-type]


def advert(
    of: Identity,
    serial: int,
    *,
    at: float = NOW,
    life: int = 15,
    network: str = NETWORK,
    models: tuple[Offer, ...] = (),
    signed_by: Identity | None = None,
) -> tuple[Advert, Record]:
    made = Advert(
        network_key(network), key_of(of.node_id), serial, round(at * 1000), life, "1.0",
        ("192.168.1.5:4002",), "credits", models or (offer(),),
    )  # fmt: skip
    return made, seal(signed_by or of, "advert", made)


def gone(reporter: Identity, node: Identity, serial: int) -> tuple[GoneReport, Record]:
    made = GoneReport(network_key(NETWORK), key_of(node.node_id), serial, key_of(reporter.node_id))
    return made, seal(reporter, "gone", made)
