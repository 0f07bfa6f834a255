"""Source code as HTML with colours: Pygments' tokens as spans of few classes (`static/code.css`).

What is coloured is bounded: known languages, a size, a length of lines, a time.  All else is the
same text without colours.
"""

from __future__ import annotations

import time
from functools import cache
from html import escape

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token, _TokenType

from pinaivu_box.server.pages.visible import visible_in_code

MAX_COLOURED_CHARACTERS = 40_000  # of one block
_MAX_LINE_CHARACTERS = 1_000  # lexers' regular expressions may take quadratic time on a line
_MAX_SECONDS = 0.25  # of CPU time, of one block
# Pygments' aliases: what models write in, and nothing whose lexer is large or slow.
_NAMES = """
    bash c c# c++ console cpp csharp css diff docker dockerfile go golang graphql haskell html
    ini java javascript js json jsx julia kotlin latex lua make makefile nginx objective-c
    ocaml perl php powershell proto protobuf py python python3 r rb rs ruby rust scala scss sh
    shell sql swift terraform toml ts tsx typescript xml yaml yml zig zsh
"""
_LANGUAGES = frozenset(_NAMES.split())
_SYNONYMS = {"shell": "bash", "jsx": "javascript", "tsx": "typescript", "console": "bash"}
_CLASSES: dict[_TokenType, str] = {
    Token.Keyword: "k",
    Token.Keyword.Constant: "n",
    Token.Keyword.Type: "t",
    Token.Name.Builtin: "t",
    Token.Name.Class: "t",
    Token.Name.Exception: "t",
    Token.Name.Function: "f",
    Token.Name.Decorator: "f",
    Token.Name.Tag: "k",
    Token.Name.Attribute: "f",
    Token.Name.Variable: "v",
    Token.Literal.String: "s",
    Token.Literal.Number: "n",
    Token.Operator.Word: "k",
    Token.Comment: "c",
    Token.Comment.Preproc: "k",
    Token.Generic.Deleted: "d",
    Token.Generic.Inserted: "i",
    Token.Generic.Heading: "k",
    Token.Generic.Subheading: "f",
}


def coloured(code: str, language: str) -> str:
    """HTML of the code: spans of the classes `tok-…` in a language that is known."""
    if language.lower() not in _LANGUAGES or not _bounded(code):
        return plain(code)
    lexer = _lexer(language.lower())
    deadline = time.thread_time() + _MAX_SECONDS
    parts: list[str] = []
    run: list[str] = []
    current = ""
    for number, (kind, value) in enumerate(lexer.get_tokens(code)):
        name = _class(kind)
        if name != current and not value.isspace():
            parts.append(_span("".join(run), current))
            run, current = [], name
        run.append(value)
        if number % 64 == 0 and time.thread_time() > deadline:
            return plain(code)
    parts.append(_span("".join(run), current))
    return "".join(parts)


def plain(code: str) -> str:
    """HTML of the code without colours."""
    return visible_in_code(escape(code, quote=False))


def _bounded(code: str) -> bool:
    return len(code) <= MAX_COLOURED_CHARACTERS and all(
        len(line) <= _MAX_LINE_CHARACTERS for line in code.split("\n")
    )


def _span(text: str, name: str) -> str:
    if not text:
        return ""
    return f'<span class="tok-{name}">{plain(text)}</span>' if name else plain(text)


@cache
def _class(kind: _TokenType) -> str:
    while kind is not None:  # `parent` of the outermost is None
        if kind in _CLASSES:
            return _CLASSES[kind]
        kind = kind.parent
    return ""


@cache
def _lexer(language: str) -> Lexer:
    return get_lexer_by_name(_SYNONYMS.get(language, language), stripnl=False, ensurenl=False)
