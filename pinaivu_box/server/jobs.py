"""Makes the jobs of a checked body: one for each choice."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import Struct

from pinaivu_box.chat_format import CONTINUE, GENERATE
from pinaivu_box.engine.messages import Constraint, SamplingParams, Tools
from pinaivu_box.errors import InvalidBody
from pinaivu_box.gateway.backend import Job, committed
from pinaivu_box.openai.request import max_tokens, normalise, stop_strings, text_of
from pinaivu_box.openai.tools import chosen_tools, functions
from pinaivu_box.openai.types import (
    ChatRequest,
    Function,
    JsonFormat,
    Sampled,
    SchemaFormat,
)

_SEED_BITS = 53  # of a random seed, so that it fits into a JSON number
_SEEDS = 2**63


def job_of(body: Sampled, job: Job) -> Job:
    """The job of a chat or a completion without its prompt, made from `InferenceCall.job`."""
    return replace(
        job,
        max_tokens=body.max_tokens,
        stop=stop_strings(body.stop),
        priority=body.pinaivu.priority if body.pinaivu else 0,
        constraint=grammar(body.grammar) if body.grammar else None,
        cache=body.cache_prompt is not False,
    )


def sampling_of(body: Struct) -> SamplingParams:
    """The sampling parameters of any kind of request: the values of those fields that the body has;
    null means the default."""
    names = set(SamplingParams.__struct_fields__).intersection(body.__struct_fields__)
    values = {name: value for name in names if (value := getattr(body, name)) is not None}
    return SamplingParams(**{"seed": secrets.randbits(_SEED_BITS), **values})


def chat_job(body: ChatRequest, job: Job) -> Job:
    """The job of a chat, made from `InferenceCall.job`.  Raises InvalidBody."""
    job = job_of(body, job)
    return replace(
        job,
        messages=normalise(body.messages),
        max_tokens=max_tokens(body),
        tools=_tools(body),
        template={**_template(body), **(body.chat_template_kwargs or {}), **_ending(body)},
        constraint=job.constraint or _format(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prediction=text_of(body.prediction.content) if body.prediction else "",
    )


def asked(body: ChatRequest) -> dict[str, Any]:
    """What the prompt commitment of a chat covers beside messages and stop strings."""
    return committed(_tools(body), grammar(body.grammar) if body.grammar else _format(body))


def choices(job: Job, n: int) -> list[Job]:
    """The jobs of `n` choices of a prompt, each with its own seed."""
    seeds = [(job.sampling.seed + k + _SEEDS) % (2 * _SEEDS) - _SEEDS for k in range(n)]
    samplings = [msgspec.structs.replace(job.sampling, seed=seed) for seed in seeds]
    return [replace(job, choice=job.choice + k, sampling=samplings[k]) for k in range(n)]


def grammar(text: str) -> Constraint:
    return Constraint("gbnf" if "::=" in text else "lark", text)


def _tools(body: ChatRequest) -> Tools | None:
    if not body.tools or body.tool_choice == "none":
        return None
    choice, allowed = chosen_tools(body.tool_choice)
    tools = functions(body.tools)
    return Tools(
        json_text([_without_nulls(tool) for tool in tools], "tools"),
        [tool.name for tool in tools if allowed is None or tool.name in allowed],
        choice,
        body.parallel_tool_calls is not False,
    )


def _without_nulls(function: Function) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.structs.asdict(function)
    return {name: value for name, value in fields.items() if value is not None}


def json_text(value: Any, param: str) -> str:
    """Raises InvalidBody."""
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise InvalidBody("it is nested too deeply", loc=("body", param)) from None


def _template(body: ChatRequest) -> dict[str, Any]:
    """Templates read `enable_thinking` (Qwen) or `reasoning_effort` (gpt-oss)."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    if effort in ("none", "minimal"):
        return {"enable_thinking": False, "reasoning_effort": "low"}
    return {"enable_thinking": True, "reasoning_effort": "high" if effort == "xhigh" else effort}


def _ending(body: ChatRequest) -> dict[str, Any]:
    if body.continue_final_message:
        return {CONTINUE: True}
    return {GENERATE: False} if body.add_generation_prompt is False else {}


def _format(body: ChatRequest) -> Constraint | None:
    match body.response_format:
        case JsonFormat():
            return Constraint("json_schema", '{"type":"object"}')
        case SchemaFormat(json_schema=definition):
            return Constraint("json_schema", json_text(definition.schema, "response_format"))
    return None
