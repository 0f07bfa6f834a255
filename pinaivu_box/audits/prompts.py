"""Whether a peer computed the prompt that it was asked to: its tokens are its own word.

They are part of what the peer signed, and an audit computes with them; so a prompt that was cut
short, or is longer than it was asked, gives the very answer that the proof says.  What it should be
is rendered and tokenized again here, which takes no context, whatever length the peer says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pinaivu_box.audits.from_answer import ask
from pinaivu_box.audits.replay import TENANT
from pinaivu_box.engine.messages import Add, Sampling, Tokenize, Tokenized
from pinaivu_box.errors import ApiError, EngineLost
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.receipts.transcript import PromptTranscript, RequestTranscript

MAX_OTHER_TOKENS = 16  # in one place: templates write the date, which differs from box to box


async def other_prompts(
    engine: EngineProcess, transcript: RequestTranscript, *, chats: bool = True
) -> set[int]:
    """The numbers of the prompts whose tokens are not those that the engine makes of them.  Without
    `chats` only prompts are looked at that no template has rendered.  What cannot be rendered here
    is not among them.  Raises EngineLost, msgspec.MsgspecError."""
    return {
        prompt.prompt
        for prompt in transcript.prompts
        if await _is_other(engine, transcript, prompt, chats=chats)
    }


async def _is_other(
    engine: EngineProcess, transcript: RequestTranscript, prompt: PromptTranscript, *, chats: bool
) -> bool:
    asked = msgspec.json.decode(prompt.asked, type=dict[str, Any])
    if asked["messages"] and not chats:
        return False
    try:
        read = await _read(engine, transcript, asked)
    except EngineLost:
        raise
    except ApiError:
        return False
    if are_others(prompt.tokens, read.tokens):
        return True
    # Who says that the model had begun to think keeps the output from its constraint.
    return prompt.tokens == read.tokens and prompt.thinking != read.thinking


def are_others(tokens: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether they differ in more than a few tokens in one place."""
    shorter, longer = sorted((len(tokens), len(expected)))
    before = next((n for n in range(shorter) if tokens[n] != expected[n]), shorter)
    rest = shorter - before
    after = next((n for n in range(rest) if tokens[-1 - n] != expected[-1 - n]), rest)
    return longer - before - after > MAX_OTHER_TOKENS


async def _read(
    engine: EngineProcess, transcript: RequestTranscript, asked: dict[str, Any]
) -> Tokenized:
    (text,) = asked.get("prompt") or [None]
    messages = asked["messages"]
    if transcript.system:
        messages = [{"role": "system", "content": transcript.system}, *messages]
    request = Add(
        transcript.request_id, messages, Sampling(), None, [], TENANT, prompt=text,
        tools=transcript.tools, template=transcript.template, suffix=asked.get("suffix", ""),
    )  # fmt: skip
    return await ask(engine, Tokenize(request))
