"""`POST /v1/completions`: prompts as they are, without a chat template."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.errors import InvalidBody
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceOutput, ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.chunks import DONE, error_event, event
from pinaivu_box.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from pinaivu_box.openai.logprobs import shown_likeliest, shown_token
from pinaivu_box.openai.request import check_length, check_stream, texts_or_tokens
from pinaivu_box.openai.types import ContextShift
from pinaivu_box.receipts.commitment import new_nonce
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import InferenceCall, usage_of
from pinaivu_box.server.jobs import choices, job_of

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of this endpoint alone
_MOST_CHOICES = 128


async def completions(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(CompletionRequest)
    prompts = _prompts(body)
    model = call.admit(body.model)
    jobs = _jobs(body, prompts, model, call)
    running = await call.start(jobs)
    answer = _CompletionAnswer(body, jobs, Completion(
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
    if body.max_tokens == 0 and not body.echo:
        raise InvalidBody("max_tokens 0 needs echo to be true", loc=("body", "max_tokens"))
    if body.suffix and body.echo and body.logprobs is not None:
        raise InvalidBody(
            "suffix and echo with logprobs exclude each other", loc=("body", "suffix")
        )
    if body.suffix and not isinstance(prompts[0], str):
        raise InvalidBody("suffix needs a prompt of text", loc=("body", "suffix"))
    check_stream(body)
    check_length(body, _max_tokens(body.max_tokens))
    return prompts


def _jobs(
    body: CompletionRequest, prompts: list[str | list[int]], model: Model, call: InferenceCall
) -> list[Job]:
    common = replace(
        job_of(body, model, call.request_id, call.key.id),
        max_tokens=_max_tokens(body.max_tokens),
        logprobs=body.logprobs,
        echo=bool(body.echo),
        suffix=body.suffix or "",
    )
    n = body.n or 1
    jobs = []
    for number, prompt in enumerate(prompts):
        first = replace(
            common, prompt=prompt, prompt_number=number, choice=number * n, nonce=new_nonce()
        )
        jobs += choices(first, n)
    return jobs


def _max_tokens(asked: int | None) -> int | None:
    if asked is None:
        return _DEFAULT_MAX_TOKENS
    return None if asked < 0 else asked


class _Choice:
    """One choice as it comes.  With echo it begins with its prompt."""

    def __init__(self, job: Job) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self._job = job
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # in the text, of the next token
        self._first = job.echo  # the next token is a prompt's first

    def begin(self, prompt: str) -> str:
        """The beginning of its text; `prompt` is what the model has read."""
        if not self._job.echo:
            return ""
        text = self._job.prompt if isinstance(self._job.prompt, str) else prompt
        # What a tokenizer puts before a prompt has no place in the text.
        self._offset = min(0, len(text) - len(prompt))
        return text

    def show(self, probed: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        """The next tokens."""
        if self._job.logprobs is None:
            return None
        shown = CompletionLogprobs([], [], [], [])
        for one in probed:
            likeliest = shown_likeliest(one.token, one.logprob, one.top)
            shown.tokens.append(shown_token(one.token))
            shown.token_logprobs.append(None if self._first else one.logprob)
            shown.top_logprobs.append(None if self._first else likeliest)
            shown.text_offset.append(max(0, self._offset))
            self._offset += len(self._decoder.decode(one.token))
            self._first = False
        return shown


class _CompletionAnswer:
    def __init__(self, body: CompletionRequest, jobs: list[Job], empty: Completion) -> None:
        self._body = body
        self._empty = empty
        self._choices = [_Choice(job) for job in jobs]
        self._end: Finished | None = None

    # -- a whole body ------------------------------------------------------------------------------

    def take(self, happened: RequestEvent) -> None:
        match happened:
            case ChoiceStarted():
                self._begin(happened)
                choice = self._choices[happened.choice]
                choice.texts.append(choice.begin(happened.prompt))
            case ChoiceOutput(number, output):
                choice = self._choices[number]
                choice.texts.append(output.text)
                choice.logprobs += output.logprobs
                choice.finish_reason = output.finish_reason
            case Finished():
                self._end = happened

    def whole(self) -> Completion:
        found = [
            CompletionChoice(index, "".join(one.texts), one.finish_reason, one.show(one.logprobs))
            for index, one in enumerate(self._choices)
        ]
        return self._with_usage(msgspec.structs.replace(self._empty, choices=found))

    def _begin(self, begun: ChoiceStarted) -> None:
        self._empty = msgspec.structs.replace(self._empty, system_fingerprint=begun.fingerprint)

    def _with_usage(self, answer: Completion) -> Completion:
        if self._end is None:
            return answer
        shifted = self._end.shifted_tokens
        return msgspec.structs.replace(
            answer,
            usage=usage_of(self._end),
            context_shift=ContextShift(shifted) if shifted else UNSET,
        )

    # -- a stream ----------------------------------------------------------------------------------

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        return b"".join(self._chunk(happened) for happened in events)

    def _chunk(self, happened: RequestEvent) -> bytes:
        match happened:
            case ChoiceStarted(choice):
                self._begin(happened)
                echo = self._choices[choice].begin(happened.prompt)
                return self._event(CompletionChoice(choice, echo, None)) if echo else b""
            case ChoiceOutput(choice, output):
                self._choices[choice].finish_reason = output.finish_reason
                if not output.text and not output.logprobs:
                    return b""
                probed = self._choices[choice].show(output.logprobs)
                return self._event(CompletionChoice(choice, output.text, None, probed))
            case Finished():
                self.take(happened)
                return self._last()
            case Failed():
                return error_event(happened.error)

    def _event(self, choice: CompletionChoice) -> bytes:
        return event(msgspec.structs.replace(self._empty, choices=[choice]))

    def _last(self) -> bytes:
        options = self._body.stream_options
        parts = [
            self._event(CompletionChoice(index, "", one.finish_reason))
            for index, one in enumerate(self._choices)
        ]
        if options is not None and options.include_usage:
            parts.append(event(self._with_usage(self._empty)))
        return b"".join([*parts, DONE])
