"""`truncation: "auto"` of a response: what is too long for the model loses its oldest messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from pinaivu_box.errors import ContextOverflow
from pinaivu_box.gateway.backend import Job
from pinaivu_box.server.inference import InferenceCall

_MORE = 0.05  # of the messages, since tokens are no characters

Messages = list[dict[str, Any]]


async def fitted(call: InferenceCall, job: Job) -> Job:
    """The job with messages that fit into the model's context, and have room for an answer if some
    had to go: as long as it may be, or else a quarter of the context, and never over half.  What
    cannot be made to fit is left as it is.  Raises what `InferenceCall.read` does."""
    room = 0
    while True:
        try:
            read, context = await call.read(job)
            tokens = len(read.read or ())
            if tokens < context - room:
                return read
            room = min(job.max_tokens or context // 4, context // 2)
            left = (context - room) / tokens
        except ContextOverflow:
            left = 0.5
        shorter = without_oldest(job.messages, 1 - left + _MORE)
        if len(shorter) == len(job.messages):
            return job
        job = replace(job, messages=shorter)


def without_oldest(messages: Messages, share: float) -> Messages:
    """Without the oldest, which make up that share of them or a little more.

    What stays: system messages at the beginning, the user's last message, the last message of all,
    and the results of a call together with it.  The first that stays is the user's again.
    """
    begin = 0
    while begin < len(messages) and messages[begin]["role"] in ("system", "developer"):
        begin += 1
    groups = _groups(messages[begin:])
    sizes = [len(msgspec.json.encode(group)) for group in groups]
    users = [place for place, group in enumerate(groups) if group[0]["role"] == "user"]
    question = users[-1] if users else None
    goes, at = share * sum(sizes), 0
    while at < len(groups) - 1:
        answered = question is not None and at > question
        if goes <= 0 and (answered or question is None or at in users):
            break
        goes -= sizes[at] if at != question else 0
        at += 1
    kept = groups[at:]
    if question is not None and question < at:
        kept = [groups[question], *kept]
    return [*messages[:begin], *(message for group in kept for message in group)]


def _groups(messages: Messages) -> list[Messages]:
    """Each message with the results that follow it."""
    groups: list[Messages] = []
    for message in messages:
        if message["role"] == "tool" and groups:
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups
