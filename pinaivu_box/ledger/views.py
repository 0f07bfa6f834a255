"""The ledger as the admin API and the commands' --json show it: amounts decimal text, below 0 what
this box owes, times RFC 3339 in UTC."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from decimal import Decimal

from msgspec import Struct, structs

from pinaivu_box import amount
from pinaivu_box.config import PeeringConfig
from pinaivu_box.errors import PeerNotFound, quoted
from pinaivu_box.identity import NODE_PREFIX
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import reconcile
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger.entry import Balance
from pinaivu_box.ledger.settlement import Difference, SettlementOutcome
from pinaivu_box.ledger.statement import StoredEntry, StoredStatement
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.receipts.receipt import utc_text
from pinaivu_box.store import audit, peers
from pinaivu_box.store.database import Database
from pinaivu_box.transport import wire

_SHORTEST_PREFIX = 9  # node_ and 4 digits


class BalanceView(Struct, frozen=True):
    """With one peer in one currency.  `served` by us and `received` from it are all there ever was,
    `settled_` of them is in statements.  `balance`: what it owes us; `carried` of that comes from
    statements that are not paid.  `waiting` was served, is not accepted by it yet and not written
    off; a `credit_limit` counts it too.  `max_debt`: the most that this box may owe it."""

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


class EntryView(Struct, frozen=True):
    """`prompt_paid`: the amount has the prompt's price in it, which choices pay once.  `proof` is
    the text that was signed by who served it and, if it is `accepted`, by who had asked.
    `disputed`: why the peer does not accept it.  `forgiven_at`: when it was written off here."""

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


class StatementView(Struct, frozen=True):
    """`served`: by us and `received`: from the peer, by currency, and what it owes us in the end,
    `net`.  `signed` is the text under both signatures."""

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
    """`statements` are signed by both.  If there are `differences` nothing more is settled until
    they are gone.  `taken` and `given`: entries that one side had lost.  `accepted`: so many that
    had waited for it.  `disputed` are accepted by one side only, and in no statement."""

    statements: list[StatementView]
    differences: list[Difference]
    taken: int
    given: int
    accepted: int
    disputed: list[Difference]
    request_id: str = ""


async def names(database: Database) -> dict[str, str]:
    """What peers are called, by node_id: by us, or else by their certificates."""
    standing = MembershipStore(database)
    await standing.load()
    roster = standing.roster
    found = {one: roster.member(one).name for one in roster.known()} if roster else {}
    found |= {one: known.name for one, known in (await peers.known(database)).items() if known.name}
    return {one: name for one, name in found.items() if name}


async def boxes(database: Database, own: str) -> dict[str, str]:
    """As `names`, with this box among them, whose node id is `own`."""
    return {**await names(database), own: "this box"}


async def called(database: Database, entries: Sequence[audit.AuditEntry]) -> dict[str, str]:
    """What keys, accounts and peers in these entries of the audit trail are called, by id."""
    found = await audit.names(database, entries)
    peers_too = any(entry.target.startswith(NODE_PREFIX) for entry in entries)
    return found | await names(database) if peers_too else found


async def targets(database: Database, text: str) -> list[str]:
    """What the audit trail is to be searched for: that, and the peers that are called so."""
    return [text, *(node for node, name in (await names(database)).items() if name == text)]


async def find(database: Database, text: str, own: str) -> str:
    """The node_id of a peer: by name, id or its beginning.  `own` is this box's, which is no peer
    whatever it is called.  PeerNotFound."""
    called = await names(database)
    called.pop(own, None)
    known = {*called, *(await ledger_entry.balances(database))}
    found = [one for one in known if text in (one, called.get(one))] or [
        one for one in known if len(text) >= _SHORTEST_PREFIX and one.startswith(text)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        ids = " or ".join(sorted(one[:17] for one in found))
        raise PeerNotFound(
            f"{len(found)} peers are called '{quoted(text)}': say {ids}.", param="peer"
        )
    near = difflib.get_close_matches(text[:100], called.values(), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise PeerNotFound(f"There is no peer '{quoted(text)}'.{hint}", param="peer")


async def all_balances(database: Database, peering: PeeringConfig) -> list[BalanceView]:
    """`peering`: for the limits of peers that have none of their own."""
    called, known = await names(database), await peers.known(database)
    made = []
    for peer, mine in (await ledger_entry.balances(database)).items():
        own = known[peer].policy.get("credit_limit") if peer in known else None
        limit = peering.serve.credit_limit if own is None else own
        for currency, sums in mine.items():
            view = _balance(peer, _name(called, peer), currency, sums, limit or None)
            made.append(structs.replace(view, max_debt=peering.max_debt or None))
    return sorted(made, key=lambda one: (one.name, one.peer, one.currency))


def _balance(peer: str, name: str, currency: str, sums: Balance, limit: str | None) -> BalanceView:
    return BalanceView(
        peer=peer,
        name=name,
        currency=currency,
        served=_text(sums.served),
        received=_text(sums.received),
        settled_served=_text(sums.served - sums.open_served),
        settled_received=_text(sums.received - sums.open_received),
        balance=_text(sums.net),
        carried=_text(sums.carried),
        waiting=_text(sums.waiting),
        credit_limit=limit,
    )


def entry_view(entry: StoredEntry) -> EntryView:
    return EntryView(
        request_id=entry.request_id,
        leg=entry.leg,
        choice=entry.choice,
        served_by_us=entry.served_by_us,
        amount=amount.to_text(entry.amount),
        currency=entry.currency,
        at=utc_text(entry.at / 1000),
        prompt_paid=entry.prompt_paid,
        accepted=bool(entry.acceptance),
        disputed=entry.disputed,
        forgiven_at=None if entry.forgiven_at is None else utc_text(entry.forgiven_at / 1000),
        statement=entry.statement,
        proof=entry.proof.decode(),
        signature=entry.signature.hex(),
        acceptance=entry.acceptance.hex(),
    )


async def all_statements(database: Database, peer: str | None = None) -> list[StatementView]:
    """The newest first."""
    called = await names(database)
    return [statement_view(one, called) for one in await ledger_statement.ls(database, peer)]


def statement_view(kept: StoredStatement, called: dict[str, str]) -> StatementView:
    read = reconcile.read(kept.signed)
    (us,) = set(read.between) - {kept.peer}
    return StatementView(
        id=kept.id,
        peer=kept.peer,
        name=_name(called, kept.peer),
        sequence=kept.sequence,
        at=utc_text(kept.at / 1000),
        entries=read.entries,
        served=read.served[us],
        received=read.served[kept.peer],
        net={currency: _plain(owed) for currency, owed in reconcile.net(read.served, us)},
        paid_at=None if kept.paid_at is None else utc_text(kept.paid_at / 1000),
        signed=kept.signed.decode(),
        our_signature=kept.ours.hex(),
        their_signature=kept.theirs.hex(),
    )


def settled_view(outcome: SettlementOutcome, called: dict[str, str]) -> SettledView:
    made = [statement_view(one, called) for one in outcome.statements]
    rest = {name: getattr(outcome, name) for name in SettlementOutcome.__struct_fields__[1:]}
    return SettledView(made, **rest)


def _name(called: dict[str, str], peer: str) -> str:
    return called.get(peer) or wire.short(peer)


def _text(owed: int) -> str:
    return "-" * (owed < 0) + amount.to_text(abs(owed))


def _plain(owed: Decimal) -> str:
    return _text(int(owed * amount.UNITS))
