"""Entries: one leg that one box served for another, proven by the signatures of both.

An entry holds the proof, signed by the box that served the leg, and the coordinator's acceptance,
over the same bytes.  It counts only with both.  Its amount follows from the proof: what was
computed, and the prompt too unless another entry of the request has paid for it
(`receipts.prompts_of`).  Entries are never changed or deleted (store/schema.sql); the database
keeps the sums of each peer, so `balance` reads one row of each currency.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import Struct

from pinaivu_box.errors import EntryRefused
from pinaivu_box.identity import verify
from pinaivu_box.ledger.reconcile import EntrySummary
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN, LegStatement, SignedProof, cost
from pinaivu_box.receipts.verify import is_signed, read_statement
from pinaivu_box.store.database import Database, Row
from pinaivu_box.store.times import now_ms

MAX_PROOF_BYTES = 256 * 1024
MAX_TEXT_CHARACTERS = 128  # of a request's id, or a currency
_MAX_AMOUNT = 2**62  # of one entry; sums of entries fit into 64 bits, or are refused
_MAX_RECENT_ENTRIES = 10_000  # of all peers
_BALANCES = (
    "SELECT *, (SELECT coalesce(sum(amount), 0) FROM ledger_disproofs AS disproof WHERE"
    " disproof.peer = balance.peer AND disproof.currency = balance.currency) AS disproved"
    " FROM ledger_balances AS balance"
)
_KEY = "peer = ?1 AND served_by_us = ?2 AND request_id = ?3 AND leg = ?4 AND choice = ?5"


class LedgerEntry(Struct, frozen=True):
    """`peer` is its node id, `amount` in 10^-9 of the currency, `at` the Unix milliseconds of this
    box's clock.  `signature` over `proof` is the serving box's, `acceptance` the coordinator's:
    empty until it has come.

    `disputed` is the peer's reason for not accepting what it was served.  The rest is set by the
    database: whether the amount includes the prompt's price, the id of the statement that contains
    the entry, and when it was written off.
    """

    peer: str
    served_by_us: bool
    request_id: str
    leg: int
    choice: int
    amount: int
    currency: str
    at: int
    proof: bytes
    signature: bytes
    acceptance: bytes = b""
    disputed: str | None = None
    prompt_paid: bool = False
    statement: str | None = None
    forgiven_at: int | None = None

    @property
    def key(self) -> tuple[str, bool, str, int, int]:
        """The columns that tell entries apart."""
        return self.peer, self.served_by_us, self.request_id, self.leg, self.choice

    def summary(self, us: str) -> EntrySummary:
        """What is compared of it; `us` is this box's node id."""
        return EntrySummary(
            us if self.served_by_us else self.peer,
            self.request_id,
            self.leg,
            self.choice,
            self.currency,
            self.amount,
            sha256(self.proof).digest(),
        )


_COLUMNS = ", ".join(LedgerEntry.__struct_fields__)


class Balance(Struct, frozen=True):
    """The account with a peer in one currency, in 10^-9.

    `served` and `received` are all there ever was; the `open_` ones are in no statement yet.
    `carried` is what unpaid statements leave owed to this box (below 0: by it).  `waiting` was
    served, is not accepted yet and not written off.  `disproved` is the price of what was received
    and proven false by audits since: both boxes' books have it, and this one does not owe it.
    """

    served: int = 0
    received: int = 0
    open_served: int = 0
    open_received: int = 0
    carried: int = 0
    waiting: int = 0
    disproved: int = 0

    @property
    def net(self) -> int:
        """What the peer owes this box in total by both boxes' books; below 0 what this box owes."""
        return self.open_served - self.open_received + self.carried

    @property
    def owed_to_peer(self) -> int:
        return max(-self.net - self.disproved, 0)

    @property
    def credit_used(self) -> int:
        """What a credit limit applies to: a peer that never accepts gains nothing by that."""
        return max(self.net + self.waiting, 0)


def of_leg(
    peer: str,
    proof: LegStatement,
    signed: SignedProof,
    pays_prompt: bool,
    acceptance: bytes,
    disputed: str | None = None,
) -> LedgerEntry:
    """The entry of a leg that has just ended, served for the peer or by it; with `pays_prompt` the
    amount includes the price of the prompt."""
    return LedgerEntry(
        peer=peer,
        served_by_us=proof.node_id != peer,
        request_id=proof.request_id,
        leg=proof.leg,
        choice=proof.choice,
        amount=cost(proof, pays_prompt),
        currency=proof.price.currency,
        at=now_ms(),
        proof=signed.signed.encode(),
        signature=bytes.fromhex(signed.signature),
        acceptance=acceptance,
        disputed=disputed,
    )


def check(entry: LedgerEntry, us: str) -> LegStatement:
    """Check that everything in an entry follows from its signed bytes; returns its proof.  `us` is
    this box's node id.  Raises EntryRefused."""
    if len(entry.proof) > MAX_PROOF_BYTES:
        raise _refused(entry, f"its proof has over {MAX_PROOF_BYTES} bytes")
    try:
        signed = SignedProof(entry.proof.decode(), entry.signature.hex())
        proof = read_statement(signed)  # as a verifier will later
        output, prompt = costs(proof)
    except ValueError as error:  # msgspec's errors are ValueErrors
        raise _refused(entry, f"its proof is not valid: {error}") from error
    if reason := _mismatch(entry, proof, signed, us):
        raise _refused(entry, reason)
    if entry.amount not in (output, output + prompt):
        due = f"{output + prompt}, or {output} without the prompt"
        raise _refused(entry, f"its proof comes to {due}, and it says {entry.amount}")
    return proof


def costs(proof: LegStatement) -> tuple[int, int]:
    """The price of a leg's output and of its prompt, in 10^-9.

    Raises ValueError for a price or a count that is not valid.
    """
    counts = (proof.cached_tokens, proof.prompt_tokens, proof.completion_tokens)
    if min(counts) < 0 or proof.cached_tokens > proof.prompt_tokens:
        raise ValueError("its token counts are not possible")
    prices = proof.price.prices
    output = prices.cost(0, 0, proof.completion_tokens)
    prompt = prices.cost(proof.prompt_tokens, proof.cached_tokens, 0)
    if output + prompt > _MAX_AMOUNT:
        raise ValueError("its amount is over the limit of the ledger")
    return output, prompt


def _mismatch(entry: LedgerEntry, proof: LegStatement, signed: SignedProof, us: str) -> str:
    """Why the proof is not this entry's, or not signed; "" if it is."""
    stated = (proof.request_id, proof.leg, proof.choice, proof.price.currency)
    server, coordinator = (us, entry.peer) if entry.served_by_us else (entry.peer, us)
    if not all(0 <= number < 2**31 for number in (proof.leg, proof.choice, proof.prompt)):
        return "a number in its proof is out of range"
    if max(len(proof.request_id), len(proof.price.currency)) > MAX_TEXT_CHARACTERS:
        return f"its proof has a name of over {MAX_TEXT_CHARACTERS} characters"
    if stated != (entry.request_id, entry.leg, entry.choice, entry.currency):
        return "its proof is about another request, leg, choice or currency"
    if proof.node_id != server:
        return f"its proof is by {proof.node_id}"
    if proof.signer != server or not is_signed(proof, signed):
        return f"the signature of its proof is not {server}'s"
    acceptance = entry.acceptance
    if acceptance and not verify(coordinator, ACCEPTANCE_DOMAIN, entry.proof, acceptance):
        return f"its acceptance is not {coordinator}'s"
    return ""


def _refused(entry: LedgerEntry, reason: str) -> EntryRefused:
    name = f"{entry.request_id[:64]}, leg {entry.leg}, choice {entry.choice}"
    return EntryRefused(f"The ledger does not take {name}: {reason}.")


async def record(database: Database, entry: LedgerEntry, us: str) -> None:
    """Write an entry, or the acceptance that it lacked; it is on disk on return.  Recording the
    same again changes nothing.

    Raises EntryRefused if it is not proven (`check`), has other bytes than what is recorded, or is
    for a prompt that another entry of the request has paid for.
    """
    proof = check(entry, us)
    output, _ = costs(proof)
    insert = (
        "INSERT INTO ledger_entries (peer, served_by_us, request_id, leg, choice, amount, proof,"
        " signature, prompt, prompt_paid, currency, at, proof_sha256, acceptance, disputed)"
        " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15 WHERE NOT EXISTS"
        f" (SELECT 1 FROM ledger_entries WHERE {_KEY} AND amount = ?6 AND proof = ?7"
        " AND signature = ?8)"
    )
    values = (
        *entry.key, entry.amount, entry.proof, entry.signature, proof.prompt,
        entry.amount != output, entry.currency, entry.at, sha256(entry.proof).digest(),
        entry.acceptance, entry.disputed,
    )  # fmt: skip
    accept = f"UPDATE ledger_entries SET acceptance = ?6 WHERE {_KEY} AND acceptance = x''"
    try:
        await database.write((insert, values), (accept, (*entry.key, entry.acceptance)))
    except sqlite3.IntegrityError as error:
        reason = "the ledger has other bytes for it, or its prompt is paid for already"
        raise _refused(entry, reason) from error


async def has_served(database: Database, peer: str, request_id: str, leg: int, choice: int) -> bool:
    """Whether this box has an entry for that leg, served to the peer."""
    key = (peer, True, request_id, leg, choice)
    return bool(await database.read(f"SELECT 1 FROM ledger_entries WHERE {_KEY}", key))


async def served_since(database: Database, peer: str, since: int) -> list[tuple[int, int]]:
    """The time and the tokens of each leg that a peer was served since a time, the oldest first.

    Looks at the latest entries only, which are all that a rate limit can have let through.
    """
    rows = await database.read(
        "SELECT at, proof FROM ledger_entries WHERE peer = ?1 AND served_by_us AND at >= ?2"
        " AND at <= ?3 AND rowid > (SELECT max(rowid) FROM ledger_entries) - ?4 ORDER BY at",
        (peer, since, now_ms(), _MAX_RECENT_ENTRIES),
    )
    proofs = [(at, read_statement(SignedProof(proof.decode(), ""))) for at, proof in rows]
    return [(at, proof.prompt_tokens + proof.completion_tokens) for at, proof in proofs]


async def of_peer(
    database: Database, peer: str, *, limit: int, statement: str | None = None
) -> list[LedgerEntry]:
    """The newest entries with a peer, or of one statement with it, the newest first."""
    return await where(
        database,
        "peer = ?1 AND (?2 IS NULL OR statement = ?2) ORDER BY at DESC, rowid DESC LIMIT ?3",
        (peer, statement, limit),
    )


async def where(database: Database, condition: str, values: Sequence[Any]) -> list[LedgerEntry]:
    """The entries that an SQL condition selects."""
    return _entries(
        await database.scan(f"SELECT {_COLUMNS} FROM ledger_entries WHERE {condition}", values)
    )


async def by_rowid(database: Database, rowids: Sequence[int]) -> list[LedgerEntry]:
    """The entries of these rows, in that order."""
    rows = await database.read(
        f"SELECT {_COLUMNS} FROM json_each(?) JOIN ledger_entries ON ledger_entries.rowid = value"
        " ORDER BY json_each.key",
        (msgspec.json.encode(rowids).decode(),),
    )
    return _entries(rows)


def _entries(rows: Iterable[Row]) -> list[LedgerEntry]:
    return [msgspec.convert(dict(row), LedgerEntry, strict=False) for row in rows]


async def statement_of(database: Database, entry: LedgerEntry) -> str | None:
    """The id of the statement that contains an entry, if one does."""
    rows = await database.read(f"SELECT statement FROM ledger_entries WHERE {_KEY}", entry.key)
    return rows[0][0] if rows else None


async def balance(database: Database, peer: str) -> dict[str, Balance]:
    """The balances with a peer, by currency."""
    return (await balances(database, peer)).get(peer, {})


async def balances(database: Database, peer: str | None = None) -> dict[str, dict[str, Balance]]:
    """The balances with a peer, or with all, by node id and currency."""
    rows = await database.read(
        f"{_BALANCES} WHERE peer = ?" if peer else _BALANCES, (peer,) if peer else ()
    )
    by_peer: dict[str, dict[str, Balance]] = {}
    for row in rows:
        sums = {name: row[name] for name in Balance.__struct_fields__}
        by_peer.setdefault(row["peer"], {})[row["currency"]] = Balance(**sums)
    return by_peer
