"""What models are asked in idle time: for facts in what a user wrote, and for a title."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from pinaivu_box.box import Box
from pinaivu_box.chats import extraction, titles
from pinaivu_box.chats.conversations import Chats
from pinaivu_box.chats.memories import Memories
from pinaivu_box.chats.sealing import RowSealer
from pinaivu_box.errors import RowNotFound
from pinaivu_box.openai.conversations import Conversation


class Spoken(NamedTuple):
    """Which facts about the user are in what a user wrote, in a session, to a model."""

    key_id: str
    session_id: str
    model: str
    text: str

    async def asks(self, box: Box, sealer: RowSealer) -> dict[str, Any] | None:
        if not await Memories(box.database, sealer).enabled():
            return None
        return {
            "messages": extraction.messages(self.text),
            "max_tokens": extraction.MAX_TOKENS,
            "constraint": extraction.constraint(self.text),
        }

    async def take(self, box: Box, sealer: RowSealer, answer: str) -> None:
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
