"""Times as the database has them, Unix milliseconds."""

from __future__ import annotations

import time

from pinaivu_box.text import utc_text


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def time_text(milliseconds: int | None) -> str | None:
    """RFC 3339 in UTC; None stays None."""
    return None if milliseconds is None else utc_text(milliseconds / 1000)
