"""`POST /v1/chat/completions`: body to jobs, events to a body or a stream."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.gateway.request import ChoiceOutput, ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai.chunks import ChunkBuilder, error_event
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.tools import customs
from pinaivu_box.openai.types import ChatCompletion, ChatRequest, Chunk, ContextShift
from pinaivu_box.server.choices import Choices, Whole
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import InferenceCall, usage_of
from pinaivu_box.server.jobs import chat_job, choices


async def chat_completions(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(ChatRequest)
    check_chat(body)
    model = call.admit(body.model)
    jobs = choices(chat_job(body, model, call.request_id, call.key.id), body.n or 1)
    call.wants_thoughts(_wants_thoughts(body))
    running = await call.start(jobs)
    created = call.created_at
    found = Choices(jobs, customs(body.tools or ()))
    if body.stream:
        empty = Chunk(
            id=_completion_id(call),
            request_id=call.request_id,
            created=created,
            model=model.id,
            choices=[],
            service_tier="default" if body.service_tier else UNSET,
        )
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        encoder = _Encoder(found, empty, with_usage=with_usage, ignored=call.ignored)
        return await call.stream(running, encoder)
    wholes, fingerprint = [Whole() for _ in jobs], ""
    async for event in call.collect(running):
        match event:
            case ChoiceStarted():
                found.begin(event)
                fingerprint = event.fingerprint
            case ChoiceOutput():
                wholes[event.choice].add(found.take(event))
            case Finished():
                end = event
    return JSON(
        ChatCompletion(
            id=_completion_id(call),
            request_id=call.request_id,
            created=created,
            model=model.id,
            choices=[
                whole.choice(index, logprobs=bool(body.logprobs))
                for index, whole in enumerate(wholes)
            ],
            usage=usage_of(end),
            system_fingerprint=fingerprint,
            service_tier="default" if body.service_tier else UNSET,
            context_shift=ContextShift(end.shifted_tokens) if end.shifted_tokens else UNSET,
            ignored_parameters=call.ignored or UNSET,
        )
    )


def _wants_thoughts(body: ChatRequest) -> str:
    """The field that asks for thoughts, "" if none does."""
    if body.reasoning_effort not in (None, "none", "minimal"):
        return "reasoning_effort"
    return "enable_thinking" if (body.chat_template_kwargs or {}).get("enable_thinking") else ""


def _completion_id(call: InferenceCall) -> str:
    return call.request_id.replace("req_", "chatcmpl-")


class _Encoder:
    """Events of a stream to chunks."""

    def __init__(
        self, found: Choices, empty: Chunk, *, with_usage: bool, ignored: list[str]
    ) -> None:
        self._chunks = ChunkBuilder(empty, with_usage=with_usage)
        self._ignored = ignored  # complete once the first choice has begun
        self._choices = found
        # A choice's last chunk promises that the receipt is on disk: it waits for it.
        self._reasons: dict[int, str] = {}

    def __call__(self, events: Sequence[RequestEvent]) -> bytes:
        return b"".join(self._one(event) for event in events)

    def _one(self, event: RequestEvent) -> bytes:
        match event:
            case ChoiceStarted():
                self._choices.begin(event)
                return self._chunks.begin(event.choice, event.fingerprint, self._ignored)
            case ChoiceOutput():
                part = self._choices.take(event)
                if part.finish_reason:
                    self._reasons[part.choice] = part.finish_reason
                return self._chunks.pieces(part.choice, part.pieces, part.logprobs)
            case Finished():
                last = [
                    self._chunks.finish(choice, reason, event.shifted_tokens)
                    for choice, reason in sorted(self._reasons.items())
                ]
                return b"".join([*last, self._chunks.end(usage_of(event))])
            case Failed():
                return error_event(event.error)
