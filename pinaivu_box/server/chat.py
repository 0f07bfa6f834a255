"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from pinaivu_box.engine.messages import Output
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai.reader import (
    Arguments,
    ParsedCall,
    ParsedOutput,
    Piece,
    Reader,
    Reasoning,
    Text,
)
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.tools import custom_names
from pinaivu_box.openai.types import (
    Answer,
    CalledCustom,
    CalledFunction,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    CustomToolCall,
    TokenLogprobs,
    ToolCall,
    TopLogprob,
)
from pinaivu_box.server import error_responses
from pinaivu_box.server.inference import InferenceCall, last_fields, reader_of
from pinaivu_box.server.jobs import chat_job, choices
from pinaivu_box.server.sse import (
    DONE,
    PLACEHOLDER,
    EventStream,
    around_text,
    encode_event,
    encode_json,
)


async def create_chat_completion(
    call: InferenceCall, body: ChatRequest
) -> ChatCompletion | EventStream:
    check_chat(body)
    jobs = choices(chat_job(body, call.job(body)), body.n or 1)
    call.thinking_field = _thinking_field(body)
    return await call.answer(jobs, _ChatAnswer(call, body, jobs), stream=body.stream)


def _thinking_field(body: ChatRequest) -> str:
    """The field that asks the model to think; "" if there is none."""
    if body.reasoning_effort not in (None, "none", "minimal"):
        return "reasoning_effort"
    return "enable_thinking" if (body.chat_template_kwargs or {}).get("enable_thinking") else ""


class _ReadChoice:
    """The reader of a choice's output, and what it has read; of a stream nothing is kept."""

    def __init__(self) -> None:
        self.reader = Reader(None)  # until it is started
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ParsedCall, list[str]]] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, pieces: list[Piece], logprobs: list[TokenLogprobs]) -> None:
        self._logprobs += logprobs
        for piece in pieces:
            match piece:
                case Text(text):
                    self._texts.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case ParsedCall():
                    self._calls.append((piece, []))
                case Arguments(index, text):
                    self._calls[index][1].append(text)

    def whole(self, index: int, *, logprobs: bool) -> Choice:
        calls = [_tool_call(call, "".join(arguments)) for call, arguments in self._calls]
        message = Answer(
            "".join(self._texts) if self._texts or not calls else None,
            "assistant",
            None,
            calls or UNSET,
            "".join(self._reasoning) if self._reasoning else UNSET,
        )
        choice_logprobs = ChoiceLogprobs(self._logprobs) if logprobs else None
        return Choice(index, message, self.reader.finish_reason, choice_logprobs)


class _ChatAnswer:
    """See `inference.AnswerBuilder`."""

    def __init__(self, call: InferenceCall, body: ChatRequest, jobs: list[Job]) -> None:
        self._body, self._jobs = body, jobs
        self._ignored = call.ignored  # complete once the first choice has begun
        self._custom_tools = custom_names(body.tools or ())
        self._choices = [_ReadChoice() for _ in jobs]
        self._end: Finished
        # What stands around the text of a chunk, by choice: it is encoded only once.
        self._around_text: dict[int, tuple[bytes, bytes]] = {}
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._fields = call.first_fields("chatcmpl-", kind, jobs[0])
        if body.service_tier:
            self._fields["service_tier"] = "default"
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        if self._with_usage:  # every chunk but the last has "usage": null, as OpenAI's
            self._fields["usage"] = None

    def take(self, event: RequestEvent) -> None:
        match event:
            case ChoiceStarted():
                self._begin(event)
            case Output():
                choice = self._choices[event.choice]
                pieces = choice.reader.read(event)
                choice.add(pieces, _logprobs(event))
            case Finished():
                self._end = event

    def whole(self) -> ChatCompletion:
        logprobs = bool(self._body.logprobs)
        choices = [choice.whole(n, logprobs=logprobs) for n, choice in enumerate(self._choices)]
        return ChatCompletion(**{**self._fields, **last_fields(self._end), "choices": choices})

    def encode(self, event: RequestEvent) -> bytes:
        if (
            isinstance(event, Output)
            and not isinstance(event, ParsedOutput)
            and event.finish_reason is None
            and not event.logprobs
            and self._choices[event.choice].reader.passes
        ):  # once a token
            if not event.text:
                return b""
            before, after = self._around_text[event.choice]
            return before + encode_json(event.text) + after
        match event:
            case ChoiceStarted():
                self._begin(event)
                template = self._chunk(event.choice, {"content": PLACEHOLDER})
                self._around_text[event.choice] = around_text(template)
                return self._chunk(event.choice, {"role": "assistant", "content": ""})
            case Output():
                reader, logprobs = self._choices[event.choice].reader, _logprobs(event)
                return self._chunks(event.choice, reader.read(event), logprobs)
            case Finished():
                return self._last_chunks(event)
            case Failed(error):
                return encode_event(error_responses.event(error))

    def _text_chunk(self, choice: int, text: str) -> bytes:
        before, after = self._around_text[choice]
        return before + encode_json(text) + after

    def _begin(self, event: ChoiceStarted) -> None:
        reader = reader_of(self._jobs[event.choice], event, self._custom_tools)
        self._choices[event.choice].reader = reader
        self._fields["system_fingerprint"] = event.fingerprint
        if self._ignored:
            self._fields["ignored_parameters"] = self._ignored

    def _chunks(self, choice: int, pieces: list[Piece], logprobs: list[TokenLogprobs]) -> bytes:
        """A chunk for each piece; the log-probabilities come with the first."""
        chunks = []
        for piece in pieces:
            if isinstance(piece, Text) and not logprobs:
                chunks.append(self._text_chunk(choice, piece.text))
                continue
            chunks.append(self._chunk(choice, _delta(piece), logprobs=logprobs))
            logprobs = []
        if logprobs:
            chunks.append(self._chunk(choice, {"content": ""}, logprobs=logprobs))
        return b"".join(chunks)

    def _last_chunks(self, end: Finished) -> bytes:
        """The last chunk of each choice, which promises that the receipt is on disk; the usage if
        it was asked for, and `[DONE]`."""
        last = last_fields(end)
        usage = last.pop("usage")
        self._fields |= last
        chunks = [
            self._chunk(index, {}, choice.reader.finish_reason)
            for index, choice in enumerate(self._choices)
            if choice.reader.finish_reason
        ]
        if self._with_usage:
            chunks.append(encode_event({**self._fields, "usage": usage}))
        return b"".join([*chunks, DONE])

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> bytes:
        choice = {
            "delta": delta,
            "finish_reason": finish_reason,
            "index": index,
            "logprobs": ChoiceLogprobs(logprobs) if logprobs else None,
        }
        return encode_event({**self._fields, "choices": [choice]})


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case ParsedCall(index, call_id, name, custom):
            kind, argument = ("custom", "input") if custom else ("function", "arguments")
            call = {"index": index, "id": call_id, "type": kind, kind: {"name": name, argument: ""}}
        case Arguments(index, text, custom):
            kind, argument = ("custom", "input") if custom else ("function", "arguments")
            call = {"index": index, kind: {argument: text}}
    return {"tool_calls": [call]}


def _tool_call(call: ParsedCall, arguments: str) -> ToolCall | CustomToolCall:
    if call.custom:
        return CustomToolCall(call.id, CalledCustom(call.name, arguments))
    return ToolCall(call.id, CalledFunction(call.name, arguments))


def _logprobs(output: Output) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(
            *_text_and_bytes(token.token),
            token.logprob,
            [TopLogprob(*_text_and_bytes(other), logprob) for other, logprob in token.top],
        )
        for token in output.logprobs
    ]


def _text_and_bytes(token: bytes) -> tuple[str, list[int]]:
    return token.decode(errors="backslashreplace"), list(token)
