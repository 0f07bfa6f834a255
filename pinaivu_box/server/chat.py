"""`POST /v1/chat/completions`."""

from __future__ import annotations

from msgspec import UNSET

from pinaivu_box.gateway.output import Output
from pinaivu_box.gateway.request import ChoiceStarted, Finished
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.tools import custom_names
from pinaivu_box.openai.types import ChatCompletion, ChatRequest, Chunk, ContextShift
from pinaivu_box.server.chat_stream import ChatStream
from pinaivu_box.server.inference import InferenceCall, usage_of
from pinaivu_box.server.jobs import chat_job, choices
from pinaivu_box.server.output_parser import MessageBuilder, OutputParser, logprobs_of
from pinaivu_box.server.sse import EventStream


async def create_chat_completion(
    call: InferenceCall, body: ChatRequest
) -> ChatCompletion | EventStream:
    check_chat(body)
    model = call.admit(body.model)
    jobs = choices(chat_job(body, model, call.request_id, call.key.id), body.n or 1)
    call.asks_for_thinking(_thinking_field(body))
    running = await call.start(jobs)
    parser = OutputParser(jobs, custom_names(body.tools or ()))
    completion_id = call.request_id.replace("req_", "chatcmpl-")
    service_tier = "default" if body.service_tier else UNSET
    if body.stream:
        empty = Chunk(
            id=completion_id,
            request_id=call.request_id,
            created=call.created_at,
            model=model.id,
            choices=[],
            service_tier=service_tier,
        )
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = ChatStream(parser, empty, with_usage=with_usage, ignored=call.ignored)
        return await call.stream(running, stream.encode)
    messages, fingerprint = [MessageBuilder() for _ in jobs], ""
    async for event in call.collect(running):
        match event:
            case ChoiceStarted():
                parser.begin(event)
                fingerprint = event.fingerprint
            case Output():
                pieces, reason = parser.parse(event)
                messages[event.choice].add(pieces, logprobs_of(event), reason)
            case Finished():
                end = event
    return ChatCompletion(
        id=completion_id,
        request_id=call.request_id,
        created=call.created_at,
        model=model.id,
        choices=[
            message.choice(index, logprobs=bool(body.logprobs))
            for index, message in enumerate(messages)
        ],
        usage=usage_of(end),
        system_fingerprint=fingerprint,
        service_tier=service_tier,
        context_shift=ContextShift(end.shifted_tokens) if end.shifted_tokens else UNSET,
        ignored_parameters=call.ignored or UNSET,
    )


def _thinking_field(body: ChatRequest) -> str:
    """The field that asks the model to think; "" if there is none."""
    if body.reasoning_effort not in (None, "none", "minimal"):
        return "reasoning_effort"
    return "enable_thinking" if (body.chat_template_kwargs or {}).get("enable_thinking") else ""
