"""Reads an answer that its owner kept, in the form that a receipt commits to; pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.commitment import Extras

NO_VECTORS = hashlib.sha256().hexdigest()


class ReceivedAnswer(Struct, frozen=True):
    """`text` is None if the answer does not have it as the model wrote it.  The digests are hex,
    None where the answer does not say; `request_id` likewise."""

    text: str | None = None
    logprobs: str | None = None
    vectors: str | None = None
    request_id: str | None = None
    has_logprobs: bool = False


class NoAnswer(ValueError):
    """Why the file cannot be the answer, as the end of the sentence "the answer ..."."""


class _Likely(Struct, frozen=True):
    token: str
    logprob: float | None
    numbers: list[int] | None = msgspec.field(default=None, name="bytes")

    @property
    def spelled(self) -> bytes:
        """Its bytes, which the token's text has to be of."""
        data = _bytes(self.numbers or [])
        # Older boxes wrote a part of a character as U+FFFD.
        spellings = (data.decode(errors=handler) for handler in ("backslashreplace", "replace"))
        if self.token not in spellings:
            raise NoAnswer("has a token whose bytes are not its text's")
        return data


class _Token(_Likely, frozen=True, kw_only=True):
    top_logprobs: list[_Likely] = []

    @property
    def record(self) -> bytes:
        top = [(likely.spelled, likely.logprob) for likely in self.top_logprobs]
        return commitment.logprob_record(self.spelled, self.logprob, top)


class _ChatLogprobs(Struct, frozen=True):
    content: list[_Token] | None = None


class _ChatMessage(Struct, frozen=True):
    content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    reasoning_content: str | None = None


class _AnsweredChoice(Struct, frozen=True):
    index: int
    message: _ChatMessage
    logprobs: _ChatLogprobs | None = None

    @property
    def text(self) -> str | None:
        message = self.message
        if message.tool_calls or message.reasoning_content:
            return None  # the marks around them are not in the answer
        return message.content or ""

    @property
    def records(self) -> list[bytes]:
        return [token.record for token in (self.logprobs and self.logprobs.content) or ()]


class _NamedLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]

    @property
    def records(self) -> list[bytes]:
        lists = (self.token_logprobs, self.top_logprobs)
        if {len(values) for values in lists} != {len(self.tokens)}:
            raise NoAnswer("has another number of tokens than of log-probabilities")
        if any((logprob is None) != (top is None) for logprob, top in zip(*lists, strict=True)):
            raise NoAnswer("has a token with a log-probability and no others, or the reverse")
        return [
            commitment.named_record(token, logprob, top or {})
            for token, logprob, top in zip(self.tokens, *lists, strict=True)
        ]


class _TextChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: _NamedLogprobs | None = None

    @property
    def records(self) -> list[bytes]:
        return self.logprobs.records if self.logprobs else []


class _Vector(Struct, frozen=True):
    index: int
    embedding: list[float] | str


class _Chat(Struct, frozen=True, tag_field="object", tag="chat.completion"):
    request_id: str
    choices: list[_AnsweredChoice]


class _Completion(Struct, frozen=True, tag_field="object", tag="text_completion"):
    request_id: str
    choices: list[_TextChoice]


class _Vectors(Struct, frozen=True, tag_field="object", tag="list"):
    request_id: str
    data: list[_Vector]


_body = msgspec.json.Decoder(_Chat | _Completion | _Vectors)
_bare = msgspec.json.Decoder(list[list[float] | str])


def read(data: bytes, *, vectors: bool, echoed: Sequence[str] = ()) -> ReceivedAnswer:
    """An answer's text, or the JSON body of a chat, a completion or (with `vectors`) embeddings; of
    these also the list of vectors alone.  `echoed` is what the text of each choice of a completion
    begins with that is not the model's.  Raises NoAnswer."""
    try:
        body = _body.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _vectors(_bare_list(data)) if vectors else ReceivedAnswer(_text(data))
    if isinstance(body, _Vectors):
        _check_order([vector.index for vector in body.data])
        return _vectors([vector.embedding for vector in body.data], body.request_id)
    texts = _texts(body, echoed)
    records = [choice.records for choice in body.choices]
    return ReceivedAnswer(
        None if None in texts else commitment.output_text([text or "" for text in texts]),
        logprobs_digest(records),
        None,
        body.request_id,
        any(records),
    )


def choice_texts(data: bytes, echoed: Sequence[str] = ()) -> list[str | None]:
    """The text of each choice, as the model wrote it; None where the answer does not have that.
    Raises NoAnswer."""
    try:
        body = _body.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [_text(data)]
    if isinstance(body, _Vectors):
        raise NoAnswer("is one of vectors, which draw no tokens")
    return _texts(body, echoed)


def _texts(body: _Chat | _Completion, echoed: Sequence[str]) -> list[str | None]:
    _check_order([choice.index for choice in body.choices])
    if isinstance(body, _Completion) and echoed:
        return [_after(choice, each) for choice, each in zip(body.choices, echoed, strict=False)]
    return [choice.text for choice in body.choices]


def _after(choice: _TextChoice, prompt: str) -> str:
    if not choice.text.startswith(prompt):
        raise NoAnswer("does not begin with the prompt of the request, which it echoes")
    return choice.text[len(prompt) :]


def logprobs_digest(choices: Sequence[Sequence[bytes]]) -> str:
    digests = []
    for records in choices:
        extras = Extras()
        extras.add(records)
        digests.append(extras.logprobs)
    return commitment.of_choices(digests)


def _vectors(vectors: Sequence[list[float] | str], request_id: str | None = None) -> ReceivedAnswer:
    extras = Extras()
    extras.add((), [_float32(vector) for vector in vectors])
    return ReceivedAnswer(None, None, extras.vectors.hex(), request_id)


def _bare_list(data: bytes) -> list[list[float] | str]:
    try:
        return _bare.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise NoAnswer("has no vectors: give the body of /v1/embeddings, or its vectors") from None


def _float32(vector: list[float] | str) -> bytes:
    """The vector as the box sent it: from base64 of little-endian float32, or from its numbers."""
    if isinstance(vector, str):
        try:
            data = base64.b64decode(vector, validate=True)
        except (binascii.Error, ValueError):
            raise NoAnswer("has a vector that is no base64") from None
        # One spelling only, or the answer could be changed and still be the same.
        if len(data) % 4 or base64.b64encode(data).decode() != vector:
            raise NoAnswer("has a vector that is no base64 of float32")
        return data
    try:
        data = struct.pack(f"<{len(vector)}f", *vector)
    except OverflowError:
        raise NoAnswer("has a number that is no float32") from None
    for number, single in zip(vector, struct.unpack(f"<{len(vector)}f", data), strict=True):
        if number not in (single, _shortest(single, number)):
            raise NoAnswer("has a number that is no float32")
    return data


def _shortest(single: float, number: float) -> float:
    """The shortest decimal that stands for this float32: some clients write that."""
    if single == number:
        return single
    for digits in range(6, 10):
        text = float(f"{single:.{digits}g}")
        if struct.pack("<f", text) == struct.pack("<f", single):
            return text
    return single


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise NoAnswer("is no text in UTF-8") from None


def _bytes(numbers: list[int]) -> bytes:
    try:
        return bytes(numbers)
    except ValueError:
        raise NoAnswer("has a token with a byte that is none") from None


def _check_order(numbers: list[int]) -> None:
    if numbers != list(range(len(numbers))):
        raise NoAnswer("has its parts in another order, or not all of them")
