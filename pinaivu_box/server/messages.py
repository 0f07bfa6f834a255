"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from msgspec import UNSET

from pinaivu_box.chat_format import CONTINUE
from pinaivu_box.engine.messages import Output, Tools
from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai.anthropic import (
    AnthropicAnswer,
    AnthropicChoice,
    AnthropicUsage,
    CountTokensRequest,
    MessagesRequest,
    TokenCountAnswer,
    as_messages,
    continues,
)
from pinaivu_box.openai.reader import Arguments, ParsedCall, Piece, Reader, Reasoning, Text
from pinaivu_box.openai.tools import parsed_arguments
from pinaivu_box.server import error_responses
from pinaivu_box.server.inference import InferenceCall, reader_of
from pinaivu_box.server.jobs import json_text
from pinaivu_box.server.sse import EventStream, encode_event

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(
    call: InferenceCall, body: MessagesRequest
) -> AnthropicAnswer | EventStream:
    job = replace(
        _job(call, body), max_tokens=body.max_tokens, stop=list(body.stop_sequences or ())
    )
    if body.thinking and body.thinking.type == "enabled":
        call.thinking_field = "thinking"
    return await call.answer([job], _MessageAnswer(call, job), stream=body.stream)


async def count_message_tokens(call: InferenceCall, body: CountTokensRequest) -> TokenCountAnswer:
    result, _ = await call.tokenize(_job(call, body), count=True)
    return TokenCountAnswer(call.request_id, result.number, call.ignored or UNSET)


def _job(call: InferenceCall, body: CountTokensRequest) -> Job:
    thinking = body.thinking
    return replace(
        call.job(body),
        messages=as_messages(body),
        tools=_tools(body),
        template={
            **({"enable_thinking": thinking.type != "disabled"} if thinking else {}),
            **({CONTINUE: True} if continues(body) else {}),
        },
    )


def _tools(body: CountTokensRequest) -> Tools | None:
    choice = body.tool_choice or AnthropicChoice("auto")
    if choice.type in ("any", "tool") and not body.tools:
        raise InvalidBody("tool_choice needs tools", loc=("body", "tool_choice"))
    if not body.tools or choice.type == "none":
        return None
    functions = [
        {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        for tool in body.tools
    ]
    names = [tool.name for tool in body.tools]
    engine_choice = {"any": "required", "tool": choice.name or ""}.get(choice.type, "auto")
    if choice.type == "tool" and engine_choice not in names:
        raise InvalidBody(
            f"there is no tool '{quoted(engine_choice)}'", loc=("body", "tool_choice", "name")
        )
    parallel = not choice.disable_parallel_tool_use
    return Tools(json_text(functions, "tools"), names, engine_choice, parallel)


class _MessageAnswer:
    """See `inference.AnswerBuilder`."""

    def __init__(self, call: InferenceCall, job: Job) -> None:
        self._call, self._job = call, job
        self._reader = Reader(None)  # until it is started
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []  # JSON of the last block, if it is a call
        self._open_block = ""  # type of the last block, if it may still grow
        self._stop_reason: str | None = None
        self._stop_string: str | None = None
        self._usage = AnthropicUsage(0, 0)

    def whole(self) -> AnthropicAnswer:
        """As it is so far."""
        return AnthropicAnswer(
            id=self._call.request_id.replace("req_", "msg_"),
            request_id=self._call.request_id,
            model=self._job.model.id,
            content=[*self._blocks],
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_string,
            usage=self._usage,
            ignored_parameters=self._call.ignored or UNSET,
        )

    def encode(self, event: RequestEvent) -> bytes:
        return b"".join(
            encode_event({**data, "request_id": self._call.request_id}, name=data["type"])
            for data in self.take(event)
        )

    def take(self, event: RequestEvent) -> list[dict[str, Any]]:
        """The events of the stream."""
        match event:
            case ChoiceStarted():
                self._reader = reader_of(self._job, event)
                self._usage = AnthropicUsage(event.prompt_tokens, 0)
                return [{"type": "message_start", "message": self.whole()}]
            case Output():
                pieces = self._reader.read(event)
                if event.finish_reason:
                    reason = _STOP_REASONS.get(self._reader.finish_reason, "end_turn")
                    if event.stop_string in self._job.stop:  # else it is the model's own
                        self._stop_string = event.stop_string
                    self._stop_reason = "stop_sequence" if self._stop_string else reason
                return [data for piece in pieces for data in self._add(piece)]
            case Finished():
                uncached = event.prompt_tokens - event.cached_tokens
                self._usage = AnthropicUsage(uncached, event.completion_tokens, event.cached_tokens)
                delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_string}
                end = {"type": "message_delta", "delta": delta, "usage": self._usage}
                return [*self._close(), end, {"type": "message_stop"}]
            case Failed(error):
                return [error_responses.body(error, error_responses.ANTHROPIC)]

    def _add(self, piece: Piece) -> list[dict[str, Any]]:
        match piece:
            case Text(text):
                start = self._begin("text", {"text": ""})
                self._blocks[-1]["text"] += text
                return [*start, self._delta("text_delta", "text", text)]
            case Reasoning(text):
                start = self._begin("thinking", {"thinking": "", "signature": ""})
                self._blocks[-1]["thinking"] += text
                return [*start, self._delta("thinking_delta", "thinking", text)]
            case ParsedCall(_, call_id, name):
                end = self._close()
                block = {"id": call_id.replace("call_", "toolu_"), "name": name, "input": {}}
                return [*end, *self._begin("tool_use", block)]
            case Arguments(_, text):
                self._arguments.append(text)
                return [self._delta("input_json_delta", "partial_json", text)]

    def _begin(self, kind: str, empty: dict[str, Any]) -> list[dict[str, Any]]:
        if self._open_block == kind:
            return []
        end = self._close()
        self._open_block = kind
        block = {"type": kind, **empty}
        self._blocks.append(block)
        index = len(self._blocks) - 1
        start = {"type": "content_block_start", "index": index, "content_block": dict(block)}
        return [*end, start]

    def _delta(self, kind: str, field: str, text: str) -> dict[str, Any]:
        delta = {"type": kind, field: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open_block:
            return []
        if self._open_block == "tool_use":
            self._blocks[-1]["input"] = parsed_arguments("".join(self._arguments))
            self._arguments = []
        self._open_block = ""
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]
