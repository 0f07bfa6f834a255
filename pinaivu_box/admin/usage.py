"""Usage as the API and `pinaivu usage` report it."""

from __future__ import annotations

from pinaivu_box.admin.usage_report import UsageReport, report, span
from pinaivu_box.membership.peer_names import names_of_boxes
from pinaivu_box.store.database import Database
from pinaivu_box.store.usage import By, UsageFilter


async def usage(
    database: Database,
    node_id: str,
    currency: str,
    by: tuple[By, ...],
    *,
    account_id: str | None = None,
    key_id: str | None = None,
    model: str | None = None,
    first_day: int | None = None,
    last_day: int | None = None,
) -> UsageReport:
    """The usage of a box, grouped `by`; the days are midnights in Unix milliseconds.

    `node_id` is this box's.
    """
    since, until = span(first_day, last_day)
    selection = UsageFilter(
        account_id=account_id, key_id=key_id, model=model, since=since, until=until
    )
    names = await names_of_boxes(database, node_id) if {"node", "peer"} & set(by) else {}
    return await report(database, selection, by, currency, names)
