"""Asks models about chats while the box has nothing else to do: for facts about users, for titles.

One question at a time, by a request of the account's pages key, to the model that answered, if it
is loaded here.  It runs only while no other request does, and is stopped as soon as one comes; and
only while a session of the account holds the key of its chats.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, NamedTuple

import msgspec

from pinaivu_box.box import Box
from pinaivu_box.chats import extraction, titles
from pinaivu_box.chats.conversations import Chats
from pinaivu_box.chats.memories import Memories
from pinaivu_box.chats.sealing import RowSealer
from pinaivu_box.errors import BoxError, RowNotFound
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.idle_time import until_idle, while_idle
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.conversations import Conversation
from pinaivu_box.server import own_requests
from pinaivu_box.store import keys
from pinaivu_box.store.keys import Key

log = logging.getLogger("pinaivu.idle")

_MAX_WAITING = 100  # beyond that the oldest are dropped
_MAX_ATTEMPTS = 5  # of one that others interrupt


class Spoken(NamedTuple):
    """Which facts about the user are in what a user wrote, in a session, to a model."""

    key_id: str
    session_id: str
    model: str
    text: str

    async def asks(self, box: Box, sealer: RowSealer) -> dict[str, Any] | None:
        """The fields of a Job, or None if there is nothing to ask any more."""
        if not await Memories(box.database, sealer).enabled():
            return None
        return {
            "messages": extraction.messages(self.text),
            "max_tokens": extraction.MAX_TOKENS,
            "constraint": extraction.constraint(self.text),
        }

    async def take(self, box: Box, sealer: RowSealer, answer: str) -> None:
        """Store what the answer is good for."""
        memories = Memories(box.database, sealer)
        for fact in extraction.facts_in(answer, self.text):
            await memories.add(fact, "found")


class Untitled(NamedTuple):
    """What a conversation is called that began so, unless it is no longer called `title`."""

    key_id: str
    session_id: str
    model: str
    conversation_id: str
    title: str
    text: str  # see `titles.beginning`

    async def asks(self, box: Box, sealer: RowSealer) -> dict[str, Any] | None:
        try:
            conversation = await Chats(box.database, sealer).get(self.conversation_id)
        except RowNotFound:
            return None
        if conversation.title != self.title:
            return None
        return {
            "messages": titles.messages(self.text),
            "max_tokens": titles.MAX_TOKENS,
            "constraint": titles.CONSTRAINT,
        }

    async def take(self, box: Box, sealer: RowSealer, answer: str) -> None:
        title = titles.title_in(answer, self.text)
        if not title:
            return

        def change(conversation: Conversation) -> Conversation:
            renamed = conversation.title != self.title
            return conversation if renamed else msgspec.structs.replace(conversation, title=title)

        try:
            await Chats(box.database, sealer).change(self.conversation_id, change)
        except RowNotFound:
            return


IdleQuestion = Spoken | Untitled


class _Waiting(NamedTuple):
    question: IdleQuestion
    attempts: int = 0


class IdleWork:
    def __init__(self, box: Box) -> None:
        self._box = box
        self._waiting: deque[_Waiting] = deque(maxlen=_MAX_WAITING)
        self._task: asyncio.Task[None] | None = None

    def put(self, question: IdleQuestion) -> None:
        """Ask it once there is time."""
        self._waiting.append(_Waiting(question))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._waiting:
            await until_idle(lambda: bool(self._box.requests.count))
            question, attempts = self._waiting.popleft()
            try:
                if not await self._ask(question) and attempts + 1 < _MAX_ATTEMPTS:
                    self._waiting.append(_Waiting(question, attempts + 1))
            except BoxError as error:
                log.info("a question in idle time had no answer: %s", error)
            except Exception:
                log.exception("a question in idle time failed")

    async def _ask(self, question: IdleQuestion) -> bool:
        """False if another request has interrupted it."""
        box = self._box
        data_key = box.session_keys.get(question.session_id)
        key = await keys.get(box.database, question.key_id)
        model = box.catalog.get(question.model)
        if data_key is None or model is None or not self._may_run(key, model):
            return True
        sealer = RowSealer(key.account_id, data_key)
        if (fields := await question.asks(box, sealer)) is None:
            return True
        asking = own_requests.text(box, key, model, template={"enable_thinking": False}, **fields)
        if (answer := await while_idle(asking, lambda: box.requests.count > 1)) is None:
            return False
        if box.session_keys.get(question.session_id) is not None:  # not logged out meanwhile
            await question.take(box, sealer, answer[0])
        return True

    def _may_run(self, key: Key, model: Model) -> bool:
        return (
            refusal(key) is None
            and not self._box.admission.draining
            and model.id in self._box.placement.loaded
            and key.policy.serves(model.id)
        )
