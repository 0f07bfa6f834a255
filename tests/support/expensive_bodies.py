"""Bodies that are expensive to read, for tests and `tests/bench/hostile_pauses`.

Each is refused, or was served at the price of everybody else before bodies were decoded elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIZE = 9_800_000  # bytes; the box's limit is 10 MiB
CHAT, EMBEDDINGS, RESPONSES = "/v1/chat/completions", "/v1/embeddings", "/v1/responses"
MESSAGES, COMPLETIONS, TOKENIZE = "/v1/messages", "/v1/completions", "/v1/tokenize"


@dataclass(frozen=True)
class Body:
    """`make` is given the model's id; `statuses` are those that a refusal may have."""

    name: str
    path: str
    make: Callable[[str], bytes]
    statuses: tuple[int, ...]


def filled(before: str, unit: bytes, after: str, separator: bytes = b"") -> bytes:
    """`unit` so often that all of it is SIZE bytes long."""
    head, tail = before.encode(), after.encode()
    room = SIZE - len(head) - len(tail)
    return head + separator.join([unit] * (room // (len(unit) + len(separator)))) + tail


def _chat(model: str) -> str:
    return f'{{"model":"{model}","messages":[{{"role":"user","content":"hi"}}],'


def _said(model: str, content: bytes) -> bytes:
    before = f'{{"model":"{model}","max_tokens":4,"messages":[{{"role":"user","content":"'
    return filled(before, content, '"}]}')


def _many_keys(model: str) -> bytes:
    names = b",".join(b'"k%d":1' % n for n in range(SIZE // 12))
    return _chat(model).encode() + names + b"}"


BODIES = (
    Body("whitespace", CHAT, lambda _: b" " * SIZE, (400,)),
    Body("nested arrays", CHAT, lambda _: b"[" * SIZE, (400,)),
    Body(
        "arrays nested 900 deep",
        CHAT,
        lambda m: filled(_chat(m) + '"x":[', b"[" * 900 + b"]" * 900, "]}", b","),
        (400, 413, 422),
    ),
    Body(
        "integers, one of 19 digits",
        EMBEDDINGS,
        lambda m: filled(f'{{"model":"{m}","input":[1234567890123456789,', b"1", "]}", b","),
        (413,),
    ),
    Body(
        "integers of 19 digits",
        COMPLETIONS,
        lambda m: filled(f'{{"model":"{m}","prompt":[', b"1234567890123456789", "]}", b","),
        (413, 422),
    ),
    Body(
        "floats that are hard to read",
        CHAT,
        lambda m: filled(
            _chat(m) + '"seed":[', b"2.22507385850720" + b"9" * 760 + b"e-308", "]}", b","
        ),
        (422,),
    ),
    Body("a number of 9 MB", CHAT, lambda m: filled(_chat(m) + '"seed":', b"1", "}"), (400, 422)),
    Body(
        "a fraction of 9 MB",
        CHAT,
        lambda m: filled(_chat(m) + '"seed":0.', b"1", "}"),
        (400, 422),
    ),
    Body(
        "empty texts",
        EMBEDDINGS,
        lambda m: filled(f'{{"model":"{m}","input":[', b'""', "]}", b","),
        (413,),
    ),
    Body(
        "empty objects",
        RESPONSES,
        lambda m: filled(f'{{"model":"{m}","input":[', b"{}", "]}", b","),
        (413,),
    ),
    Body(
        "parts of one letter",
        CHAT,
        lambda m: filled(
            f'{{"model":"{m}","messages":[{{"role":"user","content":[',
            b'{"type":"text","text":"a"}',
            "]}]}",
            b",",
        ),
        (413,),
    ),
    Body(
        "messages of one letter",
        MESSAGES,
        lambda m: filled(
            f'{{"model":"{m}","max_tokens":4,"messages":[',
            b'{"role":"user","content":"a"}',
            "]}",
            b",",
        ),
        (413,),
    ),
    Body("many names", CHAT, _many_keys, (413,)),
    Body(
        "the same name again",
        CHAT,
        lambda m: filled(_chat(m), b'"seed":""', "}", b","),
        (422,),
    ),
    Body(  # which is passed over
        "a name of 9 MB",
        CHAT,
        lambda m: filled(_chat(m) + '"max_tokens":2,"', b"a", '":1}'),
        (200,),
    ),
    Body(
        "a value of 9 MB",
        CHAT,
        lambda m: filled(_chat(m) + '"tool_choice":"', b"a", '"}'),
        (422,),
    ),
    Body(
        "a model of 9 MB",
        CHAT,
        lambda _: filled('{"messages":[{"role":"user","content":"hi"}],"model":"', b"a", '"}'),
        (422,),
    ),
    Body(
        "a stop string of 9 MB",
        CHAT,
        lambda m: filled(_chat(m) + '"stop":"', b"a", '"}'),
        (422,),
    ),
    Body("a text of 9 MB", CHAT, lambda m: _said(m, b"word "), (400,)),
    Body("escapes", CHAT, lambda m: _said(m, b"\\u00e9"), (400,)),
    Body("pairs of escapes", CHAT, lambda m: _said(m, b"\\ud83d\\ude00"), (400,)),
    Body("letters outside the plane", CHAT, lambda m: _said(m, "😀".encode()), (400,)),
    Body("control characters", CHAT, lambda m: _said(m, b"\\u0001\\n"), (400,)),
    Body(
        "instructions of 9 MB",
        RESPONSES,
        lambda m: filled(f'{{"model":"{m}","input":"x","instructions":"', b"word ", '"}'),
        (400,),
    ),
    Body(
        "a text of 9 MB to count",
        CHAT + "/input_tokens",
        lambda m: _said(m, b"word "),
        (200, 400),
    ),
    Body(
        "a text of 9 MB to tokenize",
        TOKENIZE,
        lambda m: filled(f'{{"model":"{m}","text":"', b"word ", '"}'),
        (422,),
    ),
    Body(
        "too many tokens to spell",
        "/v1/detokenize",
        lambda m: filled(f'{{"model":"{m}","tokens":[', b"1", "]}", b","),
        (413,),
    ),
)
