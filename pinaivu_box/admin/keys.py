"""Keys as the admin API and `pinaivu keys` manage them."""

from __future__ import annotations

from pinaivu_box.admin.page import Page, page_of
from pinaivu_box.admin.views import KeyView, NewKey, key_view, new_key_view
from pinaivu_box.config import PricingConfig, parse_span
from pinaivu_box.errors import RowConflict
from pinaivu_box.policy import LONGEST_LIFE, UNPRICED, Policy, free_of_charge
from pinaivu_box.store import accounts, keys
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key
from pinaivu_box.store.new_keys import Draft, NewKeys


async def ls(
    database: Database, *, account: str | None = None, after: str | None = None, limit: int
) -> Page[KeyView]:
    """The newest keys, of an account (by name or id), before the key `after`.

    Raises RowNotFound.
    """
    account_id = None if account is None else (await accounts.find(database, account)).id
    stored = await keys.ls(database, account_id, after=after, limit=limit + 1)
    return page_of(stored, limit, key_view)


async def create(database: Database, draft: Draft, by: Actor) -> NewKey:
    """Raises InvalidValue, RowNotFound, RowConflict."""
    try:
        return await _create(database, draft, by)
    except RowConflict:  # the account that it was to get was created meanwhile: it gets another
        return await _create(database, draft, by)


async def _create(database: Database, draft: Draft, by: Actor) -> NewKey:
    batch = NewKeys(database, by)
    await batch.add(draft)
    ((key, secret),) = await batch.write()
    return new_key_view(key, secret)


def parse_overlap(text: str) -> float:
    """The seconds that a replaced secret stays valid.  Raises ValueError."""
    seconds = parse_span(text)
    if not 0 <= seconds <= LONGEST_LIFE:
        raise ValueError("it must be from 0 to 36500d")
    return seconds


async def rotate(database: Database, key: Key, overlap: float, by: Actor) -> NewKey:
    """Give a key a new secret; the current one stays valid for `overlap` seconds.

    Raises RowConflict.
    """
    return new_key_view(*await keys.rotate(database, key, overlap, by))


def warning(policy: Policy, pricing: PricingConfig) -> str | None:
    """What a key's owner should know of its settings: its budget limits nothing."""
    without_effect = policy.budget is not None and free_of_charge(policy, pricing)
    return UNPRICED if without_effect else None
