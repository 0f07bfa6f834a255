"""A job as OpenAI's API asks for it, for a server that is no box; pure.

Only what the client has set is sent: the upstream has defaults of its own.  It answers one choice,
always as a stream, so that it can be stopped.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec

from pinaivu_box.chat_format import CONTINUE, GENERATE
from pinaivu_box.engine.messages import Constraint, SamplingParams, Tools
from pinaivu_box.errors import UnsupportedParameter
from pinaivu_box.gateway.backend import Job

# OpenAI's own sampling parameters, and those that vLLM, SGLang and llama-server know beside them.
_SAMPLING = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias")
_MORE_SAMPLING = ("top_k", "min_p", "typical_p", "ignore_eos", "min_tokens")
_REPEAT = ("repetition_penalty", "repeat_penalty")  # vLLM's name, and llama-server's
_DEFAULTS = SamplingParams()
_KINDS = {b"\xff\xd8": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}  # of images, by how they begin
_ANY_OBJECT = '{"type":"object"}'


def path_of(job: Job) -> str:
    """Below the base URL."""
    if job.inputs is not None:
        return "/embeddings"
    return "/chat/completions" if job.prompt is None else "/completions"


def body_of(job: Job, model: str, *, openai_only: bool) -> dict[str, Any]:
    """The body of the request for a `model` of that name there.  With `openai_only` the server
    refuses what OpenAI does not know.  Raises UnsupportedParameter."""
    if job.inputs is not None:
        inputs = job.inputs[0] if len(job.inputs) == 1 else job.inputs
        return {"model": model, "input": inputs, **_present(dimensions=job.dimensions)}
    body = {
        "model": model,
        **(_chat(job, openai_only) if job.prompt is None else _completion(job)),
        **sampling_of(job, openai_only=openai_only),
        **({"stop": job.stop} if job.stop else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return {**body, **_format(job.constraint)} if job.constraint is not None else body


def sampling_of(job: Job, *, openai_only: bool) -> dict[str, Any]:
    """How it is to draw the tokens, and how many.  Raises UnsupportedParameter."""
    asked = msgspec.structs.asdict(job.sampling)
    sent = {name: asked[name] for name in _SAMPLING if asked[name] != getattr(_DEFAULTS, name)}
    more = {name: asked[name] for name in _MORE_SAMPLING if asked[name] != getattr(_DEFAULTS, name)}
    if job.sampling.repeat_penalty != _DEFAULTS.repeat_penalty:
        more |= dict.fromkeys(_REPEAT, job.sampling.repeat_penalty)
    if openai_only and more:
        raise _unsupported(next(iter(more)), "is not known to the upstream that serves this model")
    seed = job.sampling.seed if job.seeded else None
    return {**sent, **more, **_present(seed=seed, max_tokens=job.max_tokens)}


def sent_of(job: Job, *, openai_only: bool) -> dict[str, Any]:
    """The same, as the coordinator's statement has it: JSON numbers do not carry 64 bits."""
    sent = sampling_of(job, openai_only=openai_only)
    return {**sent, "seed": str(sent["seed"])} if "seed" in sent else sent


def _chat(job: Job, openai_only: bool) -> dict[str, Any]:
    messages = [_with_images(message, job.images) for message in job.messages]
    body: dict[str, Any] = {"messages": messages}
    if job.tools is not None:
        body |= _tools(job.tools)
    if job.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": job.logprobs}
    kwargs = {
        name: value for name, value in job.template.items() if name not in (CONTINUE, GENERATE)
    }
    if (effort := kwargs.get("reasoning_effort")) is not None:
        body["reasoning_effort"] = effort
    if openai_only:
        body["messages"] = [_without_reasoning(message) for message in messages]
        return body
    if job.template.get(CONTINUE):
        body |= {CONTINUE: True, GENERATE: False}
    elif job.template.get(GENERATE) is False:
        body[GENERATE] = False
    return {**body, "chat_template_kwargs": kwargs} if kwargs else body


def _with_images(message: dict[str, Any], images: Mapping[str, bytes]) -> dict[str, Any]:
    """With each image in the place of its digest."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": _data_url(images[part["sha256"]])}}
        if part["type"] == "image"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _data_url(image: bytes) -> str:
    kind = next((kind for start, kind in _KINDS.items() if image.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def _completion(job: Job) -> dict[str, Any]:
    """The echo of a prompt of text is made here."""
    if job.echo and (job.logprobs is not None or not isinstance(job.prompt, str)):
        raise _unsupported("echo", "with logprobs, or with a prompt of tokens, needs a model here")
    return {
        "prompt": job.prompt,
        **_present(logprobs=job.logprobs, suffix=job.suffix or None),
    }


def _tools(tools: Tools) -> dict[str, Any]:
    functions = msgspec.json.decode(tools.functions, type=list[dict[str, Any]])
    named = {"type": "function", "function": {"name": tools.choice}}
    return {
        "tools": [
            {"type": "function", "function": function}
            for function in functions
            if function.get("name") in tools.names
        ],
        "tool_choice": tools.choice if tools.choice in ("auto", "required") else named,
        **({} if tools.parallel else {"parallel_tool_calls": False}),
    }


def _format(constraint: Constraint) -> dict[str, Any]:
    if constraint.kind != "json_schema":
        raise _unsupported("grammar", "needs a model here: an upstream takes JSON schemas only")
    if constraint.text == _ANY_OBJECT:
        return {"response_format": {"type": "json_object"}}
    schema = {"name": "answer", "schema": msgspec.Raw(constraint.text.encode())}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _unsupported(name: str, why: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{name} {why}", loc=("body", name))
