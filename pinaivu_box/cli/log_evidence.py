"""`pinaivu receipts evidence`: what is wrong with the logs of other boxes."""

from __future__ import annotations

import re
import sys
from operator import attrgetter
from typing import Any

import click
from msgspec import Struct

from pinaivu_box.cli import documents
from pinaivu_box.cli.call import Call, actor
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import Column, print_json, print_steps, time_text
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.text import utc_text

_ID = re.compile("[0-9a-f]{6,32}")
_COLUMNS = (
    Column("FOUND (UTC)", lambda alarm: time_text(alarm.found_at, seconds=True), drop=2),
    Column("ID", lambda alarm: alarm.id[:12]),
    Column("KIND", lambda alarm: f"{alarm.kind} (dismissed)" if alarm.dismissed else alarm.kind),
    Column("BOX", lambda alarm: alarm.node_id[:17], drop=1),
    Column("DETAIL", attrgetter("detail"), cut="end"),
)


class ShownAlarm(Struct, frozen=True):
    """As JSON has it: a time in UTC, the document as text."""

    id: str
    kind: str
    node_id: str
    origin: str
    found_at: str
    detail: str
    document: str
    dismissed: bool


@click.command()
@standard_options(wide=True)
@click.argument("id_or_file", metavar="[ID|FILE]", required=False)
@click.option(
    "--dismiss", is_flag=True, help="Let what is known of that log no longer count on this box."
)
def evidence(call: Call, id_or_file: str | None, dismiss: bool) -> None:
    """List, print or verify evidence against other logs.

    Without an argument all alarms about the logs of other boxes are listed.  ID prints one: of a
    fork, the document that proves it.  FILE is such a document ('-': standard input), which is
    verified offline; exits with 1 if it proves nothing.
    """
    if id_or_file is None:
        if dismiss:
            raise UsageError("--dismiss needs the id of an alarm, which the list shows.")
        call.print_list([_shown(alarm) for alarm in _alarms(call)], _COLUMNS)
    elif (document := documents.document(id_or_file)) is not None:
        if dismiss:
            raise UsageError("--dismiss needs the id of an alarm, not a file.")
        _verify(call, document)
    else:
        alarm = _find(call, id_or_file)
        if dismiss:
            _dismiss(call, alarm)
        elif call.as_json or not alarm.document:
            call.print(_shown(alarm), lambda shown: click.echo(shown.detail))
        else:
            click.echo(alarm.document.decode(), nl=False)


def _alarms(call: Call) -> list[Any]:
    from pinaivu_box.store.witnessed import alarms

    if not (call.home / "pinaivu.db").exists():
        raise CliError(f"There is no box in {call.home}: choose another --home, or verify a file.")
    return call.in_database(alarms)


def _shown(alarm: Any) -> ShownAlarm:
    fields = {name: getattr(alarm, name) for name in alarm.__struct_fields__}
    fields["found_at"] = utc_text(alarm.found_at / 1000)
    fields["document"] = alarm.document.decode()
    return ShownAlarm(**fields)


def _find(call: Call, text: str) -> Any:
    found = [alarm for alarm in _alarms(call) if _ID.fullmatch(text) and alarm.id.startswith(text)]
    if len(found) != 1:
        raise CliError(
            f"There is no file {text[:80]}, and {'no' if not found else 'more than one'} alarm "
            "with an id that begins so: 'pinaivu receipts evidence' lists them."
        )
    return found[0]


def _dismiss(call: Call, alarm: Any) -> None:
    from pinaivu_box.store import witnessed
    from pinaivu_box.store.audit import record

    entry = record(actor(), "evidence.dismiss", alarm.node_id, origin=alarm.origin)
    call.in_database(lambda database: witnessed.dismiss(database, alarm.origin, entry))
    click.echo(f"What is known of {alarm.origin} no longer counts on this box.", err=True)


def _verify(call: Call, document: bytes) -> None:
    from pinaivu_box.log.evidence import verify

    steps = verify(document)
    if call.as_json:
        print_json([step._asdict() for step in steps])
    else:
        print_steps(steps)
    if not all(step.ok for step in steps):
        sys.exit(1)
