"""What the keys of an account have together, and how many it has made lately."""

from __future__ import annotations

from ulid import ULID

from pinaivu_box.policy import RATES
from pinaivu_box.store import keys
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key

_MINUTE = 60_000  # milliseconds in which what a key has used of its limits counts

# Those that the account made itself: what else an admin gives it is the admin's decision.
_OF_ITS_OWN = (
    "EXISTS (SELECT 1 FROM audit WHERE target = keys.id AND action = 'key.create'"
    " AND (actor = ?1 OR actor IN (SELECT id FROM keys WHERE account_id = ?1)))"
)


async def rates(database: Database, account_id: str, *, beside: str, now: int) -> dict[str, int]:
    """The sums of the limits of `policy.RATES` over the keys that the account made itself, `beside`
    the one with that id.

    What a key had within the last minute counts, since it may have been used: a limit cannot be
    used twice by lowering or revoking one key and making another.
    """
    sums = ", ".join(
        f"sum(max(coalesce(policy ->> '$.{name}', 0), coalesce((SELECT"
        f" max(detail ->> '$.before.policy.{name}') FROM audit WHERE target = keys.id"
        f" AND action = 'key.edit' AND at > ?3), 0))) AS {name}"
        for name in RATES
    )
    (row,) = await database.scan(
        f"SELECT {sums} FROM keys WHERE account_id = ?1 AND prefix <> '' AND id <> ?2"
        " AND (revoked_at IS NULL OR revoked_at > ?3) AND (expires_at IS NULL OR expires_at > ?3)"
        f" AND {_OF_ITS_OWN}",
        (account_id, beside, now - _MINUTE),
    )
    return {name: row[name] or 0 for name in RATES}


async def budgets(database: Database, pages_key: Key, *, beside: str, now: int) -> int:
    """The sum of the budgets of an account's keys, `beside` the one with that id, and of what its
    pages have spent in the present period of their budget; in 10^-9 of the currency.  A key that
    works no more counts for what it has spent."""
    assert pages_key.policy.budget is not None
    period = pages_key.policy.budget.window(pages_key.created_at, now)
    total = pages_key.spent_in(*period)
    for key in await keys.with_budget(database, pages_key.account_id, used_since=period[0]):
        if key.id in (pages_key.id, beside) or (budget := key.policy.budget) is None:
            continue
        spent = key.spent_in(*budget.window(key.created_at, now))
        total += spent if key.state(now) in ("revoked", "expired") else max(budget.units, spent)
    return total


async def made_since(database: Database, account_id: str, since: int) -> int:
    """How many keys the account has got since then, revoked or not."""
    first = f"key_{ULID.from_timestamp(since / 1000)}".lower()[:14]  # ids are in the order of time
    (row,) = await database.read(
        "SELECT count(*) AS n FROM keys WHERE account_id = ? AND id >= ?", (account_id, first)
    )
    return int(row["n"])
