"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import struct
from dataclasses import replace

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.gateway.request import ChoiceOutput, Finished
from pinaivu_box.openai.embeddings import (
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    OneEmbedding,
)
from pinaivu_box.openai.request import texts_or_tokens
from pinaivu_box.openai.types import Sampled
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.jobs import job_of

_MOST_INPUTS = 2048  # OpenAI's limit


async def embeddings(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(EmbeddingRequest)
    inputs = texts_or_tokens(body.input, "input", _MOST_INPUTS)
    model = call.admit(body.model)
    job = job_of(Sampled(model=model.id), model, call.request_id, call.key.id)
    running = await call.start([replace(job, inputs=inputs, dimensions=body.dimensions)])
    async for event in call.collect(running):
        match event:
            case ChoiceOutput():
                vectors = event.output.vectors
            case Finished():
                end = event
    data = [OneEmbedding(index, _encoded(vector, body)) for index, vector in enumerate(vectors)]
    usage = EmbeddingUsage(end.prompt_tokens, end.prompt_tokens)
    ignored = call.ignored or UNSET
    return JSON(EmbeddingList(call.request_id, model.id, data, usage, ignored_parameters=ignored))


def _encoded(vector: bytes, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
