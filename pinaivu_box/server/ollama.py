"""Ollama's API under `/api`: chats, completions, embeddings, and the models."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request

from pinaivu_box.engine.messages import Output
from pinaivu_box.errors import ModelNotAllowed
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.model_admin import loading
from pinaivu_box.models import memory
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.record import ModelParameters
from pinaivu_box.openai.ollama import (
    AnsweredCall,
    AnsweredFunction,
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
    OllamaChatRequest,
    OllamaVersion,
    ShownModel,
    ShowRequest,
    TaggedModel,
    Tags,
)
from pinaivu_box.openai.reader import Arguments, ParsedCall, Piece, Reader, Reasoning, Text
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.tools import parsed_arguments
from pinaivu_box.server import error_responses
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.inference import InferenceCall, reader_of
from pinaivu_box.server.jobs import chat_job
from pinaivu_box.server.sse import LineStream, encode_line

_VERSION = "0.12.0"  # of Ollama, whose API this is
_MAX_TIME = 253_402_300_799  # Unix seconds of the last one of the year 9999


async def chat(call: InferenceCall, body: OllamaChatRequest) -> OllamaAnswer | LineStream:
    asked = body.as_chat()
    if not body.messages:
        return await _load(call, body.model, is_chat=True)
    check_chat(asked)
    job = chat_job(asked, call.job(asked))
    if body.think:
        call.thinking_field = "think"
    return await _answer(call, job, body, is_chat=True)


async def generate(call: InferenceCall, body: GenerateRequest) -> OllamaAnswer | LineStream:
    asked = body.as_chat()
    if not body.prompt:
        return await _load(call, body.model, is_chat=False)
    job = chat_job(asked, call.job(asked))
    if body.raw or body.suffix:
        job = replace(job, messages=[], prompt=body.prompt, suffix=body.suffix)
    elif body.think:
        call.thinking_field = "think"
    return await _answer(call, job, body, is_chat=False)


async def _answer(
    call: InferenceCall, job: Job, body: OllamaChatRequest | GenerateRequest, *, is_chat: bool
) -> OllamaAnswer | LineStream:
    return await call.answer(
        [job],
        _Answer(call, job, is_chat=is_chat),
        stream=body.stream is not False,
        stream_type=LineStream,
    )


async def _load(call: InferenceCall, model: str, *, is_chat: bool) -> OllamaAnswer:
    """Load a model, which is what a request without a prompt is for; or, if it is to be kept for no
    time, unload it."""
    job = replace(call.job(GenerateRequest(model=model)), prompt="", keep_alive=call.keep_alive)
    answer = _Answer(call, job, is_chat=is_chat)
    if call.keep_alive == 0:
        await _unload(call, job)
        return answer.empty("unload")
    await call.tokenize(job, count=True)
    return answer.empty("load")


async def _unload(call: InferenceCall, job: Job) -> None:
    """For an admin at once; for others as soon as no other key wants the model to stay."""
    placement, model_id = call.box.placement, job.model.id
    if call.key.admin:
        await loading.unload(call.box, model_id, actor_of(call.request))
    elif model_id in placement.loaded:
        await call.tokenize(job, count=True)


async def embed(call: InferenceCall, body: EmbedRequest) -> EmbedAnswer:
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors, tokens, seconds = await _embed(call, body, texts, body.dimensions)
    model = call.request.scope["state"]["model"]
    return EmbedAnswer(model, vectors, _nanoseconds(seconds), 0, tokens, call.request_id)


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
    admission, policy = box_of(request).admission, key_of(request).policy
    named = [(model.id, model) for model in admission.models(policy)]
    named += admission.aliases(policy)
    return Tags([await _tagged(request, name, model) for name, model in named])


async def _tagged(request: Request, name: str, model: Model) -> TaggedModel:
    digest = await box_of(request).digests.known(model)
    modified = _time(model.created)
    return TaggedModel(name, name, modified, model.size, digest, _details(model))


async def show(request: Request, body: ShowRequest) -> ShownModel:
    """Raises ModelNotFound, ModelNotAllowed."""
    policy = key_of(request).policy
    model = box_of(request).admission.find(body.model or body.name, policy)
    if not policy.serves(model.id):
        raise ModelNotAllowed(f"This key may not use {model.id}.", param="model")
    architecture = model.header.architecture
    context = memory.context_of(model, box_of(request).config.engine.context)
    info = {
        "general.architecture": architecture,
        "general.parameter_count": model.header.parameters,
        f"{architecture}.context_length": context,
    }
    capabilities = ["completion", "tools"] + ["vision"] * (model.projector is not None)
    described = ShownModel(_details(model), info, capabilities, _time(model.created))
    if (record := model.record) is None:
        return described
    return msgspec.structs.replace(
        described,
        license=record.license or UNSET,
        system=record.system or UNSET,
        parameters=_written(record.parameters) or UNSET,
    )


def _written(parameters: ModelParameters) -> str:
    """Parameters as Ollama writes them: a line for each, a text in quotes."""
    lines = []
    for name, value in msgspec.structs.asdict(parameters).items():
        values = value if isinstance(value, tuple) else [value]
        lines += [f"{name:<30} {json.dumps(one)}" for one in values if one is not None]
    return "\n".join(lines)


async def ps(request: Request) -> LoadedModels:
    box, policy = box_of(request), key_of(request).policy
    served = {model.id: model for model in box.admission.models(policy)}
    return LoadedModels(
        [
            LoadedModel(
                model.id,
                model.id,
                engine.memory or 0,
                await box.digests.known(model),
                _details(model),
                _time(time.time() + box.placement.max_keep_alive),
                0,
                engine.ready.context,
            )
            for engine in box.placement.engines
            if (model := served.get(engine.model_id)) is not None
        ]
    )


def _details(model: Model) -> ModelDetails:
    header = model.header
    family, size = header.architecture, _count(header.parameters)
    return ModelDetails("", "gguf", family, [family], size, header.quantisation)


def _count(parameters: int) -> str:
    """A number of parameters as Ollama writes it, such as 134.52M or 1.2B."""
    if parameters >= 10**9:
        return f"{parameters / 10**9:.1f}B"
    return f"{parameters / 10**6:.2f}M"


def _time(seconds: float) -> str:
    time_ = datetime.fromtimestamp(min(seconds, _MAX_TIME), UTC)
    return time_.isoformat().replace("+00:00", "Z")


# -- answers -------------------------------------------------------------------------------------


class _Answer:
    """See `inference.AnswerBuilder`.  Calls are sent whole, as Ollama does."""

    def __init__(self, call: InferenceCall, job: Job, *, is_chat: bool) -> None:
        self._call, self._job, self._is_chat = call, job, is_chat
        self._reader = Reader(None)  # until it is started
        self._began = time.monotonic()
        self._first = 0.0  # when the first output came
        self._queued = 0.0  # seconds before the engine began
        self._text, self._thinking = "", ""
        self._calls: list[AnsweredCall] = []
        self._name, self._call_id = "", ""
        self._arguments: list[str] = []
        self._end: Finished

    def empty(self, reason: str) -> OllamaAnswer:
        """The answer to a request that only loads or unloads the model."""
        return self._line("", done=True, done_reason=reason)

    def whole(self) -> OllamaAnswer:
        return self._last(self._text, self._thinking, self._calls)

    def encode(self, event: RequestEvent) -> bytes:
        if isinstance(event, Failed):
            return encode_line(error_responses.body(event.error, error_responses.OLLAMA))
        before = len(self._text), len(self._thinking), len(self._calls)
        self.take(event)
        text, thinking = self._text[before[0] :], self._thinking[before[1] :]
        calls = self._calls[before[2] :]
        lines = [self._line(text, thinking, calls)] if text or thinking or calls else []
        if isinstance(event, Finished):
            lines.append(self._last("", "", []))
        return b"".join(map(encode_line, lines))

    def take(self, event: RequestEvent) -> None:
        match event:
            case ChoiceStarted():
                self._reader = reader_of(self._job, event)
            case Output():
                self._first = self._first or time.monotonic()
                self._queued = (event.queue_ms or 0.0) / 1000 or self._queued
                for piece in self._reader.read(event):
                    self._add(piece)
            case Finished():
                self._close_call()
                self._end = event

    def _add(self, piece: Piece) -> None:
        match piece:
            case Text(text):
                self._text += text
            case Reasoning(text):
                self._thinking += text
            case ParsedCall(_, call_id, name):
                self._close_call()
                self._call_id, self._name = call_id, name
            case Arguments(_, text):
                self._arguments.append(text)

    def _close_call(self) -> None:
        if self._name:
            arguments = parsed_arguments("".join(self._arguments))
            function = AnsweredFunction(self._name, arguments)
            self._calls.append(AnsweredCall(self._call_id, function))
        self._name, self._arguments = "", []

    def _last(self, text: str, thinking: str, calls: list[AnsweredCall]) -> OllamaAnswer:
        now = time.monotonic()
        first = self._first or now
        return self._line(
            text,
            thinking,
            calls,
            done=True,
            done_reason="length" if self._reader.finish_reason == "length" else "stop",
            total_duration=_nanoseconds(now - self._began),
            load_duration=_nanoseconds(self._queued),
            prompt_eval_count=self._end.prompt_tokens,
            prompt_eval_duration=_nanoseconds(max(0.0, first - self._began - self._queued)),
            eval_count=self._end.completion_tokens,
            eval_duration=_nanoseconds(now - first),
            request_id=self._call.request_id,
        )

    def _line(
        self, text: str, thinking: str = "", calls: list[AnsweredCall] | None = None, **more: Any
    ) -> OllamaAnswer:
        content: dict[str, Any] = {"response": text, "thinking": thinking or UNSET}
        if self._is_chat:
            message = AnsweredMessage("assistant", text, thinking or UNSET, calls or UNSET)
            content = {"message": message}
        created_at = _time(time.time())
        return OllamaAnswer(model=self._job.model.id, created_at=created_at, **content, **more)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
