"""Characters that nobody sees and that change what is read: written out in HTML.

Marks of direction can make code read as what it is not (CVE-2021-42574), and characters without
width hide in names.  In prose some are part of the spelling, so fewer are written out there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_OVERRIDES = "\u202a-\u202e"
_IN_PROSE = re.compile(f"[{_OVERRIDES}\u2060\ufeff\u180e]")
_IN_CODE = re.compile(
    f"[{_OVERRIDES}\u2066-\u2069\u200e\u200f\u061c\u200b\u2060-\u2064\ufeff\u180e\u00ad\u115f\u3164]"
    # Joiners belong to emoji and to some scripts; between ASCII characters they only hide.
    r"|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def visible_in_code(html: str) -> str:
    """The same escaped text with its invisible characters written out.  Nothing in it may be part
    of a tag."""
    return _written_out(_IN_CODE, html, _mark)


def visible_in_prose(html: str) -> str:
    """The same, for text that is no code."""
    return _written_out(_IN_PROSE, html, _mark)


def visible_text(text: str) -> str:
    """The same for text that is not HTML, as in code."""
    return _written_out(_IN_CODE, text, _name)


def _written_out(pattern: re.Pattern[str], text: str, shown: Callable[[re.Match[str]], str]) -> str:
    if not text.isascii():
        text = pattern.sub(shown, text)
    return _CONTROLS.sub(shown, text)


def _name(match: re.Match[str]) -> str:
    return f"U+{ord(match[0]):04X}"


def _mark(match: re.Match[str]) -> str:
    title = unicodedata.name(match[0], "CONTROL CHARACTER").title()
    return f'<span class="invisible" title="{title}">{_name(match)}</span>'
