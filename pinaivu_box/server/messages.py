"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import UNSET

from pinaivu_box.chat_format import CONTINUE
from pinaivu_box.engine.messages import Tools
from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.output import Output
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.anthropic import (
    AnthropicAnswer,
    AnthropicUsage,
    CountTokensRequest,
    MessagesRequest,
    TokenCountAnswer,
    as_messages,
    continues,
)
from pinaivu_box.openai.reader import Arguments, ParsedCall, Piece, Reasoning, Text
from pinaivu_box.server import error_responses
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.jobs import base_job, json_text
from pinaivu_box.server.output_parser import OutputParser
from pinaivu_box.server.sse import EventStream, encode_event
from pinaivu_box.text import encodable

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(
    call: InferenceCall, body: MessagesRequest
) -> AnthropicAnswer | EventStream:
    model = call.admit(body.model)
    job = replace(
        _job(body, model, call),
        max_tokens=body.max_tokens,
        stop=list(body.stop_sequences or ()),
    )
    if body.thinking and body.thinking.type == "enabled":
        call.asks_for_thinking("thinking")
    running = await call.start([job])
    answer = _MessageAnswer(call, model.id, OutputParser([job]))
    if body.stream:
        return await call.stream(running, answer.encode)
    async for event in call.collect(running):
        list(answer.take(event))
    return answer.message()


async def count_message_tokens(call: InferenceCall, body: CountTokensRequest) -> TokenCountAnswer:
    model = call.admit(body.model)
    result, _ = await call.tokenize(_job(body, model, call), count=True)
    return TokenCountAnswer(call.request_id, result.number, call.ignored or UNSET)


def _job(body: CountTokensRequest, model: Model, call: InferenceCall) -> Job:
    thinking = body.thinking
    return replace(
        base_job(body, model, call.request_id, call.key.id),
        messages=as_messages(body),
        tools=_tools(body),
        template={
            **({"enable_thinking": thinking.type != "disabled"} if thinking else {}),
            **({CONTINUE: True} if continues(body) else {}),
        },
    )


def _tools(body: CountTokensRequest) -> Tools | None:
    choice = body.tool_choice
    if choice is not None and choice.type in ("any", "tool") and not body.tools:
        raise InvalidBody("tool_choice needs tools", loc=("body", "tool_choice"))
    if not body.tools or (choice is not None and choice.type == "none"):
        return None
    functions = [
        {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        for tool in body.tools
    ]
    functions_json, names = json_text(functions, "tools"), [tool.name for tool in body.tools]
    if choice is None:
        return Tools(functions_json, names)
    engine_choice = {"any": "required", "tool": choice.name or ""}.get(choice.type, "auto")
    if choice.type == "tool" and engine_choice not in names:
        raise InvalidBody(
            f"there is no tool '{quoted(engine_choice)}'", loc=("body", "tool_choice", "name")
        )
    return Tools(functions_json, names, engine_choice, not choice.disable_parallel_tool_use)


class _MessageAnswer:
    """Either `take` all events and get the `message`, or `encode` them for a stream."""

    def __init__(self, call: InferenceCall, model_id: str, parser: OutputParser) -> None:
        self._call = call
        self._model_id = model_id
        self._parser = parser
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []  # JSON of the last block, if it is a call
        self._open_block = ""  # type of the last block, if it may still grow
        self._stop_reason: str | None = None
        self._stop_string: str | None = None
        self._usage = AnthropicUsage(0, 0)

    def message(self) -> AnthropicAnswer:
        """As it is so far."""
        return AnthropicAnswer(
            id=self._call.request_id.replace("req_", "msg_"),
            request_id=self._call.request_id,
            model=self._model_id,
            content=[*self._blocks],
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_string,
            usage=self._usage,
            ignored_parameters=self._call.ignored or UNSET,
        )

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        # Each is encoded before the next is made: it contains the message, which grows.
        return b"".join(
            encode_event({**data, "request_id": self._call.request_id}, name=data["type"])
            for event in events
            for data in self.take(event)
        )

    def take(self, event: RequestEvent) -> Iterable[dict[str, Any]]:
        """The events of the stream; the caller must iterate over all of them."""
        match event:
            case ChoiceStarted():
                self._parser.begin(event)
                self._usage = AnthropicUsage(event.prompt_tokens, 0)
                return [{"type": "message_start", "message": self.message()}]
            case Output():
                pieces, reason = self._parser.parse(event)
                if reason:
                    self._stop(reason, event.stop_string)
                return (data for piece in pieces for data in self._add(piece))
            case Finished():
                uncached = event.prompt_tokens - event.cached_tokens
                self._usage = AnthropicUsage(uncached, event.completion_tokens, event.cached_tokens)
                delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_string}
                end = {"type": "message_delta", "delta": delta, "usage": self._usage}
                return [*self._close(), end, {"type": "message_stop"}]
            case Failed(error):
                return [error_responses.body(error, error_responses.ANTHROPIC)]

    def _stop(self, reason: str, stop_string: str | None) -> None:
        self._stop_reason = (
            "stop_sequence" if stop_string else _STOP_REASONS.get(reason, "end_turn")
        )
        self._stop_string = stop_string

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
            self._blocks[-1]["input"] = _parsed("".join(self._arguments))
            self._arguments = []
        self._open_block = ""
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


def _parsed(text: str) -> Any:
    """Arguments as JSON; an empty object if they are not an object."""
    try:
        arguments = json.loads(text)
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # cut off by max_tokens, or nested too deeply
        return {}
    return msgspec.Raw(encodable(written).encode()) if isinstance(arguments, dict) else {}
