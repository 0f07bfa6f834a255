"""`keys create --from FILE`: reads the drafts of keys from CSV, and prints the new keys as CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.key_options import OPTIONS, expiry, with_options
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.policy import Policy

# The settings by the names of their columns, as options of `keys create`.
_SETTINGS = {
    option.opts[0].removeprefix("--").replace("-", "_"): option
    for option in OPTIONS
    if not option.is_flag
}
_COLUMNS = ("name", "account", "expires", "limits", *_SETTINGS)


def drafts(
    path: Path, policy: Policy, account: str | None, expires: str | None
) -> Iterator[tuple[int, Any]]:
    """The number of each line and its key as a `Draft`; the arguments stand for empty cells.

    Raises UsageError, which names the line, and CliError.
    """
    from pinaivu_box.store.new_keys import Draft

    for line, row in _rows(path):
        try:
            draft = Draft(
                name=row.get("name", ""),
                account=row.get("account") or account,
                policy=with_options(policy, _settings(row)),
                expires_at=expiry(row.get("expires") or expires),
            )
        except UsageError as error:
            raise at_line(path, line, error.message.removeprefix("--")) from error
        yield line, draft


def at_line(path: Path, line: int, message: str) -> UsageError:
    return UsageError(f"{path}, line {line}: {message.rstrip('.')}. No key was created.")


def print_csv(keys: list[Any]) -> None:
    """Print new keys (`NewKey`)."""
    from pinaivu_box.admin.usage_report import cell

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", "account", "id", "key", "expires_at"])
    for key in keys:
        writer.writerow([cell(key.name), key.account, key.id, key.key, key.expires_at or ""])
    click.echo(file.getvalue(), nl=False)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Raises UsageError, CliError."""
    text = _text(path)
    first_line = text.partition("\n")[0]
    # The separator of a spreadsheet depends on the decimal point of its language.
    separator = next((mark for mark in (",", ";", "\t") if mark in first_line), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [name.strip().lower().replace("-", "_") for name in next(lines, [])]
        _check_header(path, header)
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header):
                message = f"the line has {len(cells)} cells, but there are {len(header)} columns"
                raise at_line(path, lines.line_num, message)
            yield lines.line_num, dict(zip(header, map(str.strip, cells), strict=False))
    except csv.Error as error:
        raise at_line(path, lines.line_num, f"the line is not valid CSV: {error}") from error


def _text(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8-sig")  # Excel writes a byte order mark
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: save it as CSV in UTF-8.") from None


def _check_header(path: Path, header: list[str]) -> None:
    unknown = next((name for name in header if name not in _COLUMNS), None)
    if unknown is not None:
        problem = f"unknown column '{unknown}'"
    elif "name" not in header:
        problem = "the column 'name' is missing"
    elif len(set(header)) < len(header):
        problem = "a column is named twice"
    else:
        return
    columns = ", ".join(_COLUMNS)
    raise at_line(path, 1, f"{problem}: the first line names the columns, out of {columns}")


def _settings(row: dict[str, str]) -> dict[str, Any]:
    """The settings of a line as the options would give them.  Raises UsageError."""
    values = {name: row[name] for name in _SETTINGS if row.get(name)}
    for pair in filter(None, map(str.strip, row.get("limits", "").split(";"))):
        name, separator, value = map(str.strip, pair.partition("="))
        name = name.lower().replace("-", "_")
        if name not in _SETTINGS or not (separator and value):
            raise UsageError(f"limits: '{pair}' is not as in 'rpm=60; budget=10 per 30d'.")
        values[name] = value
    settings: dict[str, Any] = {}
    for name, value in values.items():
        option = _SETTINGS[name]
        words = tuple(value.replace(";", " ").split())
        settings[option.name or ""] = words if option.multiple else value
    return settings
