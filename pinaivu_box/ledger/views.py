"""The ledger as the admin API and the commands' --json show it.

Amounts are decimal text, below 0 what this box owes; times are RFC 3339 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from pinaivu_box import amount
from pinaivu_box.ledger import disproofs
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.ledger.session import Difference, SettlementOutcome
from pinaivu_box.ledger.statement import StoredStatement
from pinaivu_box.membership import peer_names
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.store import peer_settings
from pinaivu_box.store.database import Database
from pinaivu_box.store.peer_settings import PeerLimits
from pinaivu_box.store.times import time_text
from pinaivu_box.text import utc_text
from pinaivu_box.transport import wire


class BalanceView(Struct, frozen=True):
    """The account with one peer in one currency.  `served` (by this box) and `received` (from the
    peer) are all there ever was; `settled_` of them are in statements.  `balance` is what the peer
    owes; `carried` of that comes from statements that are not paid.  `waiting` was served, is not
    accepted yet and not written off; a `credit_limit` counts it too.  `max_debt` is the most that
    this box may owe the peer.  `disproved` is the part of `received` that audits have proven false:
    `balance` has it, as the peer's books do, and this box does not owe it."""

    peer: str
    name: str
    currency: str
    served: str
    received: str
    settled_served: str
    settled_received: str
    balance: str
    carried: str
    waiting: str
    credit_limit: str | None
    max_debt: str | None = None
    disproved: str = "0"


class EntryView(Struct, frozen=True):
    """`prompt_paid`: the amount includes the prompt's price, which choices pay once.  `proof` is
    the text that the serving box signed and, if it is `accepted`, the coordinator too.  `disputed`
    is the peer's reason for not accepting it, `forgiven_at` when it was written off here."""

    request_id: str
    leg: int
    choice: int
    served_by_us: bool
    amount: str
    currency: str
    at: str
    prompt_paid: bool
    accepted: bool
    disputed: str | None
    forgiven_at: str | None
    statement: str | None
    proof: str
    signature: str
    acceptance: str


class DisproofView(Struct, frozen=True):
    """A leg that the peer served and an audit proved false: `why` is the end of a sentence.
    `amount` is what it was to cost."""

    peer: str
    name: str
    request_id: str
    leg: int
    choice: int
    at: str
    amount: str
    currency: str
    why: str
    signed: str
    signature: str


class StatementView(Struct, frozen=True):
    """What was `served` by this box and `received` from the peer by currency, and `net`, what the
    peer owes in the end.  `signed` is the text under both signatures."""

    id: str
    peer: str
    name: str
    sequence: int
    at: str
    entries: int
    served: dict[str, str]
    received: dict[str, str]
    net: dict[str, str]
    paid_at: str | None
    signed: str
    our_signature: str
    their_signature: str
    request_id: str = ""


class SettledView(Struct, frozen=True):
    """`statements` are signed by both.  While there are `differences`, nothing more can be settled.
    `taken` and `given` count entries that one side had lost, `accepted` those that had waited for
    it.  `disputed` are accepted by one side only, and in no statement."""

    statements: list[StatementView]
    differences: list[Difference]
    taken: int
    given: int
    accepted: int
    disputed: list[Difference]
    request_id: str = ""


async def find(database: Database, text: str, own: str) -> str:
    """The node id of the peer that is named so, as `peer_names.find`, also of one that is no member
    any more.  `own` is the node id of this box, which is no peer whatever it is called.

    Raises PeerNotFound.
    """
    names = dict.fromkeys(await ledger_entry.balances(database), "")
    names |= await peer_names.names(database)
    names.pop(own, None)
    return peer_names.find(text, names)


async def all_balances(database: Database, peering: PeeringConfig) -> list[BalanceView]:
    """The balances with all peers; `peering` has the limits of peers without their own."""
    names, limits = await peer_names.names(database), await peer_settings.all_limits(database)
    views = []
    for peer, balances in (await ledger_entry.balances(database)).items():
        own = limits.get(peer, PeerLimits()).credit_limit
        limit = peering.serve.credit_limit if own is None else own
        views += [
            BalanceView(
                peer=peer,
                name=_name(names, peer),
                currency=currency,
                served=_text(balance.served),
                received=_text(balance.received),
                settled_served=_text(balance.served - balance.open_served),
                settled_received=_text(balance.received - balance.open_received),
                balance=_text(balance.net),
                carried=_text(balance.carried),
                waiting=_text(balance.waiting),
                credit_limit=limit or None,
                max_debt=peering.max_debt or None,
                disproved=_text(balance.disproved),
            )
            for currency, balance in balances.items()
        ]
    return sorted(views, key=attrgetter("name", "peer", "currency"))


def entry_view(entry: LedgerEntry) -> EntryView:
    fields = asdict(entry)
    del fields["peer"]
    fields |= {
        "amount": amount.to_text(entry.amount),
        "at": utc_text(entry.at / 1000),
        "accepted": bool(entry.acceptance),
        "forgiven_at": time_text(entry.forgiven_at),
        "proof": entry.proof.decode(),
        "signature": entry.signature.hex(),
        "acceptance": entry.acceptance.hex(),
    }
    return EntryView(**fields)


async def all_disproofs(database: Database, peer: str | None = None) -> list[DisproofView]:
    """All disproofs, or those about a peer, the newest first."""
    names = await peer_names.names(database)
    return [
        DisproofView(
            **asdict(stored)
            | {
                "name": _name(names, stored.peer),
                "at": utc_text(stored.at / 1000),
                "amount": _text(stored.amount),
                "why": msgspec.json.decode(stored.signed)["why"],
                "signed": stored.signed.decode(),
                "signature": stored.signature.hex(),
            }
        )
        for stored in await disproofs.ls(database, peer)
    ]


async def all_statements(database: Database, peer: str | None = None) -> list[StatementView]:
    """All statements, or those with a peer, the newest first."""
    names = await peer_names.names(database)
    return [
        statement_view(statement, names) for statement in await ledger_statement.ls(database, peer)
    ]


def statement_view(stored: StoredStatement, names: Mapping[str, str]) -> StatementView:
    statement = ledger_statement.read(stored.signed)
    (us,) = set(statement.between) - {stored.peer}
    net = ledger_statement.net(statement.served, us)
    return StatementView(
        id=stored.id,
        peer=stored.peer,
        name=_name(names, stored.peer),
        sequence=stored.sequence,
        at=utc_text(stored.at / 1000),
        entries=statement.entries,
        served=statement.served[us],
        received=statement.served[stored.peer],
        net={currency: _text(int(owed * amount.UNITS)) for currency, owed in net},
        paid_at=time_text(stored.paid_at),
        signed=stored.signed.decode(),
        our_signature=stored.ours.hex(),
        their_signature=stored.theirs.hex(),
    )


async def settled_view(database: Database, outcome: SettlementOutcome) -> SettledView:
    names = await peer_names.names(database)
    statements = [statement_view(statement, names) for statement in outcome.statements]
    rest = {name: getattr(outcome, name) for name in SettlementOutcome.__struct_fields__[1:]}
    return SettledView(statements, **rest)


def _name(names: Mapping[str, str], peer: str) -> str:
    return names.get(peer) or wire.short(peer)


def _text(units: int) -> str:
    return "-" * (units < 0) + amount.to_text(abs(units))
