"""The transcript of a request that has ended, as `[receipts] transcripts` has it stored."""

from __future__ import annotations

from typing import Literal

from pinaivu_box.gateway.backend import Job, asked_text
from pinaivu_box.gateway.records import ChoiceRecord, RequestRecord
from pinaivu_box.receipts import transcript_sealing
from pinaivu_box.receipts.transcript import (
    LegTranscript,
    PromptTranscript,
    RequestTranscript,
    encode,
)
from pinaivu_box.store.keys import Key
from pinaivu_box.store.transcripts import StoredTranscript

Kept = Literal["none", "sealed", "plain"]


def to_store(record: RequestRecord, key: Key, kept: Kept) -> StoredTranscript | None:
    """What is stored of it, if anything.

    A key without a secret is that of an account's pages, whose chats are sealed with a key of the
    account's own: nothing of them is kept in another way.
    """
    if kept == "none" or not key.prefix:
        return None
    if kept == "sealed" and key.transcript_key is None:
        return None
    transcript = transcript_of(record)
    if transcript is None:
        return None
    body = encode(transcript)
    if kept == "plain" or key.transcript_key is None:
        return StoredTranscript(body)
    sealed = transcript_sealing.seal(body, key.transcript_key)
    return StoredTranscript(sealed, key.transcript_key)


def transcript_of(record: RequestRecord) -> RequestTranscript | None:
    """None of what nobody can audit: vectors, prompts with images (which are not kept), and answers
    of upstreams, whose tokens are not known."""
    job = record.job
    if not is_auditable(job):
        return None
    choices = [(choice, _legs(choice)) for choice in record.choices]
    legs = [leg for _, several in choices for leg in several]
    if not legs:
        return None
    prompts: dict[int, PromptTranscript] = {}
    for choice, several in choices:
        if several:
            prompts.setdefault(choice.job.prompt_number, _prompt(choice))
    return RequestTranscript(
        request_id=job.request_id,
        model=job.model.id,
        prompts=list(prompts.values()),
        legs=legs,
        tools=job.tools,
        constraint=job.constraint,
        template=job.template,
        system=_system(job),
    )


def is_auditable(job: Job) -> bool:
    """Whether what boxes make of such a job can be computed again from its tokens."""
    return job.inputs is None and not job.images


def _legs(choice: ChoiceRecord) -> list[LegTranscript]:
    return [
        LegTranscript(leg.job.choice, leg.job.leg, leg.tokens, "".join(leg.text))
        for leg in choice.served
        if leg.started.upstream is None
    ]


def _prompt(choice: ChoiceRecord) -> PromptTranscript:
    job, first = choice.job, choice.served[0]
    thinking = choice.thinking or job.thinking
    return PromptTranscript(job.prompt_number, asked_text(first.job), first.prompt or [], thinking)


def _system(job: Job) -> str:
    """The model's own system prompt, if the chat was given it."""
    return "" if job.rendered is job.messages else job.system
