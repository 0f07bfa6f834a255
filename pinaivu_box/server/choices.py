"""The choices of an answer while they come: events in, pieces of text, thoughts and calls out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET

from pinaivu_box.chat_format import STYLES
from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceOutput, ChoiceStarted
from pinaivu_box.openai import reader
from pinaivu_box.openai.reader import Piece, Reader
from pinaivu_box.openai.types import (
    AnswerMessage,
    CalledCustom,
    CalledFunction,
    Choice,
    ChoiceLogprobs,
    CustomToolCall,
    TokenLogprobs,
    ToolCall,
    TopLogprob,
)


@dataclass(frozen=True)
class AnswerPart:
    """What came of one choice; with a finish reason it is complete."""

    choice: int
    pieces: list[Piece]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


class Choices:
    """Of one chat request, of whose tools these are custom ones."""

    def __init__(self, jobs: Sequence[Job], customs: Collection[str] = ()) -> None:
        self._jobs = jobs
        self._customs = customs
        self._readers: dict[int, Reader] = {}

    def begin(self, event: ChoiceStarted) -> None:
        tools = self._jobs[event.choice].tools
        self._readers[event.choice] = Reader(
            STYLES[event.tool_style] if tools else None,
            tools.names if tools else (),
            customs=self._customs,
            thinks=event.thinks,
            thinking=event.thinking,
        )

    def take(self, said: ChoiceOutput) -> AnswerPart:
        output, its = said.output, self._readers[said.choice]
        pieces = its.push(output.text) if output.text else []
        reason = output.finish_reason
        if reason:
            pieces += its.end()
            reason = "tool_calls" if its.called and reason == "stop" else reason
        return AnswerPart(said.choice, pieces, [_logprobs(one) for one in output.logprobs], reason)


@dataclass
class Whole:
    """One choice's message, from its parts."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[tuple[reader.ParsedCall, list[str]]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, part: AnswerPart) -> None:
        for piece in part.pieces:
            match piece:
                case reader.Text():
                    self.texts.append(piece.text)
                case reader.Thought():
                    self.thoughts.append(piece.text)
                case reader.ParsedCall():
                    self.calls.append((piece, []))
                case reader.Arguments():
                    self.calls[piece.index][1].append(piece.text)
        self.logprobs += part.logprobs
        self.finish_reason = part.finish_reason or self.finish_reason

    def choice(self, index: int, *, logprobs: bool) -> Choice:
        calls = [_call(call, "".join(arguments)) for call, arguments in self.calls]
        answer = AnswerMessage(
            "".join(self.texts) if self.texts or not calls else None,
            "assistant",
            None,
            calls or UNSET,
            "".join(self.thoughts) if self.thoughts else UNSET,
        )
        held = ChoiceLogprobs(self.logprobs) if logprobs else None
        return Choice(index, answer, self.finish_reason, held)


def _call(call: reader.ParsedCall, arguments: str) -> ToolCall | CustomToolCall:
    if call.custom:
        return CustomToolCall(call.id, CalledCustom(call.name, arguments))
    return ToolCall(call.id, CalledFunction(call.name, arguments))


def _logprobs(one: TokenLogprob) -> TokenLogprobs:
    top = [TopLogprob(*_token(token), logprob) for token, logprob in one.top]
    return TokenLogprobs(*_token(one.token), one.logprob, top)


def _token(token: bytes) -> tuple[str, list[int]]:
    return token.decode(errors="backslashreplace"), list(token)
