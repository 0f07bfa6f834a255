"""`POST /v1/completions`: prompts without a chat template."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

from pinaivu_box.engine.messages import Output, TokenLogprob
from pinaivu_box.errors import InvalidBody
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    shown_likeliest,
    shown_token,
)
from pinaivu_box.openai.request import check_length, check_stream, texts_or_tokens
from pinaivu_box.receipts.commitment import new_nonce
from pinaivu_box.server import error_responses
from pinaivu_box.server.inference import InferenceCall, last_fields
from pinaivu_box.server.jobs import choices, job_of
from pinaivu_box.server.sse import (
    DONE,
    PLACEHOLDER,
    EventStream,
    around_text,
    encode_event,
    encode_json,
)

_DEFAULT_MAX_TOKENS = 16  # as OpenAI's, of this endpoint alone
_MAX_CHOICES = 128


async def create_completion(
    call: InferenceCall, body: CompletionRequest
) -> Completion | EventStream:
    prompts = _prompts(body)
    jobs = _jobs(body, prompts, call.job(body))
    return await call.answer(jobs, _CompletionAnswer(call, body, jobs), stream=body.stream)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Raises InvalidBody."""
    prompts = texts_or_tokens(body.prompt, "prompt", _MAX_CHOICES)
    if len(prompts) * (body.n or 1) > _MAX_CHOICES:
        raise InvalidBody(
            f"prompts times n are more than {_MAX_CHOICES} choices", loc=("body", "prompt")
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


def _jobs(body: CompletionRequest, prompts: list[str | list[int]], job: Job) -> list[Job]:
    common = replace(
        job_of(body, job),
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


def _max_tokens(requested: int | None) -> int | None:
    if requested is None:
        return _DEFAULT_MAX_TOKENS
    return None if requested < 0 else requested


class _CompletedChoice:
    """The output of one choice so far.  With echo it begins with the prompt."""

    def __init__(self, job: Job) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.has_logprobs = job.logprobs is not None
        self._job = job
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # in the text, of the next token
        self._at_prompt_start = job.echo

    def begin(self, prompt: str) -> str:
        """The text before the output; `prompt` is the prompt as the model has read it."""
        if not self._job.echo:
            return ""
        text = self._job.prompt if isinstance(self._job.prompt, str) else prompt
        # What a tokenizer adds before a prompt is not part of the text.
        self._offset = min(0, len(text) - len(prompt))
        return text

    def next_logprobs(self, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        """The log-probabilities of the next tokens, if they were asked for."""
        if self._job.logprobs is None:
            return None
        logprobs = CompletionLogprobs([], [], [], [])
        for token in tokens:
            likeliest = shown_likeliest(token.token, token.logprob, token.top)
            logprobs.tokens.append(shown_token(token.token))
            # The first token of a prompt has none.
            logprobs.token_logprobs.append(None if self._at_prompt_start else token.logprob)
            logprobs.top_logprobs.append(None if self._at_prompt_start else likeliest)
            logprobs.text_offset.append(max(0, self._offset))
            self._offset += len(self._decoder.decode(token.token))
            self._at_prompt_start = False
        return logprobs


class _CompletionAnswer:
    """See `inference.AnswerBuilder`."""

    def __init__(self, call: InferenceCall, body: CompletionRequest, jobs: list[Job]) -> None:
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._choices = [_CompletedChoice(job) for job in jobs]
        self._end: Finished
        # What stands around the text of a chunk, by choice: it is encoded only once.
        self._around_text: dict[int, tuple[bytes, bytes]] = {}
        self._fields = call.first_fields("cmpl-", "text_completion", jobs[0])
        if call.ignored:
            self._fields["ignored_parameters"] = call.ignored

    def take(self, event: RequestEvent) -> None:
        match event:
            case ChoiceStarted():
                self._choices[event.choice].texts.append(self._begin(event))
            case Output():
                choice = self._choices[event.choice]
                choice.texts.append(event.text)
                choice.logprobs += event.logprobs
                choice.finish_reason = event.finish_reason
            case Finished():
                self._end = event

    def whole(self) -> Completion:
        choices = [
            CompletionChoice(
                index,
                "".join(choice.texts),
                choice.finish_reason,
                choice.next_logprobs(choice.logprobs),
            )
            for index, choice in enumerate(self._choices)
        ]
        return Completion(**{**self._fields, **last_fields(self._end), "choices": choices})

    def encode(self, event: RequestEvent) -> bytes:
        match event:
            case ChoiceStarted():
                echo = self._begin(event)
                template = self._chunk(CompletionChoice(event.choice, PLACEHOLDER, None))
                self._around_text[event.choice] = around_text(template)
                return self._chunk(CompletionChoice(event.choice, echo, None)) if echo else b""
            case Output():
                choice = self._choices[event.choice]
                choice.finish_reason = event.finish_reason
                if event.text and not choice.has_logprobs:
                    before, after = self._around_text[event.choice]
                    return before + encode_json(event.text) + after
                if not event.text and not event.logprobs:
                    return b""
                logprobs = choice.next_logprobs(event.logprobs)
                return self._chunk(CompletionChoice(event.choice, event.text, None, logprobs))
            case Finished():
                return self._last_chunks(event)
            case Failed(error):
                return encode_event(error_responses.event(error))

    def _begin(self, event: ChoiceStarted) -> str:
        """Returns the text before the output of the choice."""
        self._fields["system_fingerprint"] = event.fingerprint
        return self._choices[event.choice].begin(event.prompt)

    def _chunk(self, choice: CompletionChoice) -> bytes:
        return encode_event({**self._fields, "choices": [choice]})

    def _last_chunks(self, end: Finished) -> bytes:
        chunks = [
            self._chunk(CompletionChoice(index, "", choice.finish_reason))
            for index, choice in enumerate(self._choices)
        ]
        if self._with_usage:
            chunks.append(encode_event({**self._fields, **last_fields(end)}))
        return b"".join([*chunks, DONE])
