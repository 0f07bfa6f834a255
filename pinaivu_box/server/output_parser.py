"""Parses the output of a model, as it arrives, into text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET

from pinaivu_box.chat_format import STYLES
from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.output import Output
from pinaivu_box.gateway.request import ChoiceStarted
from pinaivu_box.openai import reader
from pinaivu_box.openai.reader import Piece, Reader
from pinaivu_box.openai.types import (
    Answer,
    CalledCustom,
    CalledFunction,
    Choice,
    ChoiceLogprobs,
    CustomToolCall,
    TokenLogprobs,
    ToolCall,
    TopLogprob,
)


class OutputParser:
    """Of the choices of one request; `custom_tools` are the names of its custom tools."""

    def __init__(self, jobs: Sequence[Job], custom_tools: Collection[str] = ()) -> None:
        self._jobs = jobs
        self._custom_tools = custom_tools
        self._readers: dict[int, Reader] = {}

    def begin(self, event: ChoiceStarted) -> None:
        tools = self._jobs[event.choice].tools
        self._readers[event.choice] = Reader(
            STYLES[event.tool_style] if tools else None,
            tools.names if tools else (),
            custom_tools=self._custom_tools,
            thinks=event.thinks,
            thinking=event.thinking,
        )

    def parse(self, event: Output) -> tuple[list[Piece], str | None]:
        """What is new of a choice, and its finish reason if that was all."""
        text_reader = self._readers[event.choice]
        pieces = text_reader.push(event.text) if event.text else []
        reason = event.finish_reason
        if reason:
            pieces += text_reader.end()
            reason = "tool_calls" if text_reader.called and reason == "stop" else reason
        return pieces, reason


@dataclass
class MessageBuilder:
    """Builds the message of one choice."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[reader.ParsedCall, list[str]]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""

    def add(
        self, pieces: list[Piece], logprobs: list[TokenLogprobs], finish_reason: str | None
    ) -> None:
        for piece in pieces:
            match piece:
                case reader.Text():
                    self.texts.append(piece.text)
                case reader.Reasoning():
                    self.reasoning.append(piece.text)
                case reader.ParsedCall():
                    self.calls.append((piece, []))
                case reader.Arguments():
                    self.calls[piece.index][1].append(piece.text)
        self.logprobs += logprobs
        self.finish_reason = finish_reason or self.finish_reason

    def choice(self, index: int, *, logprobs: bool) -> Choice:
        calls = [_tool_call(call, "".join(arguments)) for call, arguments in self.calls]
        message = Answer(
            "".join(self.texts) if self.texts or not calls else None,
            "assistant",
            None,
            calls or UNSET,
            "".join(self.reasoning) if self.reasoning else UNSET,
        )
        choice_logprobs = ChoiceLogprobs(self.logprobs) if logprobs else None
        return Choice(index, message, self.finish_reason, choice_logprobs)


def _tool_call(call: reader.ParsedCall, arguments: str) -> ToolCall | CustomToolCall:
    if call.custom:
        return CustomToolCall(call.id, CalledCustom(call.name, arguments))
    return ToolCall(call.id, CalledFunction(call.name, arguments))


def logprobs_of(event: Output) -> list[TokenLogprobs]:
    """As chat completions show them."""
    return [_logprobs(token) for token in event.logprobs]


def _logprobs(token: TokenLogprob) -> TokenLogprobs:
    top = [TopLogprob(*_text_and_bytes(other), logprob) for other, logprob in token.top]
    return TokenLogprobs(*_text_and_bytes(token.token), token.logprob, top)


def _text_and_bytes(token: bytes) -> tuple[str, list[int]]:
    return token.decode(errors="backslashreplace"), list(token)
