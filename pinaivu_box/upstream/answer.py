"""Reads what an upstream streams, chunk by chunk; pure.

Text, thoughts and calls come apart.  The commitment covers one text, so they are written into one
as a model would write it (`chat_format`): thoughts between `<think>` and `</think>`, a call between
`<tool_call>` and `</tool_call>`.  An answer that is nothing but text is that text.
"""

from __future__ import annotations

import json
import math
import struct

import msgspec

from pinaivu_box.chat_format import TAGS, THINK, THOUGHT
from pinaivu_box.engine.messages import Output, TokenLogprob
from pinaivu_box.gateway.backend import Counted, Job
from pinaivu_box.openai.reader import Arguments, ParsedCall, ParsedOutput, Piece, Reasoning, Text
from pinaivu_box.upstream import wire

_BYTES_PER_TOKEN = 3  # rather more tokens than there are: English text has four bytes in one
_TOKENS_PER_MESSAGE, _TOKENS_PER_IMAGE = 8, 1000
_FINISH_REASONS = {"length": "length", "max_tokens": "length", "content_filter": "content_filter"}
_NO_LOGPROB = -9999.0  # vLLM's, of what cannot be

_decode_chunk = msgspec.json.Decoder(wire.Chunk).decode
_decode_embeddings = msgspec.json.Decoder(wire.Embeddings).decode


class BadAnswer(Exception):
    """What the upstream says cannot be used; the text is the end of a sentence about it.  It is
    perhaps `of_request` alone, and not a fault of the upstream."""

    def __init__(self, what: str, *, of_request: bool = False) -> None:
        super().__init__(what)
        self.of_request = of_request


def estimate_prompt(job: Job) -> int:
    """About how many tokens the prompt has, where nobody can tokenize it."""
    if isinstance(job.prompt, list):
        return len(job.prompt)
    if job.inputs is not None:
        return sum(_estimate(text) if isinstance(text, str) else len(text) for text in job.inputs)
    if job.prompt is not None:
        return _estimate(job.prompt + job.suffix)
    texts = [str(value) for message in job.messages for value in message.values()]
    tools = job.tools.functions if job.tools else ""
    rest = _TOKENS_PER_MESSAGE * len(job.messages) + _TOKENS_PER_IMAGE * len(job.images)
    return rest + _estimate("".join([*texts, tools]))


def _estimate(text: str) -> int:
    return estimate_tokens(len(text.encode()))


def estimate_tokens(size: int) -> int:
    """About how many a text of so many bytes has."""
    return math.ceil(size / _BYTES_PER_TOKEN)


class StreamedAnswer:
    """The answer to one job, while it comes.

    `finish_reason` and `stop_string` are set once it has said why it ended; `fingerprint` is what
    it calls its configuration.
    """

    def __init__(self, job: Job) -> None:
        self.finish_reason: str | None = None
        self.stop_string: str | None = None
        self.fingerprint = ""
        self._job = job
        self._estimate = estimate_prompt(job)
        self._usage: wire.UpstreamUsage | None = None
        self._chunks, self._bytes = 0, 0  # that had something in them
        self._thinking = False
        self._index = -1  # of the last call
        self._call_id: str | None = None
        self._call_end = ""  # what ends the call that the text is in

    @property
    def counted(self) -> Counted:
        """The upstream's own numbers once they have come, an estimate before."""
        if self._usage is None or self._usage.completion_tokens is None:
            made = max(self._chunks, math.ceil(self._bytes / _BYTES_PER_TOKEN))
            return Counted(self._estimate, 0, made, estimated=True)
        return _counted(self._usage, self._usage.completion_tokens)

    def take(self, data: bytes) -> Output | None:
        """The next chunk; returns what is new in it.  Raises BadAnswer."""
        try:
            chunk = _decode_chunk(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadAnswer(f"sent what is no chunk of an answer ({error})") from None
        if chunk.error is not None or chunk.object == "error":
            raise BadAnswer("failed in the middle of its answer", of_request=True)
        self._usage = chunk.usage or self._usage
        self.fingerprint = chunk.system_fingerprint or self.fingerprint
        choice = next((choice for choice in chunk.choices if choice.index == 0), None)
        return None if choice is None else self._take(choice)

    def last(self) -> ParsedOutput:
        """The end of the answer, which has none of the model's words."""
        output = ParsedOutput(self._ended_text(), [], self.finish_reason)
        output.stop_string = self.stop_string
        return output

    def _take(self, choice: wire.UpstreamChoice) -> Output | None:
        delta = choice.delta or choice.message or wire.Delta()
        pieces = self._pieces(delta)
        if text := (choice.text or "") if self._job.prompt is not None else "":
            pieces.append(Text(text))
        if choice.finish_reason:
            self.finish_reason = _FINISH_REASONS.get(choice.finish_reason, "stop")
            self.stop_string = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        logprobs = _logprobs(choice.logprobs) if choice.logprobs is not None else []
        if not pieces and not logprobs:
            return None
        output = ParsedOutput("".join(map(self._written, pieces)), [])
        output.pieces = pieces
        if self._job.logprobs is not None:
            output.logprobs = logprobs
        self._chunks += 1
        self._bytes += len(output.text.encode())
        return output

    def _pieces(self, delta: wire.Delta) -> list[Piece]:
        pieces: list[Piece] = []
        if thought := delta.reasoning_content or delta.reasoning:
            pieces.append(Reasoning(thought))
        if text := delta.content or delta.refusal:
            pieces.append(Text(text))
        for at, call in enumerate(delta.tool_calls or ()):
            pieces += self._call(at if call.index is None else call.index, call)
        return pieces

    def _call(self, index: int, call: wire.UpstreamCall) -> list[Piece]:
        """Calls come one after another, each with its name first.  Some servers number all of them
        0: another id with a name is another call.  (With pieces of its arguments, vLLM has sent
        other ids too.)"""
        function = call.function or wire.UpstreamFunction()
        pieces: list[Piece] = []
        is_next = index == self._index + 1 or (index == self._index and call.id != self._call_id)
        if function.name and is_next:
            self._index, self._call_id = index, call.id
            pieces.append(ParsedCall(index, "", function.name))
        if index != self._index:
            raise BadAnswer("sent tool calls in no order")
        if function.arguments:
            pieces.append(Arguments(index, function.arguments))
        return pieces

    # -- the text that is committed to -------------------------------------------------------------

    def _written(self, piece: Piece) -> str:
        match piece:
            case Reasoning(text):
                begin = "" if self._thinking else self._ended_text() + THINK
                self._thinking = True
                return begin + text
            case Text(text):
                return self._ended_text() + text
            case ParsedCall(name=name):
                begin = self._ended_text() + TAGS.before
                self._call_end = "{}}" + TAGS.after
                return f'{begin}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
            case Arguments(text=text):
                self._call_end = "}" + TAGS.after
                return text

    def _ended_text(self) -> str:
        """What ends the thoughts or the call that the text is in."""
        end = (THOUGHT if self._thinking else "") + self._call_end
        self._thinking, self._call_end = False, ""
        return end


def read_embeddings(data: bytes, count: int, prompt_estimate: int) -> tuple[list[bytes], Counted]:
    """The vectors in an answer, in the order of the texts, as little-endian float32.  Raises
    BadAnswer."""
    try:
        answer = _decode_embeddings(data)
        ordered = sorted(answer.data, key=lambda each: -1 if each.index is None else each.index)
        vectors = [_packed(each.embedding) for each in ordered]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise BadAnswer(f"sent what are no embeddings ({error})") from None
    if len(vectors) != count or not all(vectors):
        raise BadAnswer(f"sent {len(vectors)} embeddings for {count} texts")
    if answer.usage is None:
        return vectors, Counted(prompt_estimate, 0, 0, estimated=True)
    return vectors, _counted(answer.usage, 0)


def _counted(usage: wire.UpstreamUsage, completion: int) -> Counted:
    details = usage.prompt_tokens_details
    cached = min((details.cached_tokens if details else None) or 0, usage.prompt_tokens)
    return Counted(usage.prompt_tokens, cached, completion, estimated=False)


def _packed(numbers: list[float]) -> bytes:
    """Without negative zeros, which JSON would carry and other encodings not."""
    return struct.pack(f"<{len(numbers)}f", *(number + 0.0 for number in numbers))


def _logprobs(sent: wire.Logprobs) -> list[TokenLogprob]:
    if sent.content is not None:
        return [
            TokenLogprob(each.text, _number(each.logprob), _top(each.top_logprobs or ()))
            for each in sent.content
        ]
    tokens, numbers = sent.tokens or [], sent.token_logprobs or []
    tops = sent.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(numbers) == len(tops):
        raise BadAnswer("sent log-probabilities of other tokens than those of its answer")
    return [
        TokenLogprob(
            token.encode(),
            _number(number),
            [(name.encode(), value) for name, value in (top or {}).items()],
        )
        for token, number, top in zip(tokens, numbers, tops, strict=True)
    ]


def _top(likely: list[wire.Likely] | tuple[()]) -> list[tuple[bytes, float]]:
    return [(each.text, _number(each.logprob)) for each in likely]


def _number(value: float | None) -> float:
    return _NO_LOGPROB if value is None else value
