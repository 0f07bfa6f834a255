"""Tokens without inference: `/v1/tokenize`, `/v1/detokenize`, and the length of a chat's prompt."""

from __future__ import annotations

from dataclasses import replace

from msgspec import UNSET

from pinaivu_box.openai.completions import (
    DetokenizedText,
    DetokenizeRequest,
    InputTokens,
    TokenizeRequest,
    TokenList,
)
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.types import ChatRequest
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.jobs import chat_job


async def tokenize(call: InferenceCall, body: TokenizeRequest) -> TokenList:
    job = replace(call.job(body), prompt=body.text)
    result, _ = await call.tokenize(job, plain=not body.special)
    return TokenList(
        call.request_id, job.model.id, result.tokens, len(result.tokens), call.ignored or UNSET
    )


async def detokenize(call: InferenceCall, body: DetokenizeRequest) -> DetokenizedText:
    job = call.job(body)
    result, _ = await call.tokenize(job, body.tokens, count=True)
    return DetokenizedText(call.request_id, job.model.id, result.text, call.ignored or UNSET)


async def count_chat_tokens(call: InferenceCall, body: ChatRequest) -> InputTokens:
    """The number of tokens in the prompt of a chat."""
    check_chat(body)
    job = chat_job(body, call.job(body))
    result, _ = await call.tokenize(job, count=True)
    return InputTokens(
        call.request_id, job.model.id, result.number, ignored_parameters=call.ignored or UNSET
    )
