"""What stands at an address, and what is near one where nothing does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from starlette.routing import BaseRoute, Route

from pinaivu_box.text import END

_PARAMETER = re.compile(r"{[^}]*}")
# What base URLs of other servers end in.
_BASE = re.compile(rf"^(?:/(?:api|openai|v[0-9]+))*(?=/|{END})")
_NEAR = 0.7
_SHOWN = 8
_LONGEST = 100  # characters of a path that are compared


def methods_at(path: str, routes: Iterable[BaseRoute]) -> list[str]:
    """What can be done there."""
    found: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.path_regex.match(path):
            found |= route.methods or set()
    return sorted(found - {"HEAD"})


def nothing_at(path: str, routes: Sequence[BaseRoute]) -> str:
    """The sentence that says what there is instead."""
    path = path[:_LONGEST]  # it is compared on the event loop, also for who has no key
    known = [route for route in routes if isinstance(route, Route)]
    scored = sorted(((_likeness(path, route), n) for n, route in enumerate(known)), reverse=True)
    near = [n for score, n in scored if score >= max(_NEAR, scored[0][0] - 0.1)][:3]
    if near:
        names = list(dict.fromkeys(_name(known[n]) for n in near))
        return f"Did you mean {' or '.join(names)}?"
    shown = list(dict.fromkeys(route.path for route in known if "{" not in route.path))[:_SHOWN]
    return f"There are {', '.join(shown)} and more: /docs describes them all."


def _likeness(path: str, route: Route) -> float:
    """From 0 to 1; base URLs are pasted with /v1, without it, or with another's."""
    short = _BASE.sub("", path)
    alike = _alike(short, _BASE.sub("", route.path)) if short else 0.0
    return max(_alike(path, route.path), alike)


def _alike(path: str, template: str) -> float:
    """Without what stands in the places of parameters: that is like anything."""
    parts, given = template.split("/"), path.split("/")
    literal = [n for n, part in enumerate(parts) if not _PARAMETER.fullmatch(part)]
    kept = [one for n, one in enumerate(given) if n in literal or n >= len(parts)]
    if len(given) < len(parts):
        kept.append("")  # it lacks one
    own = "/".join(parts[n] for n in literal)
    return difflib.SequenceMatcher(None, "/".join(kept), own).ratio()


def _name(route: Route) -> str:
    path = _PARAMETER.sub("{id}", route.path)
    return f"{'/'.join(sorted((route.methods or set()) - {'HEAD'}))} {path}"
