"""How commands print: JSON, tables, fields and checks, and the times, amounts and sizes in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click
import msgspec

from pinaivu_box.cli import colours

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

UNKNOWN = "-"
_GAP = 2  # characters between columns
_MIN_CUT_WIDTH = 12  # characters; with less room a column is left out instead of shortened
_UNLIMITED_WIDTH = 100_000  # characters
_CHECK_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
Cut = Literal["start", "end"]


class Column(NamedTuple):
    """A column of a table: its title, and a function from an item to its cell.

    `number` aligns it to the right.  If a terminal is too narrow, columns with a `cut` are
    shortened at that end, then those with a `drop` are left out, the lowest numbers first.
    """

    title: str
    cell: Callable[[Any], str | Text]
    number: bool = False
    drop: int | None = None
    cut: Cut | None = None


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(
    items: Iterable[Any],
    columns: Sequence[Column],
    *,
    wide: bool = False,
    total: Any = None,
) -> None:
    """Print a table; `total` is the item of a last row, set apart.

    On a terminal it fits the width: columns are shortened, left out (standard error names them) and
    at last folded.  With `wide`, or when the output is not a terminal, all is printed in full.
    """
    from rich.table import Table
    from rich.text import Text

    listed = [*items, total] if total is not None else items
    rows = [[_text(column.cell(item)) for column in columns] for item in listed]
    console = _console(wide=wide)
    full_widths = [
        max(cell.cell_len for cell in (Text(column.title or " "), *cells))
        for column, *cells in zip(columns, *rows, strict=True)
    ]
    widths = _fit(columns, full_widths, console.width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for n in widths:
        side: Literal["left", "right"] = "right" if columns[n].number else "left"
        table.add_column(columns[n].title, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(_shortened(row[n], width, columns[n].cut) for n, width in widths.items()))
    if total is not None:
        table.rows[-1].style = "bold"
    console.print(table)
    if hidden := [c.title for n, c in enumerate(columns) if c.title and n not in widths]:
        note = f"with --wide also: {', '.join(hidden)}"
        click.echo(click.wrap_text(note, console.width), err=True)


def print_fields(fields: Mapping[str, str]) -> None:
    """Print one `name  value` on each line."""
    width = max(map(len, fields)) + _GAP
    for name, value in fields.items():
        click.echo(f"{name:{width}}{value}")


def print_checks(checks: Iterable[Any]) -> None:
    """Print checks (`doctor.check.Check`); a name that repeats is printed once."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")  # the end of a long path says which file it is
    previous = ""
    for check in checks:
        finding = Text(check.found)
        if check.todo:
            finding.append(f"\n→ {check.todo}", style="bold")
        state = Text(check.state.upper() if check.state == "failed" else check.state)
        state.stylize(_CHECK_COLOURS[check.state])
        table.add_row(state, "" if check.name == previous else check.name, finding)
        previous = check.name
    _console().print(table)


def print_steps(steps: Iterable[Any]) -> None:
    """Print what was verified, one after another: whether it holds, and what that means."""
    for number, step in enumerate(steps, start=1):
        click.echo(f"{number}. {'ok    ' if step.ok else 'FAILED'} {step.name}: {step.meaning}")


def time_text(text: str | None, none: str = UNKNOWN, *, seconds: bool = False) -> str:
    """An RFC 3339 time in UTC as `2026-11-01 12:00`, with `seconds` to the second."""
    return none if text is None else text[: 19 if seconds else 16].replace("T", " ")


def money(amounts: Mapping[str, str]) -> str:
    """Amounts by currency as `1.5 credits, 2 EUR`."""
    return ", ".join(f"{amount} {currency}" for currency, amount in amounts.items()) or "0"


def _console(*, wide: bool = False) -> Console:
    width = _UNLIMITED_WIDTH if wide or not sys.stdout.isatty() else None
    return colours.console(width=width)


def _text(cell: str | Text) -> Text:
    from rich.text import Text

    return Text(cell) if isinstance(cell, str) else cell


def _fit(columns: Sequence[Column], full_widths: Sequence[int], room: int) -> dict[int, int]:
    """The widths of the columns that are shown, by their numbers.

    If that is still too wide although all that may be is left out, rich folds the widest.
    """
    order = sorted((column.drop, n) for n, column in enumerate(columns) if column.drop is not None)
    widths = dict(enumerate(full_widths))
    for count in range(len(order) + 1):
        dropped = {n for _, n in order[:count]}
        widths = {n: width for n, width in enumerate(full_widths) if n not in dropped}
        excess = sum(widths.values()) + _GAP * (len(widths) - 1) - room
        for n, width in widths.items():
            if columns[n].cut and excess > 0:
                least = max(_MIN_CUT_WIDTH, len(columns[n].title))
                saved = min(excess, max(0, width - least))
                widths[n] -= saved
                excess -= saved
        if excess <= 0:
            break
    return widths


def _shortened(cell: Text, width: int, cut: Cut | None) -> Text:
    from rich.text import Text

    if cut is None or cell.cell_len <= width:
        return cell
    if cut == "end":
        short = cell.copy()
        short.truncate(width, overflow="ellipsis")
        return short
    text = cell.plain
    while Text(text).cell_len >= width:
        text = text[1:]
    return Text(f"…{text}", style=cell.style)
