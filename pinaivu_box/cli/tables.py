"""Tables for eyes: on a terminal they fit its width, into a pipe nothing is left out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from rich.text import Text

_GAP = 2  # between columns
_LEAST = 12  # a column that is cut keeps so many characters; with less room it is left out
_NARROWEST = 8  # that a column is folded to
_ENDLESS = 100_000
Cut = Literal["front", "end"]  # what of a cell goes


def wide_option(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Show every column whole, however narrow the terminal."
    return click.option("--wide", is_flag=True, help=text)(command)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    numbers: Collection[str] = (),
    spared: Sequence[str] = (),
    cut: Mapping[str, Cut] | None = None,
    wide: bool = False,
    total: Sequence[str] | None = None,
) -> None:
    """Print a plain table; the columns named in `numbers` are set to the right.

    On a terminal that is too narrow for it, columns in `cut` are shortened and then the columns
    `spared` are left out, the first of them first, until it fits; standard error names them.  The
    others are there in any case: what is too wide is folded.  `total` is a last row, set apart.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    last = None if total is None else [Text(cell) for cell in total]
    whole = wide or not sys.stdout.isatty()
    # Names are printed as they are: what looks like rich's markup is none.
    console = Console(width=_ENDLESS if whole else None, markup=False, emoji=False, highlight=False)
    wholes = [
        max(cell.cell_len for cell in (Text(name), *column))
        for name, *column in zip(columns, *cells, *([last] if last else []), strict=True)
    ]
    shown = _fitted(columns, wholes, console.width, spared, cut or {})
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for place, width in shown.items():
        name = columns[place]
        side: Literal["left", "right"] = "right" if name in numbers else "left"
        table.add_column(
            name, justify=side, width=width, no_wrap=width == wholes[place], overflow="fold"
        )
    for row in cells:
        found = [_short(row[n], width, (cut or {}).get(columns[n])) for n, width in shown.items()]
        table.add_row(*found)
    if last:
        table.add_section()
        table.add_row(*(last[n] for n in shown), style="bold")
    console.print(table)
    if missing := [name for n, name in enumerate(columns) if name and n not in shown]:
        told = f"with --wide also: {', '.join(missing)}"
        click.echo(click.wrap_text(told, console.width), err=True)


def _fitted(
    columns: Sequence[str],
    wholes: Sequence[int],
    room: int,
    spared: Sequence[str],
    cut: Mapping[str, Cut],
) -> dict[int, int]:
    """The numbers of the columns that are shown, with their widths; `wholes` are those of all."""
    shown, over = dict(enumerate(wholes)), 0
    for count in range(len(spared) + 1):
        shown = {n: width for n, width in enumerate(wholes) if columns[n] not in spared[:count]}
        over = sum(shown.values()) + _GAP * (len(shown) - 1) - room
        for n, width in shown.items():
            if columns[n] in cut and over > 0:
                less = min(over, max(0, width - max(_LEAST, len(columns[n]))))
                shown[n] -= less
                over -= less
        if over <= 0:
            return shown
    while over > 0 and max(shown.values()) > _NARROWEST:
        shown[max(shown, key=lambda n: shown[n])] -= 1
        over -= 1
    return shown


def _short(cell: Text, width: int, cut: Cut | None) -> Text:
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
