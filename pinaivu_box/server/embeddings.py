"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import struct
from dataclasses import replace

from msgspec import UNSET

from pinaivu_box.engine.messages import Output
from pinaivu_box.gateway.request import Finished
from pinaivu_box.openai.embeddings import (
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    OneEmbedding,
)
from pinaivu_box.openai.request import texts_or_tokens
from pinaivu_box.server.inference import InferenceCall

_MAX_INPUTS = 2048  # OpenAI's limit


async def create_embeddings(call: InferenceCall, body: EmbeddingRequest) -> EmbeddingList:
    inputs = texts_or_tokens(body.input, "input", _MAX_INPUTS)
    job = replace(call.job(body), inputs=inputs, dimensions=body.dimensions)
    await call.start([job])
    async for event in call.collect():
        match event:
            case Output():
                vectors = event.vectors
            case Finished():
                end = event
    return EmbeddingList(
        call.request_id,
        job.model.id,
        [OneEmbedding(index, _encoded(vector, body)) for index, vector in enumerate(vectors)],
        EmbeddingUsage(end.prompt_tokens, end.prompt_tokens),
        ignored_parameters=call.ignored or UNSET,
    )


def _encoded(vector: bytes, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
