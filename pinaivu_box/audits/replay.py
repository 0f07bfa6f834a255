"""An answer is computed again by an engine process, token by token (`engine.replay`)."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

from msgspec.structs import replace

from pinaivu_box.engine.messages import Add, Output, Prompt, Refused, ReplayedToken
from pinaivu_box.errors import EngineLost, by_code
from pinaivu_box.gateway.engine_process import EngineProcess, Item
from pinaivu_box.receipts.audit import ReplayedAnswer

TENANT = "audit"  # of what is computed again, in the engine's fair queue
_numbers = itertools.count(1)  # of sequences: a cancellation never meets a later one


@dataclass
class Recomputed:
    """What an engine has said of it: the `prompt` as it was read, the `text` of the tokens."""

    prompt: list[int] = field(default_factory=list)
    tokens: list[ReplayedToken] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    shifted_tokens: int = 0
    exactness: str = ""

    @property
    def answer(self) -> ReplayedAnswer:
        return ReplayedAnswer(self.tokens, self.finish_reason, self.exactness)

    def take(self, output: Output) -> None:
        self.tokens += output.replayed
        self.text += output.text
        self.shifted_tokens = output.shifted_tokens
        self.finish_reason = output.finish_reason or ""


async def compute_again(engine: EngineProcess, add: Add, tokens: list[int]) -> Recomputed:
    """Compute the output `tokens` of a request again.  If it is cancelled, the engine stops.

    Raises ApiError if the engine refuses it (ContextOverflow if it is too long for it), EngineLost.
    """
    request = replace(
        add,
        id=f"{TENANT}.{next(_numbers)}",
        replay=tokens,
        tenant=TENANT,
        scope="",
        named=False,
        echo=False,
        logprobs=None,
    )
    heard = Recomputed(exactness=engine.ready.exactness)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(item: Item) -> None:
        if not ended.done():
            _take(item, heard, ended)

    engine.submit(request, receive)
    try:
        await ended
    finally:
        if ended.cancelled():  # as this task is
            engine.cancel(request.id)
        engine.forget(request.id)
    return heard


def _take(item: Item, heard: Recomputed, ended: asyncio.Future[None]) -> None:
    match item:
        case Prompt():
            heard.prompt = item.tokens
        case Output():
            heard.take(item)
            if heard.finish_reason:
                ended.set_result(None)
        case Refused():
            ended.set_exception(by_code(item.code, item.message, item.param))
        case _:
            ended.set_exception(EngineLost("The engine died while it computed an answer again."))
