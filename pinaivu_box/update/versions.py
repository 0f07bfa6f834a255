"""Versions of releases, and which of two is the older one (Semantic Versioning 2.0, section 11)."""

from __future__ import annotations

import re

from pinaivu_box.text import number

PATTERN = r"[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}(?:-[0-9A-Za-z.-]{1,50})?"
_VERSION = re.compile(PATTERN)
Rank = tuple[list[int], bool, list[tuple[bool, int, str]]]


def rank(version: str) -> Rank:
    """What versions are compared by.  Raises ValueError."""
    if not _VERSION.fullmatch(version):
        raise ValueError(f"'{version}' is no version")
    numbers, _, before = version.partition("-")
    identifiers = [] if not before else [_identifier(part) for part in before.split(".")]
    return [int(part) for part in numbers.split(".")], not before, identifiers


def is_older(one: str, other: str) -> bool:
    """Raises ValueError."""
    return rank(one) < rank(other)


def _identifier(part: str) -> tuple[bool, int, str]:
    """Numbers come before words."""
    value = number(part)
    return (value is None, value or 0, part if value is None else "")
