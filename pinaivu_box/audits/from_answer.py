"""A transcript made of what a client has kept: its request, and the text of the answer.

An engine renders and tokenizes the prompts anew.  A text can be read as other tokens than those
that the model drew, so its tokens are compared with the digest in the receipt's opening: with the
stop string that has ended it, or an end token, which are in no text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.audits.replay import TENANT
from pinaivu_box.engine.messages import Add, Embed, Refused, Sampling, Tokenize, Tokenized
from pinaivu_box.errors import EngineLost, by_code
from pinaivu_box.gateway.backend import Job, asked_text
from pinaivu_box.gateway.engine_process import EngineProcess, Item
from pinaivu_box.gateway.local import request_of
from pinaivu_box.receipts.commitment import tokens_sha256
from pinaivu_box.receipts.transcript import LegTranscript, PromptTranscript, RequestTranscript


async def transcript_from(
    engine: EngineProcess,
    prompts: Sequence[Job],
    texts: Mapping[int, str],
    legs: Sequence[LegToAudit],
) -> RequestTranscript:
    """Of the jobs of a request's prompts, and the `texts` of its choices, which one leg each has
    made.  A leg whose tokens are not found is not in it.  Raises ApiError."""
    job = prompts[0]
    return RequestTranscript(
        request_id=job.request_id,
        model=job.model.id,
        prompts=[await _prompt(engine, each) for each in prompts],
        legs=[
            made
            for leg in legs
            if (made := await _leg(engine, job, texts.get(leg.proof.choice), leg)) is not None
        ],
        tools=job.tools,
        constraint=job.constraint,
        template=job.template,
        system="" if job.rendered is job.messages else job.system,
    )


async def _prompt(engine: EngineProcess, job: Job) -> PromptTranscript:
    request = msgspec.structs.replace(request_of(job, Sampling()), tenant=TENANT)
    read = await ask(engine, Tokenize(request))
    return PromptTranscript(job.prompt_number, asked_text(job), read.tokens, read.thinking)


async def _leg(
    engine: EngineProcess, job: Job, text: str | None, leg: LegToAudit
) -> LegTranscript | None:
    proof = leg.proof
    if text is None or proof.leg:
        return None
    async for tokens in _readings(engine, text, job.stop):
        if tokens_sha256(tokens) == leg.output.tokens_sha256:
            return LegTranscript(proof.choice, proof.leg, tokens, text)
    return None


async def _readings(
    engine: EngineProcess, text: str, stop: Sequence[str]
) -> AsyncIterator[list[int]]:
    """The tokens that the text may have been."""
    for ending in ("", *stop):
        read = await ask(engine, Tokenize(_plain(text + ending), plain=True))
        yield read.tokens
        for end in [] if ending else read.ends:
            yield [*read.tokens, end]


def _plain(text: str) -> Add:
    return Add("text", [], Sampling(), None, [], TENANT, prompt=text)


async def ask(engine: EngineProcess, question: Tokenize) -> Tokenized:
    """The engine's answer.  Raises ApiError."""
    answered: asyncio.Future[Item] = asyncio.get_running_loop().create_future()
    request: Add | Embed = question.request

    def receive(item: Item) -> None:
        if not answered.done():
            answered.set_result(item)

    engine.submit(question, receive)
    try:
        item = await answered
    finally:
        engine.forget(request.id)
    if isinstance(item, Tokenized):
        return item
    if isinstance(item, Refused):
        raise by_code(item.code, item.message, item.param)
    raise EngineLost("The engine died while it read the text.")
