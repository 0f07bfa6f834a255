"""Markdown as HTML that a page may insert as it is, whole or while it is still being written.

`BlockRenderer` takes text as it comes.  A block that has ended is rendered once; the open one is
rendered again when asked, or grows by plain text, so the work is linear in the text.  Raw HTML is
shown as text, and addresses are http, https or mailto.  Images are links with their address: they
would tell others who reads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from msgspec import Struct

from pinaivu_box.server.pages.blocks import LONGEST, Block, Splitter
from pinaivu_box.server.pages.code_colours import coloured, plain
from pinaivu_box.server.pages.visible import visible_in_prose, visible_text

MAX_LINE_CHARACTERS = 100_000  # what is longer is cut
MAX_CHARACTERS = 1_000_000  # of one text; the rest is left out, and that is said
_MAX_MARKS = (
    2_000  # characters with a meaning in one block: the parser's time grows with their square
)
_MAX_NESTING = 12
_SCHEMES = ("http", "https", "mailto")
_REL = "noopener noreferrer nofollow"
_ADDRESS = re.compile(r"https?://[^\s<>\"'`\\^{}|]{3,2000}", re.IGNORECASE)
_AFTER_ADDRESS = ".,:;!?*_~"
_MARKS = re.compile(r"[\[\]*_`~<&!\\|]")
# The last line so far may become something else: an underline, a rule, an item, a fence.
_MAX_UNDECIDED_CHARACTERS = 100
_UNDECIDED_LINE = re.compile(
    r"[ \t]*(?:[-=*_#>+~`|: \t]+|[0-9]{1,9}[.)]?[ \t]*|[-*+>][ \t]+\[[ xX]?\]?)"
)
_PLAIN_TEXT = re.compile(r"[^\n\[\]*_`~<>&!\\|#@/:]*")
_MIN_SECONDS = 0.1  # between two updates
_RENDERING_SHARE = 0.04  # of the time: an open block that takes long is rendered less often
_BYTES_PER_SECOND = 250_000
_TOO_LONG = '<p class="muted">The rest is not shown: the text is too long for a page.</p>'


class Update(Struct, frozen=True, omit_defaults=True):
    """What has changed.  `done`: blocks that never change again, which take the open block's place.
    `open`: the open block as it is now.  `append`: text to add to the end of the open block."""

    done: list[str] = []
    open: str | None = None
    append: str = ""

    def __bool__(self) -> bool:
        return bool(self.done or self.open is not None or self.append)


class Blocks(Update, frozen=True, omit_defaults=True):
    """What a page changes of an answer.  `thoughts`: plain text to append to the thoughts."""

    thoughts: str = ""


class BlockRenderer:
    """One text that grows."""

    def __init__(self) -> None:
        self._splitter = Splitter()
        self._partial: list[str] = []  # pieces of the last line, which has no end yet
        self._partial_size = 0
        self._done: list[str] = []  # since the last update
        self._left = MAX_CHARACTERS
        self._shown: tuple[str, object] | None = None  # of the open block: its text and what it is
        self._shown_lines = 0  # of an open fence

    def feed(self, text: str) -> None:
        if not self._left:
            return
        text = text.replace("\r", "").replace("\x00", "\ufffd")[: self._left]
        self._left -= len(text)
        first, *rest = text.split("\n")
        self._add_to_line(first)
        for line in rest:
            self._end_line()
            self._add_to_line(line)
        if not self._left:
            self._end_text()
            self._done.append(_TOO_LONG)

    def update(self) -> Update:
        """What has changed since the last update."""
        done, self._done = self._done, []
        if done:
            self._shown, self._shown_lines = None, 0
        if self._splitter.fence is not None:
            shown, append = self._open_fence()
        else:
            shown, append = self._open_text()
        if done and shown is None:
            shown = ""
        return Update(done, shown, append)

    def finish(self) -> Update:
        """The text ends here."""
        self._end_text()
        done, self._done = self._done, []
        return Update(done, "")

    def _add_to_line(self, text: str) -> None:
        while (room := MAX_LINE_CHARACTERS - self._partial_size) < len(text):
            self._partial.append(text[:room])
            self._end_line()
            text = text[room:]
        self._partial.append(text)
        self._partial_size += len(text)

    def _end_line(self) -> None:
        line = "".join(self._partial)
        self._partial, self._partial_size = [], 0
        self._done += [_render(block) for block in self._splitter.add(line)]

    def _end_text(self) -> None:
        self._end_line()
        self._done += [_render(block) for block in self._splitter.end()]

    def _open_fence(self) -> tuple[str | None, str]:
        fence = self._splitter.fence
        assert fence is not None
        partial = "".join(self._partial)
        if fence.might_close(partial):
            partial = ""
        new = fence.lines[self._shown_lines :]
        if self._shown is None or self._shown[1] is not fence:
            self._shown, self._shown_lines = ("", fence), 0
            opened: str | None = _code("", fence.language)
            new = fence.lines
        else:
            opened = None
        self._shown_lines = len(fence.lines)
        text = "".join(f"{line}\n" for line in new) + fence.without_indent(partial)
        already = self._shown[0]
        self._shown = (fence.without_indent(partial), fence)
        return opened, visible_text(text.removeprefix(already))

    def _open_text(self) -> tuple[str | None, str]:
        partial = "".join(self._partial).rstrip(" ")  # a space at the end is not rendered
        if len(partial) < _MAX_UNDECIDED_CHARACTERS and _UNDECIDED_LINE.fullmatch(partial):
            partial = ""
        lines = self._splitter.lines
        text = "\n".join([*lines, partial] if partial else lines)
        shown = self._shown[0] if self._shown is not None else ""
        if shown == text:
            return None, ""
        self._shown = (text, None)
        if shown and text.startswith(shown):
            added = text[len(shown) :]
            if _PLAIN_TEXT.fullmatch(added) and _closed(shown) == shown:
                return None, visible_text(added)
        return _render(Block(_closed(text))), ""


class AnswerHtml:
    """Takes the text of one answer and gives updates, not more often than a page can use them."""

    def __init__(self) -> None:
        self._text = BlockRenderer()
        self._thoughts: list[str] = []
        self._next = 0.0

    def text(self, piece: str) -> None:
        self._text.feed(piece)

    def thoughts(self, piece: str) -> None:
        self._thoughts.append(piece)

    def wait_seconds(self) -> float:
        """Until the next update is due; 0 if it is."""
        return max(0.0, self._next - time.monotonic())

    def update(self) -> Blocks | None:
        """What has changed, or None if nothing has."""
        began = time.monotonic()
        blocks = self._blocks(self._text.update())
        ended = time.monotonic()
        sent = len(blocks.open or "") if blocks else 0
        pause = max(_MIN_SECONDS, (ended - began) / _RENDERING_SHARE, sent / _BYTES_PER_SECOND)
        self._next = ended + min(pause, 5.0)
        return blocks

    def finish(self) -> Blocks | None:
        """The last change."""
        return self._blocks(self._text.finish())

    def _blocks(self, update: Update) -> Blocks | None:
        thoughts, self._thoughts = "".join(self._thoughts), []
        if not update and not thoughts:
            return None
        return Blocks(update.done, update.open, update.append, thoughts)


def render(text: str) -> str:
    """A whole text.  Takes about 2 ms for a page of prose, longer for code."""
    renderer = BlockRenderer()
    renderer.feed(text)
    return "".join(renderer.finish().done)


def _render(block: Block) -> str:
    if block.fence is not None:
        return _code("".join(f"{line}\n" for line in block.fence.lines), block.fence.language)
    if len(block.text) > 2 * LONGEST or len(_MARKS.findall(block.text)) > _MAX_MARKS:
        return f'<p class="plain" dir="auto">{visible_in_prose(escape(block.text))}</p>\n'
    html: str = _parser().render(block.text)
    return html


def _code(code: str, language: str) -> str:
    name = plain(language[:30]) if language else "text"
    return (
        f'<div class="code"><div class="code-head"><span>{name}</span>'
        '<button type="button" class="button quiet" data-copy-code>Copy</button></div>'
        f'<pre tabindex="0"><code>{coloured(code, language)}</code></pre></div>\n'
    )


def _closed(text: str) -> str:
    """A text that goes on, with bold text and code in its last paragraph closed, so that their
    marks are not seen for a moment."""
    last = text.rpartition("\n\n")[2]
    for mark in ("`", "**"):
        if last.count(mark) % 2:
            return text if last.endswith(mark) else text + mark
    return text


class _Renderer(RendererHTML):
    """markdown-it's renderer, but for what could lead out of the page."""

    def text(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        content = tokens[idx].content
        if "://" not in content or _in_link(tokens, idx):
            return visible_in_prose(escape(content))
        return _with_links(content)

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[idx]
        alt = token.content or "image"
        address = str(token.attrs.get("src", ""))
        shown = f"Image: {alt} ({address[:200]})"
        if _in_link(tokens, idx) or not _is_safe(address):
            return f'<span class="image">{visible_in_prose(escape(shown))}</span>'
        return _link(address, shown, ' class="image"')


def _without_context(rule: Callable[[Token], str]) -> Callable[..., str]:
    """The rule as a method of the renderer."""
    return lambda _renderer, tokens, idx, *_: rule(tokens[idx])


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt(
        "commonmark",
        {"html": False, "linkify": False, "maxNesting": _MAX_NESTING},
        renderer_cls=_Renderer,
    )
    for name, rule in _RULES.items():
        parser.add_render_rule(name, _without_context(rule))
    parser.enable(["table", "strikethrough"])
    # Definitions of links would have to be known before the blocks that use them.
    parser.disable(["reference", "html_block", "html_inline"])
    parser.validateLink = _is_safe  # type: ignore[method-assign, assignment]
    return parser


def _in_link(tokens: Sequence[Token], idx: int) -> bool:
    """Links have no links inside."""
    kinds = [token.type for token in tokens[:idx]]
    return kinds.count("link_open") > kinds.count("link_close")


def _is_safe(address: str) -> bool:
    try:
        return urlsplit(address).scheme.lower() in _SCHEMES
    except ValueError:
        return False


def _link(address: str, shown: str, more: str = "") -> str:
    text = visible_in_prose(escape(shown))
    return f'<a href="{escape(address)}"{more} rel="{_REL}" target="_blank">{text}</a>'


def _with_links(content: str) -> str:
    """The text with the addresses in it as links."""
    parts, end = [], 0
    for match in _ADDRESS.finditer(content):
        address = match[0].rstrip(_AFTER_ADDRESS)
        while address.endswith(")") and address.count(")") > address.count("("):
            address = address[:-1].rstrip(_AFTER_ADDRESS)
        if not _is_safe(address):
            continue
        parts.append(visible_in_prose(escape(content[end : match.start()])))
        parts.append(_link(address, address))
        end = match.start() + len(address)
    parts.append(visible_in_prose(escape(content[end:])))
    return "".join(parts)


def _heading(token: Token) -> str:
    """Answers stand below the headings of the page."""
    return f"h{min(int(token.tag[1]) + 2, 6)}"


def _cell(token: Token) -> str:
    style: Any = token.attrs.get("style", "")
    align = str(style).removeprefix("text-align:")
    kind = f' class="{align}"' if align in ("left", "right", "center") else ""
    return f'<{token.tag}{kind} dir="auto">'


def _link_open(token: Token) -> str:
    address = str(token.attrs.get("href", ""))
    return f'<a href="{escape(address)}" rel="{_REL}" target="_blank">'


# How tokens that need no context are written, by their types.
_RULES: dict[str, Callable[[Token], str]] = {
    "code_inline": lambda token: f"<code>{plain(token.content)}</code>",
    "code_block": lambda token: _code(token.content, ""),
    "fence": lambda token: _code(token.content, (token.info.split() or [""])[0]),
    "link_open": _link_open,
    "heading_open": lambda token: f'<{_heading(token)} dir="auto">',
    "heading_close": lambda token: f"</{_heading(token)}>\n",
    "paragraph_open": lambda token: "" if token.hidden else '<p dir="auto">',
    "list_item_open": lambda _: '<li dir="auto">',
    "table_open": lambda _: '<div class="table" tabindex="0"><table>\n',
    "table_close": lambda _: "</table></div>\n",
    "th_open": _cell,
    "td_open": _cell,
}
