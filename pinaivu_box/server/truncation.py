"""`truncation: "auto"` of a response: a conversation that is too long loses its oldest messages."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from typing import Any

import msgspec

from pinaivu_box.errors import ContextOverflow
from pinaivu_box.gateway.backend import Job
from pinaivu_box.server.inference import InferenceCall

_SYSTEM = ("system", "developer")
_MARGIN = 0.05  # of the messages, since the size in bytes only estimates that in tokens

Messages = list[dict[str, Any]]


async def truncated(call: InferenceCall, job: Job) -> Job:
    """The job with messages that fit into the model's context.

    If some had to be removed there is room for the answer too: for `max_tokens`, or else a quarter
    of the context, and never more than half.  A job that cannot be made to fit is returned as it
    is.  Raises what `InferenceCall.tokenize` does.
    """
    reserved = 0
    while True:
        try:
            prompt, context = await call.tokenize(job)
            if prompt.number < context - reserved:
                return job.with_prompt(prompt)
            reserved = min(job.max_tokens or context // 4, context // 2)
            fitting_share = (context - reserved) / prompt.number
        except ContextOverflow:
            fitting_share = 0.5
        shorter = without_oldest(job.messages, 1 - fitting_share + _MARGIN)
        if len(shorter) == len(job.messages):
            return job
        job = replace(job, messages=shorter)


def without_oldest(messages: Messages, share: float) -> Messages:
    """Remove the oldest messages: that share of their size, or a little more.

    Kept are system messages at the beginning, the user's last message, the last message of all, and
    results together with their call.  The first message after the system's is the user's again.
    """
    start = leading_system(messages)
    groups = _groups(messages[start:])
    sizes = [len(msgspec.json.encode(group)) for group in groups]
    users = [number for number, group in enumerate(groups) if group[0]["role"] == "user"]
    question = users[-1] if users else None
    bytes_to_remove, first = share * sum(sizes), 0
    while first < len(groups) - 1:
        answered = question is not None and first > question
        if bytes_to_remove <= 0 and (answered or question is None or first in users):
            break
        bytes_to_remove -= sizes[first] if first != question else 0
        first += 1
    remaining = groups[first:]
    if question is not None and question < first:
        remaining = [groups[question], *remaining]
    return [*messages[:start], *(message for group in remaining for message in group)]


def leading_system(messages: Messages) -> int:
    """The number of system messages at the beginning."""
    return sum(1 for _ in takewhile(lambda message: message["role"] in _SYSTEM, messages))


def _groups(messages: Messages) -> list[Messages]:
    """Each message with the tool results that follow it."""
    groups: list[Messages] = []
    for message in messages:
        if message["role"] == "tool" and groups:
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups
