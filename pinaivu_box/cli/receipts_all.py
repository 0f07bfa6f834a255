"""`pinaivu receipts verify --all`: every receipt of a home, and its log."""

from __future__ import annotations

import sqlite3
import sys

import click
import msgspec
from msgspec import Struct

from pinaivu_box.cli.call import Call
from pinaivu_box.doctor import receipt_log
from pinaivu_box.errors import CliError
from pinaivu_box.receipt_log.examine import ExaminedReceipt, LogFinding
from pinaivu_box.receipts.receipt import view
from pinaivu_box.receipts.verify import verify_receipt
from pinaivu_box.store import integrity


class Verified(Struct, frozen=True):
    """`findings`: what is wrong, as clauses."""

    receipts: int
    entries: int
    findings: list[LogFinding]


def verify_all(call: Call) -> None:
    """Print what is wrong; exits with 1 if anything is."""
    try:
        integrity.check_version(call.home)
        examination = receipt_log.examined(call.home, check_all)
    except sqlite3.Error as error:
        raise CliError(f"The database of {call.home} cannot be read: {error}.") from error
    if examination is None:
        raise CliError(f"There is no log of receipts in {call.home}: the next start begins it.")
    findings = [*examination.findings, *_of_another_box(call, examination.logs[-1].node_id)]
    found = Verified(examination.receipts, examination.entries, findings)
    call.print(found, _print)
    if found.findings:
        sys.exit(1)


def _print(found: Verified) -> None:
    for finding in found.findings:
        click.echo(f"FAILED {finding.kind}: {finding.message}")
    counts = f"{found.receipts:,} receipts, {found.entries:,} entries of the log"
    if not found.findings:
        click.echo(f"ok     {counts}: all as they were signed, and none is missing")
    else:
        click.echo(f"       {counts} were looked at")


def _of_another_box(call: Call, node_id: str) -> list[LogFinding]:
    own = call.node_id()
    if own == node_id:
        return []
    return [
        LogFinding("forged", f"the log is that of {node_id}, and identity.key is {own or 'gone'}")
    ]


def check_all(node_id: str, receipt: ExaminedReceipt) -> str | None:
    """All that can be checked of a receipt alone; the whole log is examined beside it."""
    try:
        shown = view(receipt.signed, receipt.signature, None)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "is no receipt that can be read"
    if shown.request_id != receipt.request_id:
        return f"is that of {shown.request_id}"
    checks = verify_receipt(msgspec.json.encode(shown), node_key=node_id)
    failed = next((each for each in checks if not each.ok), None)
    return f"fails a check ({failed.name}): {failed.meaning}" if failed is not None else None
