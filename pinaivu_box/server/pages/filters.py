"""How templates write times, amounts, numbers and ids."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pinaivu_box.amount import UNITS, to_text

_LONGEST_ID = 20  # characters that are shown in full
_KEPT = (10, 6)  # of a longer one, from its start and its end
_STEPS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def iso(when: int | str) -> str:
    """Unix milliseconds as RFC 3339 in UTC; text, which is so already, stays."""
    if isinstance(when, str):
        return when
    moment = datetime.fromtimestamp(when / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(when: int | str) -> str:
    """`2026-11-01 12:00 UTC`: what is seen until a script has written the local time."""
    return f"{iso(when)[:16].replace('T', ' ')} UTC"


def amount(units: int | str) -> str:
    """Units of 10^-9 as a decimal, with commas between thousands."""
    text = units if isinstance(units, str) else to_text(units)
    whole, point, part = text.partition(".")
    return f"{int(whole):,}{point}{part}"


def amount_short(units: int) -> str:
    """The same to four digits after the point, for figures that are read at a glance; less than
    that is not shown as nothing."""
    if 0 < units < UNITS // 10_000:
        return amount(units)
    return amount(units - units % (UNITS // 10_000))


def number(value: float) -> str:
    """With commas between thousands."""
    return f"{value:,}"


def compact(value: float) -> str:
    """With three digits that count: `1.24M`."""
    for size, letter in _STEPS:
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            text = f"{scaled:.{digits}f}"
            return (text.rstrip("0").rstrip(".") if digits else text) + letter
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def milliseconds(value: float | None) -> str:
    """`840 ms`, `1.25 s`, `12.4 s`."""
    if value is None:
        return "-"
    if value < 999.5:
        return f"{value:.0f} ms"
    return f"{value / 1000:.2f} s" if value < 9_995 else f"{value / 1000:,.1f} s"


def short_id(text: str) -> str:
    """Shortened in the middle."""
    start, end = _KEPT
    return text if len(text) <= _LONGEST_ID else f"{text[:start]}…{text[-end:]}"


FILTERS: dict[str, Callable[..., Any]] = {
    "iso": iso,
    "utc": utc,
    "amount": amount,
    "amount_short": amount_short,
    "number": number,
    "compact": compact,
    "milliseconds": milliseconds,
    "short_id": short_id,
}
