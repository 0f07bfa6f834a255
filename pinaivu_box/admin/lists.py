"""Lists of accounts, keys and audit entries, page by page."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from msgspec import Struct, structs

from pinaivu_box.admin.views import AccountView, KeyView, account_view, key_view
from pinaivu_box.identity import NODE_PREFIX
from pinaivu_box.store import accounts, audit, keys
from pinaivu_box.store.audit import AuditEntry
from pinaivu_box.store.database import Database

View = TypeVar("View")
List = TypeVar("List", bound="Page[Any]")


class Page(Struct, Generic[View], frozen=True):
    """`has_more`: there are items after these."""

    data: list[View]
    has_more: bool
    object: str = "list"
    request_id: str = ""


class AccountList(Page[AccountView], frozen=True):
    """By name."""


class KeyList(Page[KeyView], frozen=True):
    """The newest first."""


class AuditList(Page[AuditEntry], frozen=True):
    """The newest first."""


def page_of(kind: type[List], views: list[Any], limit: int) -> List:
    """The page with the first `limit` of `views`, which were read with a limit of one more."""
    return kind(views[:limit], len(views) > limit)


async def list_accounts(database: Database, *, after: str = "", limit: int) -> AccountList:
    """The accounts by name, from the one after the name `after`."""
    stored = await accounts.ls(database, after=after, limit=limit + 1)
    return page_of(AccountList, [account_view(account) for account in stored], limit)


async def list_keys(
    database: Database,
    *,
    account: str | None,
    beginning: str = "",
    usable: bool = False,
    after: str | None = None,
    limit: int,
) -> KeyList:
    """The newest keys, of an account (name or id), before the key `after`; see `keys.ls`.  Raises
    RowNotFound."""
    account_id = None if account is None else (await accounts.find(database, account)).id
    stored = await keys.ls(
        database, account_id, beginning=beginning, usable=usable, after=after, limit=limit + 1
    )
    return page_of(KeyList, [key_view(key) for key in stored], limit)


async def list_audit_entries(
    database: Database,
    *,
    since: int,
    until: int | None = None,
    actor: str | None = None,
    action: str | None = None,
    target: str | None,
    after: int | None = None,
    limit: int,
) -> AuditList:
    """The newest entries from one time to another (Unix milliseconds), before the entry `after`.

    `target` is a key, an account or a peer, and `actor` a key or an account, by name or id; see
    `audit.ls`.
    """
    # Not above: the commands that list keys and accounts start without it.
    from pinaivu_box.membership import peer_names

    targets = None
    if target is not None:
        peers = await peer_names.names(database)
        targets = [target, *(node for node, name in peers.items() if name == target)]
    entries = await audit.ls(
        database,
        since=since,
        until=until,
        actors=None if actor is None else [actor],
        action=action,
        targets=targets,
        after=after,
        limit=limit + 1,
    )
    if any(entry.target.startswith(NODE_PREFIX) for entry in entries):
        peers = await peer_names.names(database)
        entries = [
            structs.replace(
                entry,
                actor_name=peers.get(entry.actor, entry.actor_name),
                target_name=peers.get(entry.target, entry.target_name),
            )
            for entry in entries
        ]
    return page_of(AuditList, entries, limit)
