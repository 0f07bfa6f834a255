"""Texts from outside: whole or not at all, and in ASCII where ASCII is meant."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings
from msgspec import Meta, Struct
from msgspec import inspect as types

from pinaivu_box import amount
from pinaivu_box.admin.usage_report import parse_day
from pinaivu_box.config import parse_duration
from pinaivu_box.identity import Identity, verify
from pinaivu_box.membership.tickets import TicketInvalid, decode
from pinaivu_box.peering_config import HOURS
from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.endpoints import ENDPOINTS
from pinaivu_box.server.openapi import specification
from pinaivu_box.text import END, NODE_ID, number, whole
from tests.support.keys import known_identity
from tests.support.package_modules import MODULES, ONLY_IN, PACKAGE, in_engine

THEIRS = tuple(ONLY_IN.values())
PARENTS = [
    name
    for name in MODULES
    if name not in ("", "__main__") and not in_engine(name) and not name.startswith(THEIRS)
]


def structs() -> list[type[Struct]]:
    """All wire types of the package, and all others that msgspec reads."""
    found: dict[str, type[Struct]] = {}
    for name in PARENTS:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        for _, made in inspect.getmembers(module, inspect.isclass):
            if issubclass(made, Struct) and made.__module__ == module.__name__:
                found[f"{made.__module__}.{made.__qualname__}"] = made
    return list(found.values())


def patterns_of(kind: Any, seen: set[int]) -> Iterator[str]:
    """Every pattern that a type of msgspec's has, however deep."""
    if id(kind) in seen:
        return
    seen.add(id(kind))
    if isinstance(kind, types.StrType) and kind.pattern is not None:
        yield kind.pattern
    if isinstance(kind, types.Type | types.Field):
        parts = [getattr(kind, name) for name in kind.__struct_fields__]
    else:
        parts = list(kind) if isinstance(kind, tuple | list) else []
    for part in parts:
        if isinstance(part, types.Type | types.Field | tuple | list):
            yield from patterns_of(part, seen)


def all_patterns() -> set[str]:
    made = types.multi_type_info(structs())
    found = {pattern for one in made for pattern in patterns_of(one, set())}
    assert len(found) > 8 and len(made) > 150, "the search has found nothing"
    return found


def texts(value: Any) -> Iterator[str]:
    """The patterns in a JSON schema."""
    if isinstance(value, dict):
        if isinstance(value.get("pattern"), str):
            yield value["pattern"]
        for one in value.values():
            yield from texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)


PATTERNS = sorted(all_patterns())


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_pattern_fits_a_whole_text_only(data: st.DataObject, pattern: str) -> None:
    """Of every type that reads what others write: with a line break behind it, or before, it is
    another text."""
    assert pattern.startswith("^(?:") and pattern.endswith(f"){END}")
    inner = pattern.removeprefix("^(?:").removesuffix(f"){END}")
    kind = Annotated[str, Meta(pattern=pattern)]
    text = data.draw(st.from_regex(re.compile(inner), fullmatch=True))
    assert msgspec.convert(text, kind) == text
    for other in (f"{text}\n", f"\n{text}", f"{text}\r\n", f"{text}\0"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(other, kind)


def test_the_schema_for_others_says_the_same() -> None:
    """JSON schema's patterns are ECMA-262's: no `\\A`, no `\\Z`, and `$` is not used either."""
    found = set(texts(specification(ENDPOINTS)))
    assert found and found <= set(PATTERNS)
    for pattern in found:
        assert not re.search(r"\\[AZzdw]|(?<!\\)\$", pattern)


# -- the source ------------------------------------------------------------------------------------

TAKES_A_PATTERN = ("compile", "match", "search", "fullmatch", "sub", "split", "findall", "finditer")


def literal(node: ast.expr) -> str:
    """The text of a literal; what an f-string fills in is left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values if isinstance(part, ast.Constant))
    return ""


def wrong_in(source: str) -> list[str]:
    """Patterns that fit more than a whole text, or other digits than ASCII's, and what else takes
    such digits."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if named in ("isdigit", "isdecimal", "isnumeric", "isalnum", "isalpha"):
            wrong.append(f"{named} takes every script")
        patterns = [literal(word.value) for word in node.keywords if word.arg == "pattern"]
        if (
            named in TAKES_A_PATTERN
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "re"
            and node.args
        ):
            patterns.append(literal(node.args[0]))
        # Whoever reads prose says that every script is meant.
        says_which = re.search(r"re\.(ASCII|UNICODE)", ast.unparse(node)) is not None
        for pattern in patterns:
            if re.search(r"(?<!\\)\$|\\Z|\\A", pattern):
                wrong.append(f"{pattern} ends before a line break, or is Python's alone")
            if re.search(r"\\[dwb]", pattern, re.IGNORECASE) and not says_which:
                wrong.append(f"{pattern} takes every script")
    return wrong


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or PACKAGE)
def test_no_module_reads_more_than_it_means(module: str) -> None:
    assert wrong_in(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        're.compile(r"[0-9a-f]{64}$")',
        're.search("^a$", text)',
        're.fullmatch(r"\\d+", text)',
        're.compile(rf"{prefix}\\w+")',
        'Meta(pattern=r"^[0-9]+$")',
        'Meta(pattern=r"\\A[0-9]+\\Z")',
        "text.isdigit()",
    ],
)
def test_the_check_sees_such_a_pattern(source: str) -> None:
    assert wrong_in(source)


# -- numbers, amounts, times -----------------------------------------------------------------------

ODD = (
    "\uff11\uff12",
    "\u0663",
    "1\uff12",
    "1\n",
    "\n1",
    "1_0",
    " 1",
    "1 ",
    "+1",
    "²",
    "",
    "1\0",
    "0x1",
    "1" * 19,
)


@pytest.mark.parametrize("text", ODD)
def test_a_number_is_ascii_digits(text: str) -> None:
    assert number(text) is None
    with pytest.raises(ValueError, match=re.escape("decimal") + "|from 0 to"):
        amount.parse(text)
    assert number("12") == 12 and amount.parse("12") == 12 * amount.UNITS


@pytest.mark.parametrize(
    "text", ["\uff15m", "5m\n5", "\uff15", "1_0s", "1e3s", "\u0663d", "5 m m", "+5m"]
)
def test_a_duration_is_ascii(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)
    assert not HOURS.fullmatch("1\uff18:00-08:00") and not HOURS.fullmatch("18:00-08:00\n")


@pytest.mark.parametrize(
    "text", ["\uff12\uff10\uff12\uff16-01-01", "2026-01-01\n", "2026-1-1", " 2026-01-01", ""]
)
def test_a_day_is_ascii(text: str) -> None:
    with pytest.raises(ValueError, match="not a date"):
        parse_day(text)


def test_a_node_id_has_one_spelling() -> None:
    """`bytes.fromhex` reads several: under each, a signature would be the same box's."""
    identity: Identity = known_identity(1)
    signature = identity.sign("d", b"m")
    good = identity.node_id
    assert verify(good, "d", b"m", signature)
    key = good.removeprefix("node_")
    spelled = " ".join(key[at : at + 2] for at in range(0, 64, 2))
    for other in (
        key, f"node_{key.upper()}", f"{good}\n", f"node_{spelled}", f"node_node_{key}", f" {good}",
    ):  # fmt: skip
        assert not re.search(NODE_ID, other)
        assert not verify(other, "d", b"m", signature)


def test_a_ticket_is_ascii() -> None:
    with pytest.raises(TicketInvalid):
        decode("pnv1\N{KELVIN SIGN}aaaa")


def test_whole_is_whole_also_with_alternatives() -> None:
    pattern = whole("a|b")
    assert re.search(pattern, "a") and re.search(pattern, "b")
    assert not any(re.search(pattern, text) for text in ("ab", "a\n", "xb", "b\n", "\nb"))


def test_the_sources_are_all_looked_at() -> None:
    assert len(MODULES) > 100 and all(isinstance(path, Path) for path in MODULES.values())


@pytest.mark.parametrize("route", ENDPOINTS, ids=lambda route: route.path)
def test_a_route_is_of_a_whole_path(route: Endpoint) -> None:
    """A newline at the end makes it another path, or belongs to what the path names."""
    path = re.sub("{[^}]*}", "x", route.path)
    assert route.path_regex.match(path)
    found = route.path_regex.match(f"{path}\n")
    assert found is None or "x\n" in found.groups()
