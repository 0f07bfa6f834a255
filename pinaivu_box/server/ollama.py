"""Ollama's API under `/api`: chats, completions, embeddings, and the models."""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from datetime import UTC, datetime

from msgspec import UNSET
from starlette.requests import Request

from pinaivu_box.errors import ModelNotAllowed
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.output import Output
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.models import memory
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.ollama import (
    AnsweredMessage,
    EmbedAnswer,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    LoadedModel,
    LoadedModels,
    ModelDetails,
    OllamaAnswer,
    OllamaCall,
    OllamaChatRequest,
    OllamaFunction,
    OllamaVersion,
    ShowRequest,
    ShownModel,
    TaggedModel,
    Tags,
)
from pinaivu_box.openai.reader import Arguments, ParsedCall, Piece, Reader, Reasoning, Text
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.tools import parsed_arguments
from pinaivu_box.server import error_responses
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of
from pinaivu_box.server.inference import InferenceCall, reader_of
from pinaivu_box.server.jobs import chat_job
from pinaivu_box.server.sse import LineStream, encode_line

_VERSION = "0.12.0"  # of Ollama, whose API this is
_NANOSECONDS = 1_000_000_000


async def chat(call: InferenceCall, body: OllamaChatRequest) -> OllamaAnswer | LineStream:
    asked = body.as_chat()
    if not body.messages:
        return await _load(call, body.model, is_chat=True)
    check_chat(asked)
    job = chat_job(asked, call.job(asked))
    if body.think:
        call.thinking_field = "think"
    await call.start([job])
    return await call.answer(
        _Answer(call, job, is_chat=True), stream=body.stream is not False, lines=True
    )


async def generate(call: InferenceCall, body: GenerateRequest) -> OllamaAnswer | LineStream:
    asked = body.as_chat()
    if not body.prompt:
        return await _load(call, body.model, is_chat=False)
    job = chat_job(asked, call.job(asked))
    if body.raw or body.suffix:
        job = replace(job, messages=[], prompt=body.prompt, suffix=body.suffix)
    elif body.think:
        call.thinking_field = "think"
    await call.start([job])
    return await call.answer(
        _Answer(call, job, is_chat=False), stream=body.stream is not False, lines=True
    )


async def _load(call: InferenceCall, model: str, *, is_chat: bool) -> OllamaAnswer:
    """Load a model, which is what a request without a prompt is for."""
    job = call.job(GenerateRequest(model=model))
    await call.tokenize(replace(job, prompt=""), count=True)
    return _Answer(call, job, is_chat=is_chat).loaded()


async def embed(call: InferenceCall, body: EmbedRequest) -> EmbedAnswer:
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors, tokens, seconds = await _embed(call, body, texts, body.dimensions)
    nanoseconds = round(seconds * _NANOSECONDS)
    model = call.request.scope["state"]["model"]
    return EmbedAnswer(model, vectors, nanoseconds, 0, tokens, call.request_id)


async def embeddings(call: InferenceCall, body: EmbeddingsRequest) -> EmbeddingsAnswer:
    vectors, _, _ = await _embed(call, body, [body.prompt], None)
    return EmbeddingsAnswer(vectors[0], call.request_id)


async def _embed(
    call: InferenceCall,
    body: EmbedRequest | EmbeddingsRequest,
    texts: list[str],
    dimensions: int | None,
) -> tuple[list[list[float]], int, float]:
    """Vectors, tokens and seconds."""
    began = time.monotonic()
    await call.start([replace(call.job(body), inputs=[*texts], dimensions=dimensions)])
    vectors: list[bytes] = []
    tokens = 0
    async for event in call.collect():
        match event:
            case Output():
                vectors = event.vectors
            case Finished():
                tokens = event.prompt_tokens
    numbers = [list(struct.unpack(f"<{len(v) // 4}f", v)) for v in vectors]
    return numbers, tokens, time.monotonic() - began


# -- models --------------------------------------------------------------------------------------


async def version(request: Request) -> OllamaVersion:
    return OllamaVersion(_VERSION)


async def tags(request: Request) -> Tags:
    box = box_of(request)
    return Tags([await _tagged(request, model) for model in box.models(key_of(request).policy)])


async def _tagged(request: Request, model: Model) -> TaggedModel:
    digest = await _digest(request, model)
    modified = _time(model.created)
    return TaggedModel(model.id, model.id, modified, model.size, digest, _details(model))


async def show(request: Request, body: ShowRequest) -> ShownModel:
    """Raises ModelNotFound, ModelNotAllowed."""
    policy = key_of(request).policy
    model = box_of(request).model(body.model or body.name, policy)
    if not policy.serves(model.id):
        raise ModelNotAllowed(f"This key may not use {model.id}.", param="model")
    architecture = model.header.architecture
    context = memory.context_of(model, box_of(request).config.engine.context)
    info = {"general.architecture": architecture, f"{architecture}.context_length": context}
    return ShownModel(_details(model), info, ["completion", "tools"], _time(model.created))


async def ps(request: Request) -> LoadedModels:
    box, policy = box_of(request), key_of(request).policy
    served = {model.id: model for model in box.models(policy)}
    return LoadedModels(
        [
            LoadedModel(
                model.id,
                model.id,
                engine.memory or 0,
                await _digest(request, model),
                _details(model),
                _time(time.time() + box.placement.longest),
                0,
                engine.ready.context,
            )
            for engine in box.placement.engines
            if (model := served.get(engine.model_id)) is not None
        ]
    )
