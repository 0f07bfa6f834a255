"""Whether a peer computed the prompt that it was asked to: its tokens are its own word.

They are part of what the peer signed, and an audit computes with them; so a prompt that was cut
short, or is longer than it was asked, gives the very answer that the proof says.  What it should be
is rendered and tokenized again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pinaivu_box.audits.from_answer import ask
from pinaivu_box.audits.replay import TENANT
from pinaivu_box.engine.messages import Add, Sampling, Tokenize
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.receipts.transcript import PromptTranscript, RequestTranscript

MAX_OTHER_TOKENS = 16  # in one place: templates write the date, which differs from box to box


async def other_prompts(engine: EngineProcess, transcript: RequestTranscript) -> set[int]:
    """The numbers of the prompts whose tokens are not those that the engine makes of them.  Raises
    ApiError, msgspec.MsgspecError."""
    return {
        prompt.prompt
        for prompt in transcript.prompts
        if are_others(prompt.tokens, await _tokens(engine, transcript, prompt))
    }


def are_others(tokens: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether they differ in more than a few tokens in one place."""
    shorter, longer = sorted((len(tokens), len(expected)))
    before = next((n for n in range(shorter) if tokens[n] != expected[n]), shorter)
    rest = shorter - before
    after = next((n for n in range(rest) if tokens[-1 - n] != expected[-1 - n]), rest)
    return longer - before - after > MAX_OTHER_TOKENS


async def _tokens(
    engine: EngineProcess, transcript: RequestTranscript, prompt: PromptTranscript
) -> list[int]:
    asked = msgspec.json.decode(prompt.asked, type=dict[str, Any])
    (text,) = asked.get("prompt") or [None]
    messages = asked["messages"]
    if transcript.system:
        messages = [{"role": "system", "content": transcript.system}, *messages]
    request = Add(
        transcript.request_id, messages, Sampling(), None, [], TENANT, prompt=text,
        tools=transcript.tools, template=transcript.template, suffix=asked.get("suffix", ""),
    )  # fmt: skip
    return (await ask(engine, Tokenize(request))).tokens
