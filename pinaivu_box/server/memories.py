"""`/v1/memories`: what the box remembers of the user."""

from __future__ import annotations

from starlette.requests import Request

from pinaivu_box.chats.memories import tidy
from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai.conversations import Deleted
from pinaivu_box.openai.memories import Memory, MemoryList, MemorySettings, NewMemory
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of
from pinaivu_box.server.recalled import embedding_model
from pinaivu_box.server.unlocked import memories_of
from pinaivu_box.text import encodable


async def list_memories(request: Request) -> MemoryList:
    memories = await memories_of(request)
    embeds = embedding_model(box_of(request), key_of(request)) is not None
    enabled = await memories.enabled()
    return MemoryList(await memories.ls(), enabled, "embeddings" if embeds else "words")


async def create_memory(request: Request, body: NewMemory) -> Memory:
    """One that says the same already is returned instead."""
    memory, _ = await (await memories_of(request)).add(_text(body), "added")
    return memory


async def change_settings(request: Request, body: MemorySettings) -> MemoryList:
    await (await memories_of(request)).enable(enabled=body.enabled)
    return await list_memories(request)


async def change_memory(request: Request, memory_id: str, body: NewMemory) -> Memory:
    return await (await memories_of(request)).change(memory_id, _text(body))


async def delete_memory(request: Request, memory_id: str) -> Deleted:
    await (await memories_of(request)).delete(memory_id)
    return Deleted(memory_id)


def _text(body: NewMemory) -> str:
    """Raises InvalidBody."""
    if not (text := tidy(encodable(body.text))):
        raise InvalidBody("a memory has at least one character to read", loc=("body", "text"))
    return text
