"""`POST /v1/completions`: prompts as they are, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.errors import InvalidBody, UnsupportedParameter
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.requests import Begun, Failed, Finished, RequestEvent, Said
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.chunks import DONE, error_event, event
from pinaivu_box.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from pinaivu_box.openai.request import texts_or_tokens
from pinaivu_box.openai.types import ContextShift
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import Call, usage_of
from pinaivu_box.server.jobs import choices, job_of

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of this endpoint alone
_MOST_CHOICES = 128


async def completions(request: Request) -> Response:
    call = Call(request)
    body = await call.body(CompletionRequest)
    prompts = _prompts(body)
    model = call.admit(body.model)
    jobs = _jobs(body, prompts, model, call)
    running = call.start(jobs)
    answer = _Answer(body, jobs, Completion(
        id=call.request_id.replace("req_", "cmpl-"),
        request_id=call.request_id,
        created=call.created_at,
        model=model.id,
        choices=[],
        ignored_parameters=call.ignored or UNSET,
    ))  # fmt: skip
    if body.stream:
        return await call.stream(running, answer.encode)
    async for happened in call.collect(running):
        answer.take(happened)
    return JSON(answer.whole())


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Raises InvalidBody for what cannot be."""
    prompts = texts_or_tokens(body.prompt, "prompt", _MOST_CHOICES)
    if len(prompts) * (body.n or 1) > _MOST_CHOICES:
        raise InvalidBody(
            f"prompts times n are more than {_MOST_CHOICES} choices", loc=("body", "prompt")
        )
    if body.echo and (body.logprobs is not None or not isinstance(prompts[0], str)):
        why = "echo is served for prompts of text, without logprobs"
        raise UnsupportedParameter(why, loc=("body", "echo"))
    if body.suffix and not isinstance(prompts[0], str):
        raise InvalidBody("suffix needs a prompt of text", loc=("body", "suffix"))
    if body.stream_options is not None and not body.stream:
        why = "stream_options needs stream to be true"
        raise InvalidBody(why, loc=("body", "stream_options"))
    return prompts


def _jobs(
    body: CompletionRequest, prompts: list[str | list[int]], model: Model, call: Call
) -> list[Job]:
    common = replace(
        job_of(body, model, call.request_id, call.key_id),
        max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        suffix=body.suffix or "",
    )
    n = body.n or 1
    jobs = []
    for number, prompt in enumerate(prompts):
        first = replace(common, prompt=prompt, prompt_number=number, choice=number * n)
        jobs += choices(first, n)
    return jobs


class _Answer:
    def __init__(self, body: CompletionRequest, jobs: list[Job], empty: Completion) -> None:
        self._body = body
        self._empty = empty
        # With echo a choice begins with its prompt.
        self._echo = [str(job.prompt) if body.echo else "" for job in jobs]
        self._texts = [[echo] for echo in self._echo]
        self._lengths = [len(echo) for echo in self._echo]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in jobs]
        self._reasons: list[str | None] = [None] * len(jobs)
        self._end: Finished | None = None

    # -- a whole body ------------------------------------------------------------------------------

    def take(self, happened: RequestEvent) -> None:
        match happened:
            case Begun():
                self._empty = msgspec.structs.replace(
                    self._empty, system_fingerprint=happened.fingerprint
                )
            case Said(choice, output):
                self._texts[choice].append(output.text)
                self._logprobs[choice] += output.logprobs
                self._reasons[choice] = output.finish_reason
            case Finished():
                self._end = happened

    def whole(self) -> Completion:
        found = []
        for index, texts in enumerate(self._texts):
            probed = self._shown(index, self._logprobs[index], 0)
            found.append(CompletionChoice(index, "".join(texts), self._reasons[index], probed))
        return self._with_usage(msgspec.structs.replace(self._empty, choices=found))

    def _with_usage(self, answer: Completion) -> Completion:
        if self._end is None:
            return answer
        shifted = self._end.shifted_tokens
        return msgspec.structs.replace(
            answer,
            usage=usage_of(self._end),
            context_shift=ContextShift(shifted) if shifted else UNSET,
        )

    def _shown(
        self, _index: int, probed: Sequence[TokenLogprob], offset: int
    ) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        tokens = [one.token.decode(errors="replace") for one in probed]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return CompletionLogprobs(
            tokens,
            [one.logprob for one in probed],
            [{t.decode(errors="replace"): value for t, value in one.top} for one in probed],
            offsets,
        )

    # -- a stream ----------------------------------------------------------------------------------

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        return b"".join(self._chunk(happened) for happened in events)

    def _chunk(self, happened: RequestEvent) -> bytes:
        match happened:
            case Begun():
                self.take(happened)
                echo = self._echo[happened.choice]
                return self._event(CompletionChoice(happened.choice, echo, None)) if echo else b""
            case Said(choice, output):
                self._reasons[choice] = output.finish_reason
                if not output.text and not output.logprobs:
                    return b""
                probed = self._shown(choice, output.logprobs, self._lengths[choice])
                self._lengths[choice] += len(output.text)
                return self._event(CompletionChoice(choice, output.text, None, probed))
            case Finished():
                self.take(happened)
                return self._last(happened)
            case Failed():
                return error_event(happened.error)

    def _event(self, choice: CompletionChoice) -> bytes:
        return event(msgspec.structs.replace(self._empty, choices=[choice]))

    def _last(self, end: Finished) -> bytes:
        options = self._body.stream_options
        parts = [
            self._event(CompletionChoice(index, "", reason))
            for index, reason in enumerate(self._reasons)
        ]
        if options is not None and options.include_usage:
            parts.append(event(self._with_usage(self._empty)))
        return b"".join([*parts, DONE])
