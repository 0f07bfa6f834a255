"""Tokens without inference: `/v1/tokenize`, `/v1/detokenize`, and what a chat's prompt has."""

from __future__ import annotations

from dataclasses import replace

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.gateway.backend import Job
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.completions import (
    DetokenizedText,
    DetokenizeRequest,
    InputTokens,
    TokenizeRequest,
    TokenList,
)
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.types import ChatRequest, Sampled
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.jobs import chat_job, job_of


async def tokenize(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(TokenizeRequest)
    model = call.admit(body.model)
    job = replace(_job(model, call), prompt=body.text)
    found = await call.tokenize(job, plain=not body.special)
    return JSON(
        TokenList(call.request_id, model.id, found.tokens, len(found.tokens), call.ignored or UNSET)
    )


async def detokenize(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(DetokenizeRequest)
    model = call.admit(body.model)
    found = await call.tokenize(_job(model, call), body.tokens, count=True)
    return JSON(DetokenizedText(call.request_id, model.id, found.text, call.ignored or UNSET))


async def input_tokens(request: Request) -> Response:
    """Takes the body of a chat request, and counts only."""
    call = InferenceCall(request)
    body = await call.body(ChatRequest)
    check_chat(body)
    model = call.admit(body.model)
    job = chat_job(body, model, call.request_id, call.key.id)
    found = await call.tokenize(job, count=True)
    return JSON(
        InputTokens(
            call.request_id, model.id, found.number, ignored_parameters=call.ignored or UNSET
        )
    )


def _job(model: Model, call: InferenceCall) -> Job:
    return job_of(Sampled(model=model.id), model, call.request_id, call.key.id)
