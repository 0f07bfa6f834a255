"""The pages of documentation: their code blocks, links and anchors."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
README = "README.md"
PAGES = (
    README,
    "CHANGELOG.md",
    "pinaivu_box/ARCHITECTURE.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")),
)
COMMANDS = ("", "sh")  # languages of blocks for a shell; indented blocks have none


class Block(NamedTuple):
    """A fenced or indented code block; `language` is empty for an indented one and for a fence
    that names none."""

    page: str
    section: str
    language: str
    text: str
    line: int
    indented: bool

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0].strip()

    @property
    def is_for_shell(self) -> bool:
        return self.indented or self.language == "sh"


class Link(NamedTuple):
    page: str
    target: str


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text()


@cache
def blocks(page: str) -> tuple[Block, ...]:
    return tuple(_blocks(page))


@cache
def links(page: str) -> tuple[Link, ...]:
    """Links and images, without those to other hosts."""
    found = (
        str(child.attrs[attribute])
        for token in _tokens(page)
        for child in token.children or ()
        for kind, attribute in (("link_open", "href"), ("image", "src"))
        if child.type == kind
    )
    return tuple(Link(page, target) for target in found if not re.match(r"[a-z]+:", target))


@cache
def anchors(page: str) -> frozenset[str]:
    """What follows `#` in the addresses of a page's headings, as GitHub makes it."""
    made: list[str] = []
    for token, following in _pairs(page):
        if token.type == "heading_open":
            kept = re.sub(r"[^\w\- ]", "", _words(following)).strip().lower()
            slug = kept.replace(" ", "-")
            made.append(slug if slug not in made else f"{slug}-{made.count(slug)}")
    return frozenset(made)


def section(page: str, title: str) -> str:
    """The text of a section of the second level."""
    return read(page).split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def _blocks(page: str) -> Iterator[Block]:
    title = ""
    for token, following in _pairs(page):
        if token.type == "heading_open":
            title = _words(following)
        elif token.type in ("fence", "code_block"):
            first, _ = token.map or (0, 0)
            text = textwrap.dedent(token.content)
            indented = token.type == "code_block"
            yield Block(page, title, token.info.strip(), text, first + 1, indented)


def _pairs(page: str) -> Iterator[tuple[Token, Token]]:
    tokens = _tokens(page)
    return zip(tokens, [*tokens[1:], *tokens[:1]], strict=True)


def _words(inline: Token) -> str:
    """The text of a heading, without its marks."""
    return "".join(child.content for child in inline.children or ())


@cache
def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(read(page))
