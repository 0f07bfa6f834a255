"""The chunks of a streamed chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from pinaivu_box.gateway.output import Output
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai import reader
from pinaivu_box.openai.types import (
    ChoiceLogprobs,
    Chunk,
    ChunkChoice,
    ContextShift,
    CustomDelta,
    Delta,
    FunctionDelta,
    TokenLogprobs,
    ToolCallDelta,
    Usage,
)
from pinaivu_box.server import error_responses
from pinaivu_box.server.inference import usage_of
from pinaivu_box.server.output_parser import OutputParser, logprobs_of
from pinaivu_box.server.sse import DONE, encode_event

_PLACEHOLDER = "\x00"  # encoded as \u0000, which nothing else in a chunk can contain
_ENCODED_PLACEHOLDER = b'"\\u0000"'


class ChatStream:
    """Encodes the events of a request, with `empty` as the template of its chunks.

    `with_usage` is `stream_options.include_usage`.  `ignored` is complete once the first choice has
    begun.
    """

    def __init__(
        self, parser: OutputParser, empty: Chunk, *, with_usage: bool, ignored: list[str]
    ) -> None:
        # With include_usage every chunk but the last has "usage": null, as OpenAI's.
        self._empty = msgspec.structs.replace(empty, usage=None) if with_usage else empty
        self._with_usage = with_usage
        self._ignored = ignored
        self._parser = parser
        # What stands around the text of a chunk, by choice: it is encoded only once.
        self._around_text: dict[int, tuple[bytes, bytes]] = {}
        # A choice's last chunk promises that the receipt is on disk, so it waits for Finished.
        self._finish_reasons: dict[int, str] = {}

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        return b"".join(self._encode(event) for event in events)

    def _encode(self, event: RequestEvent) -> bytes:
        match event:
            case ChoiceStarted():
                self._parser.begin(event)
                return self._begin(event.choice, event.fingerprint)
            case Output():
                pieces, reason = self._parser.parse(event)
                if reason:
                    self._finish_reasons[event.choice] = reason
                return self._pieces(event.choice, pieces, logprobs_of(event))
            case Finished():
                return self._finish(event)
            case Failed():
                return encode_event(error_responses.event(event.error))

    def _begin(self, choice: int, fingerprint: str) -> bytes:
        self._empty = msgspec.structs.replace(
            self._empty, system_fingerprint=fingerprint, ignored_parameters=self._ignored or UNSET
        )
        template = self._chunk(ChunkChoice(Delta(content=_PLACEHOLDER), index=choice))
        before, after = template.split(_ENCODED_PLACEHOLDER)
        self._around_text[choice] = before, after
        return self._chunk(ChunkChoice(Delta(role="assistant", content=""), index=choice))

    def _pieces(
        self, choice: int, pieces: list[reader.Piece], logprobs: list[TokenLogprobs]
    ) -> bytes:
        """A chunk for each piece; the log-probabilities come with the first."""
        chunks = []
        for piece in pieces:
            if isinstance(piece, reader.Text) and not logprobs:
                before, after = self._around_text[choice]
                chunks.append(before + msgspec.json.encode(piece.text) + after)
                continue
            chunks.append(self._chunk(_chunk_choice(choice, _delta(piece), logprobs)))
            logprobs = []
        if logprobs:
            chunks.append(self._chunk(_chunk_choice(choice, Delta(content=""), logprobs)))
        return b"".join(chunks)

    def _finish(self, event: Finished) -> bytes:
        """The last chunk of each choice, the usage if it was asked for, and `[DONE]`."""
        if event.shifted_tokens and self._finish_reasons:
            shift = ContextShift(event.shifted_tokens)
            self._empty = msgspec.structs.replace(self._empty, context_shift=shift)
        chunks = [
            self._chunk(ChunkChoice(Delta(), reason, choice))
            for choice, reason in sorted(self._finish_reasons.items())
        ]
        if self._with_usage:
            chunks.append(self._chunk(usage=usage_of(event)))
        return b"".join([*chunks, DONE])

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> bytes:
        chunk = msgspec.structs.replace(self._empty, choices=list(choices))
        return encode_event(msgspec.structs.replace(chunk, usage=usage) if usage else chunk)


def _chunk_choice(index: int, delta: Delta, logprobs: list[TokenLogprobs]) -> ChunkChoice:
    choice_logprobs = ChoiceLogprobs(logprobs) if logprobs else None
    return ChunkChoice(delta, index=index, logprobs=choice_logprobs)


def _delta(piece: reader.Piece) -> Delta:
    match piece:
        case reader.Text():
            return Delta(content=piece.text)
        case reader.Reasoning():
            return Delta(reasoning_content=piece.text)
        case reader.ParsedCall():
            called: dict[str, Any] = (
                {"type": "custom", "custom": CustomDelta("", piece.name)}
                if piece.custom
                else {"type": "function", "function": FunctionDelta(piece.name, "")}
            )
            return Delta(tool_calls=[ToolCallDelta(piece.index, id=piece.id, **called)])
        case reader.Arguments():
            more: dict[str, Any] = (
                {"custom": CustomDelta(piece.text)}
                if piece.custom
                else {"function": FunctionDelta(UNSET, piece.text)}
            )
            return Delta(tool_calls=[ToolCallDelta(piece.index, **more)])
