"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.chat_format import CONTINUE
from pinaivu_box.engine.messages import Tools
from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceOutput, ChoiceStarted, Failed, Finished, RequestEvent
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
from pinaivu_box.openai.reader import Arguments, Piece, Text, Thought
from pinaivu_box.openai.reader import ParsedCall as ToolCall
from pinaivu_box.openai.types import Sampled
from pinaivu_box.server import envelope
from pinaivu_box.server.choices import Choices
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.jobs import job_of, json_text
from pinaivu_box.text import encodable

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def messages(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(MessagesRequest)
    model = call.admit(body.model)
    job = _job(body, model, call)
    job = replace(
        job,
        sampling=msgspec.structs.replace(
            job.sampling, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k
        ),
        max_tokens=body.max_tokens,
        stop=list(body.stop_sequences or ()),
    )
    if body.thinking and body.thinking.type == "enabled":
        call.wants_thoughts("thinking")
    running = await call.start([job])
    answer = _MessageAnswer(call, model.id, Choices([job]))
    if body.stream:
        return await call.stream(running, answer.encode)
    async for event in call.collect(running):
        list(answer.take(event))
    return JSON(answer.whole())


async def count_tokens(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(CountTokensRequest)
    model = call.admit(body.model)
    found = await call.tokenize(_job(body, model, call), count=True)
    return JSON(TokenCountAnswer(call.request_id, found.number, call.ignored or UNSET))


def _job(body: CountTokensRequest, model: Model, call: InferenceCall) -> Job:
    thinking = body.thinking
    return replace(
        job_of(Sampled(model=body.model), model, call.request_id, call.key.id),
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
    listed, names = json_text(functions, "tools"), [tool.name for tool in body.tools]
    if choice is None:
        return Tools(listed, names)
    chosen = {"any": "required", "tool": choice.name or ""}.get(choice.type, "auto")
    if choice.type == "tool" and chosen not in names:
        raise InvalidBody(
            f"there is no tool '{quoted(chosen)}'", loc=("body", "tool_choice", "name")
        )
    return Tools(listed, names, chosen, not choice.disable_parallel_tool_use)


class _MessageAnswer:
    """One message while it is made: `take` events, or `encode` them as a stream's."""

    def __init__(self, call: InferenceCall, model_id: str, choices: Choices) -> None:
        self._call = call
        self._model_id = model_id
        self._choices = choices
        self._blocks: list[dict[str, Any]] = []
        self._json: list[str] = []  # of the last block, if it is a call
        self._open = ""
        self._reason: str | None = None
        self._stop_string: str | None = None
        self._usage = AnthropicUsage(0, 0)

    def whole(self) -> AnthropicAnswer:
        return AnthropicAnswer(
            id=self._call.request_id.replace("req_", "msg_"),
            request_id=self._call.request_id,
            model=self._model_id,
            content=[*self._blocks],
            stop_reason=self._reason,
            stop_sequence=self._stop_string,
            usage=self._usage,
            ignored_parameters=self._call.ignored or UNSET,
        )

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        parts = []
        # Each is encoded when it is made: what it says of the message grows afterwards.
        for one in (one for event in events for one in self.take(event)):
            data = msgspec.json.encode({**one, "request_id": self._call.request_id})
            parts.append(b"event: " + one["type"].encode() + b"\ndata: " + data + b"\n\n")
        return b"".join(parts)

    def take(self, event: RequestEvent) -> Iterable[dict[str, Any]]:
        """What a stream tells of it; to be read to its end."""
        match event:
            case ChoiceStarted():
                self._choices.begin(event)
                self._usage = AnthropicUsage(event.prompt_tokens, 0)
                return [{"type": "message_start", "message": self.whole()}]
            case ChoiceOutput():
                part = self._choices.take(event)
                if part.finish_reason:
                    self._conclude(part.finish_reason, event.output.stop_string)
                return (one for piece in part.pieces for one in self._add(piece))
            case Finished():
                new = event.prompt_tokens - event.cached_tokens
                self._usage = AnthropicUsage(new, event.completion_tokens, event.cached_tokens)
                ended = {"stop_reason": self._reason, "stop_sequence": self._stop_string}
                delta = {"type": "message_delta", "delta": ended, "usage": self._usage}
                return [*self._close(), delta, {"type": "message_stop"}]
            case Failed(error):
                return [envelope.body(error, envelope.ANTHROPIC)]

    def _conclude(self, reason: str, stop_string: str | None) -> None:
        self._reason = "stop_sequence" if stop_string else _REASONS.get(reason, "end_turn")
        self._stop_string = stop_string

    def _add(self, piece: Piece) -> list[dict[str, Any]]:
        match piece:
            case Text(text):
                begun = self._begin("text", {"text": ""})
                self._blocks[-1]["text"] += text
                return [*begun, self._delta("text_delta", "text", text)]
            case Thought(text):
                begun = self._begin("thinking", {"thinking": "", "signature": ""})
                self._blocks[-1]["thinking"] += text
                return [*begun, self._delta("thinking_delta", "thinking", text)]
            case ToolCall(_, call_id, name):
                closed = self._close()
                block = {"id": call_id.replace("call_", "toolu_"), "name": name, "input": {}}
                return [*closed, *self._begin("tool_use", block)]
            case Arguments(_, text):
                self._json.append(text)
                return [self._delta("input_json_delta", "partial_json", text)]

    def _begin(self, kind: str, empty: dict[str, Any]) -> list[dict[str, Any]]:
        if self._open == kind:
            return []
        closed = self._close()
        self._open = kind
        block = {"type": kind, **empty}
        self._blocks.append(block)
        number = len(self._blocks) - 1
        started = {"type": "content_block_start", "index": number, "content_block": dict(block)}
        return [*closed, started]

    def _delta(self, kind: str, field: str, text: str) -> dict[str, Any]:
        delta = {"type": kind, field: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        if self._open == "tool_use":
            self._blocks[-1]["input"] = _parsed("".join(self._json))
            self._json = []
        self._open = ""
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


def _parsed(text: str) -> Any:
    """Arguments as they stand in the answer's JSON; an empty object if they are none."""
    try:
        given = json.loads(text)
        written = json.dumps(given, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # cut off by max_tokens, or nested too deeply
        return {}
    return msgspec.Raw(encodable(written).encode()) if isinstance(given, dict) else {}
