"""What boxes owe each other: entries that both have signed, and statements over them.

An entry is one leg that one box served for another: the proof, signed by who served it, and the
acceptance by who had asked, over the same bytes.  Only with both it counts.  Its amount follows
from the proof: what was made, and the prompt too unless another entry of the request has paid for
that (`receipts.prompts_of`).  Entries and statements are never changed or deleted (schema.sql);
the sums of each peer are the database's own, so that `balance` reads one row of each currency.
"""

from __future__ import annotations

import sqlite3
import time
from hashlib import sha256

from msgspec import Struct

from pinaivu_box.errors import EntryRefused
from pinaivu_box.identity import verify
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN, Proof, SignedProof
from pinaivu_box.receipts.verify import is_signed, read_proof
from pinaivu_box.store.database import Database, Statement

MAX_PROOF_BYTES = 256 * 1024
MAX_TEXT = 128  # characters of a request's id, or a currency
_MOST = 2**62  # of one entry; sums of entries fit into 64 bits, or are not taken
_LATEST = 10_000  # entries, of all peers
_KEY = "peer = ? AND served_by_us = ? AND request_id = ? AND leg = ? AND choice = ?"


class LedgerEntry(Struct, frozen=True):
    """`peer` is its node_id, `amount` in 10^-9 of the currency, `at` Unix milliseconds (ours).
    `signature` is over `proof` by who served, `acceptance` by who had asked: empty until it came.
    `disputed`: why the peer does not give one for what we served it, if it said so.
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


class Balance(Struct, frozen=True):
    """With a peer, in one currency, in 10^-9.  `served` and `received`: ever.  Those that are
    `open_` are in no statement yet; `carried` is what statements that are not paid leave owed to
    us (below 0: by us).  `waiting` was served, is not accepted yet and not written off.
    """

    served: int = 0
    received: int = 0
    open_served: int = 0
    open_received: int = 0
    carried: int = 0
    waiting: int = 0

    @property
    def net(self) -> int:
        """What the peer owes us, all in all; below 0 what we owe it."""
        return self.open_served - self.open_received + self.carried

    @property
    def owed_by_peer(self) -> int:
        return max(self.net, 0)

    @property
    def owed_to_peer(self) -> int:
        return max(-self.net, 0)

    @property
    def credit_used(self) -> int:
        """What a credit limit is compared with: who never accepts gets no more for that."""
        return max(self.net + self.waiting, 0)


def check(entry: LedgerEntry, us: str | None = None) -> Proof:
    """The entry's proof, if all that is in the entry follows from its signed bytes.

    With `us`, our node_id, also that the acceptance of what a peer served is ours; who records what
    it has just signed need not.  Raises EntryRefused.
    """
    if len(entry.proof) > MAX_PROOF_BYTES:
        raise _refused(entry, f"its proof has over {MAX_PROOF_BYTES} bytes")
    try:
        signed = SignedProof(entry.proof.decode(), entry.signature.hex())
        proof = read_proof(signed)  # as whoever verifies it later will
        made, prompt = costs(proof)
    except ValueError as error:  # msgspec's errors are ValueErrors
        raise _refused(entry, f"its proof is none: {error}") from error
    if reason := _wrong(entry, proof, signed, us):
        raise _refused(entry, reason)
    if entry.amount not in (made, made + prompt):
        due = f"{made + prompt}, or {made} without the prompt"
        raise _refused(entry, f"its proof comes to {due}, and it says {entry.amount}")
    return proof


def costs(proof: Proof) -> tuple[int, int]:
    """What was made, and the prompt, in 10^-9.  ValueError if a price or a count is none."""
    counts = (proof.cached_tokens, proof.prompt_tokens, proof.completion_tokens)
    if min(counts) < 0 or proof.cached_tokens > proof.prompt_tokens:
        raise ValueError("it counts tokens that cannot be")
    prices = proof.price.prices
    made = prices.cost(0, 0, proof.completion_tokens)
    prompt = prices.cost(proof.prompt_tokens, proof.cached_tokens, 0)
    if made + prompt > _MOST:
        raise ValueError("it comes to more than there is")
    return made, prompt


def _wrong(entry: LedgerEntry, proof: Proof, signed: SignedProof, us: str | None) -> str:
    """Why the proof is not this entry's, or not signed; "" if all is well."""
    says = (proof.request_id, proof.leg, proof.choice, proof.price.currency)
    ours = proof.node_id if us is None or not entry.served_by_us else us
    server, coordinator = (ours, entry.peer) if entry.served_by_us else (entry.peer, us)
    if not all(0 <= number < 2**31 for number in (proof.leg, proof.choice, proof.prompt)):
        return "its proof has a number that is none"
    if len(proof.request_id) > MAX_TEXT or len(proof.price.currency) > MAX_TEXT:
        return f"its proof has a name of over {MAX_TEXT} characters"
    if says != (entry.request_id, entry.leg, entry.choice, entry.currency):
        return "its proof is about another request, leg, choice or currency"
    if proof.node_id != server or (entry.served_by_us and server == entry.peer):
        return f"its proof is by {proof.node_id}"
    if proof.signer != server or not is_signed(proof, signed):
        return f"the signature of its proof is not {server}'s"
    if entry.acceptance and coordinator is not None:
        accepted = verify(coordinator, ACCEPTANCE_DOMAIN, entry.proof, entry.acceptance)
        return "" if accepted else f"its acceptance is not {coordinator}'s"
    return ""


def _refused(entry: LedgerEntry, why: str) -> EntryRefused:
    what = f"{entry.request_id[:64]}, leg {entry.leg}, choice {entry.choice}"
    return EntryRefused(f"The ledger does not take {what}: {why}.")


def recording(entry: LedgerEntry, us: str | None = None) -> tuple[Statement, ...]:
    """For a transaction of the caller's: writes the entry, or the acceptance that it lacked.

    What is there already is left as it is.  If other bytes are, or another entry of the request has
    paid for the prompt, the transaction fails (sqlite3.IntegrityError).  Raises as `check` does.
    """
    proof = check(entry, us)
    made, _ = costs(proof)
    key = (entry.peer, entry.served_by_us, entry.request_id, entry.leg, entry.choice)
    same = (entry.amount, entry.proof, entry.signature)
    return (
        (
            "INSERT INTO ledger_entries (peer, served_by_us, request_id, leg, choice, prompt,"
            " prompt_paid, amount, currency, at, proof, proof_sha256, signature, acceptance,"
            " disputed) SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? WHERE NOT EXISTS ("
            f"SELECT 1 FROM ledger_entries WHERE {_KEY}"
            " AND amount = ? AND proof = ? AND signature = ?)",
            (*key, proof.prompt, entry.amount != made, entry.amount, entry.currency, entry.at,
             entry.proof, sha256(entry.proof).digest(), entry.signature, entry.acceptance,
             entry.disputed, *key, *same),
        ),
        (
            f"UPDATE ledger_entries SET acceptance = ? WHERE {_KEY} AND acceptance = x''",
            (entry.acceptance, *key),
        ),
    )  # fmt: skip


async def record(database: Database, entry: LedgerEntry, us: str | None = None) -> None:
    """Returns once it is on disk; recording the same again changes nothing.

    Raises EntryRefused if it is not proven (`check`), or contradicts what is written there.
    """
    try:
        await database.write(*recording(entry, us))
    except sqlite3.IntegrityError as error:
        why = "the ledger has other bytes for it, or its prompt is paid for already"
        raise _refused(entry, why) from error


async def has(database: Database, peer: str, request_id: str, leg: int, choice: int) -> bool:
    """Whether we have served that for the peer."""
    key = (peer, True, request_id, leg, choice)
    return bool(await database.read(f"SELECT 1 FROM ledger_entries WHERE {_KEY}", key))


async def lately(database: Database, peer: str, since: int) -> list[tuple[int, int]]:
    """When a peer was served since then, and how many tokens, the oldest first; of the latest
    entries only, which is all that a limit can have let through."""
    rows = await database.read(
        "SELECT at, proof FROM ledger_entries WHERE peer = ?1 AND served_by_us AND at >= ?2"
        " AND at <= ?3 AND rowid > (SELECT max(rowid) FROM ledger_entries) - ?4 ORDER BY at",
        (peer, since, time.time_ns() // 1_000_000, _LATEST),
    )
    proofs = [(at, read_proof(SignedProof(proof.decode(), ""))) for at, proof in rows]
    return [(at, proof.prompt_tokens + proof.completion_tokens) for at, proof in proofs]


async def balance(database: Database, peer: str) -> dict[str, Balance]:
    """By currency; none for a peer that nothing was done for or by."""
    return (await balances(database, peer)).get(peer, {})


async def balances(database: Database, peer: str | None = None) -> dict[str, dict[str, Balance]]:
    """Of that peer, or all, by node_id and currency."""
    rows = await database.read(
        "SELECT * FROM ledger_balances WHERE peer = ?" if peer else "SELECT * FROM ledger_balances",
        (peer,) if peer else (),
    )
    found: dict[str, dict[str, Balance]] = {}
    for row in rows:
        sums = {name: row[name] for name in Balance.__struct_fields__}
        found.setdefault(row["peer"], {})[row["currency"]] = Balance(**sums)
    return found
