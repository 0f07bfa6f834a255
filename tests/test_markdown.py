"""Markdown as pages show it: whole and while it is written, and whatever a model writes."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.server.pages import markdown
from pinaivu_box.server.pages.blocks import Block
from pinaivu_box.server.pages.markdown import AnswerHtml, BlockRenderer, render

ROOT = Path(__file__).parent.parent
_TAGS = """
    p a strong em s code pre div span button ul ol li blockquote table thead tbody tr th td hr br
    h3 h4 h5 h6
"""
TAGS = set(_TAGS.split())
_ATTRIBUTES = "dir class href rel target title type start tabindex data-copy-code"
ATTRIBUTES = set(_ATTRIBUTES.split())
# fmt: off
LINES = [
    "# Title", "a *b* **c** `d`", "- item", "  more of it", "1. one", "   - nested", "> quote",
    "```", "```python", "~~~", "def f(x): return x", "    indented", "", "", "| a | b |",
    "|---|---|", "| 1 | 2 |", "---", "===", "* * *", "2) two", "<b>html</b>",
    "[link](https://example.org)", "[x]: https://a.b", "  ```", "\tcode",
    "![i](https://example.org/i.png)", "https://example.org/a_(b).", "\\*", "- ", "***",
]
# fmt: on


class Elements(HTMLParser):
    """The tags of a document with their attributes, and whether each is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("hr", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def streamed(text: str, sizes: list[int]) -> str:
    """Text that comes in pieces of these sizes, over and over, with updates between them."""
    renderer, done, position, number = BlockRenderer(), [], 0, 0
    while position < len(text):
        size = sizes[number % len(sizes)]
        renderer.feed(text[position : position + size])
        position, number = position + size, number + 1
        if number % 3:
            done += renderer.update().done
    return "".join([*done, *renderer.finish().done])


def assert_safe(html: str) -> None:
    for tag, attributes in Elements(html).found:
        assert tag in TAGS and set(attributes) <= ATTRIBUTES
        if (address := attributes.get("href")) is not None:
            assert re.match(r"(?:https?|mailto):", address)
            assert attributes["rel"] == "noopener noreferrer nofollow"


@settings(max_examples=40)
@given(st.lists(st.sampled_from(LINES), max_size=25), st.lists(st.integers(1, 40), min_size=1))
def test_a_text_in_any_pieces_becomes_what_it_is_at_once(
    lines: list[str], sizes: list[int]
) -> None:
    text = "\n".join(lines)
    html = render(text)
    assert streamed(text, sizes) == html
    assert_safe(html)


@settings(max_examples=40)
@given(st.text(max_size=400), st.lists(st.integers(1, 9), min_size=1))
def test_any_text_at_all_is_rendered_safely(text: str, sizes: list[int]) -> None:
    html = render(text)
    assert streamed(text, sizes) == html
    assert_safe(html)


@pytest.mark.parametrize("name", ["README.md", "docs/clients.md", "docs/peering.md"])
def test_blocks_alone_are_what_the_whole_text_gives(name: str) -> None:
    text = (ROOT / name).read_text()
    assert render(text) == markdown._parser().render(text)


def test_what_is_open_is_shown_as_what_it_is() -> None:
    renderer = BlockRenderer()
    renderer.feed("Some **bold te")
    assert renderer.update().open == '<p dir="auto">Some <strong>bold te</strong></p>\n'
    renderer.feed("xt** and")
    assert renderer.update().open == '<p dir="auto">Some <strong>bold text</strong> and</p>\n'
    renderer.feed(" more")
    assert (renderer.update().open, renderer.update().append) == (None, "")
    renderer.feed("\n\n```py\nx = ")
    update = renderer.update()
    assert update.done == ['<p dir="auto">Some <strong>bold text</strong> and more</p>\n']
    assert update.open is not None and "<code></code>" in update.open and update.append == "x = "
    renderer.feed("1\ny")
    assert (update := renderer.update()).open is None and update.append == "1\ny"
    renderer.feed("\n```\nEnd")
    update = renderer.update()
    assert "tok-n" in update.done[0] and update.open == '<p dir="auto">End</p>\n'
    assert renderer.finish().done == ['<p dir="auto">End</p>\n']


def test_plain_words_are_appended_and_not_rendered_again() -> None:
    renderer = BlockRenderer()
    renderer.feed("One two")
    assert renderer.update().open is not None
    renderer.feed(" three four")
    update = renderer.update()
    assert (update.open, update.append) == (None, " three four")


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1)) [b](  JaVaScRiPt:alert(1)) [c](data:text/html,x) [d](vbscript:x)",
        "[a](java\nscript:alert(1)) <javascript:alert(1)> [e](&#106;avascript:alert(1))",
        "[f](//evil.example) [g](/v1/admin/keys) [h](#x)",
        '[x](https://a.example/"onmouseover="alert(1)) ![" onerror="alert(1)](https://a.example/x)',
        '```"><script>alert(1)</script>\nx\n```',
        "https://a.example/\"><script>alert(1)</script> https://a.example/'onclick='x",
        "| a |\n|:-:|\n| <b onclick=x>c</b> |",
    ],
)
def test_hostile_markdown_becomes_text(text: str) -> None:
    html = render(text)
    assert_safe(html)
    assert "<script" not in html and "<img" not in html
    assert not re.search(r'href="(?!https?:|mailto:)', html)


def test_images_are_links_with_their_address_shown() -> None:
    html = render("![A cat](https://example.org/cat.png) ![x](data:image/png;base64,AAAA)")
    assert "<img" not in html
    assert 'href="https://example.org/cat.png"' in html
    assert "Image: A cat (https://example.org/cat.png)" in html


def test_addresses_in_the_text_are_links_without_what_follows_them() -> None:
    html = render("See https://example.org/a_(b), or (https://example.org/c).")
    assert 'href="https://example.org/a_(b)"' in html and 'href="https://example.org/c"' in html


def test_bidi_marks_and_invisible_characters_are_written_out() -> None:
    code = render("```js\nif (a) { /*\u202e } \u2066if (admin)\u2069 */\u200b }\n```\n`a\u2066b`")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b]", code)
    assert "U+202E" in code and "U+2066" in code and "U+200B" in code
    prose = render("user\u202egnp.exe  \U0001f469\u200d\U0001f4bb  \u0645\u06cc\u200c\u062e\u0648")
    assert "U+202E" in prose and "\U0001f469\u200d\U0001f4bb" in prose and "\u200c" in prose


@pytest.mark.parametrize(
    "text",
    [
        "- " * 5_000 + "x",
        ">" * 20_000,
        "\n".join(" " * n + "- a" for n in range(500)),
        "[" * 24_000,
        "![" * 12_000,
        "*a_b" * 6_000,
        "[a](" * 6_000 + "<" * 1_000,
        "`" * 9_000 + "a" + "``" * 9_000,
        "|a" * 9_000 + "\n" + "|-" * 9_000 + "\n" + "|x\n" * 3_000,
        "<http://a" * 3_000,
        "http://" * 5_000,
        " " * 200_000 + "x",
        "\t" * 50_000 + "x",
        "```\n" + "x" * 300_000,
        "```js\n" + "/*" * 20_000,
        "a\n" * 6_000,
    ],
    ids=lambda text: f"{text[:8]!r}x{len(text)}",
)
def test_a_bomb_takes_no_longer_than_other_text(text: str) -> None:
    """However deep, long or ambiguous it is.  It takes a fraction of a second of CPU time; what was
    not bounded would take hours."""
    began = time.thread_time()
    html = render(text)
    renderer = BlockRenderer()
    for start in range(0, len(text), 20_000):
        renderer.feed(text[start : start + 20_000])
        renderer.update()
    assert time.thread_time() - began < 20
    assert_safe(html)


def test_a_text_that_is_too_long_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "MAX_CHARACTERS", 100)
    html = render("word\n\n" * 20)
    assert html.endswith("the text is too long for a page.</p>")


def test_an_unclosed_fence_is_code_to_the_end() -> None:
    html = render("Text\n```python\nprint('# no title')\n\n- no list")
    assert html.count("<pre") == 1 and "<h" not in html and "<ul" not in html


def test_the_work_of_a_stream_is_linear_in_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to the parser for all updates of a long answer is little more than the answer:
    blocks that have ended are not rendered again."""
    rendered = 0
    render_block = markdown._render

    def counting(block: Block) -> str:
        nonlocal rendered
        rendered += len(block.text)
        return render_block(block)

    monkeypatch.setattr(markdown, "_render", counting)
    text = "A paragraph of some plain words, which are sent a few at a time.\n\n" * 500
    streamed(text, [7])
    assert rendered < 4 * len(text)


def test_thoughts_are_text_and_updates_say_only_what_changed() -> None:
    answer = AnswerHtml()
    answer.thoughts("<b>Hm")
    answer.text("Hello")
    first = answer.update()
    assert first is not None and first.thoughts == "<b>Hm" and first.open is not None
    assert answer.update() is None
    answer.text(" there")
    last = answer.finish()
    assert last is not None and last.done == ['<p dir="auto">Hello there</p>\n'] and last.open == ""
