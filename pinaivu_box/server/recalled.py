"""The memories that a message is about, found by the box's embeddings or else by words."""

from __future__ import annotations

import asyncio
import logging

from pinaivu_box.box import Box
from pinaivu_box.chats import recall
from pinaivu_box.chats.memories import Memories
from pinaivu_box.errors import BoxError
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.memories import Memory
from pinaivu_box.server import own_requests
from pinaivu_box.store.keys import Key

log = logging.getLogger("pinaivu.memories")

_SECONDS = 3.0  # for the embeddings: then words have to do
_MAX_TEXT = 2_000  # characters of a message that are embedded
_MAX_NEW_VECTORS = 64  # for one message


def embedding_model(box: Box, key: Key) -> Model | None:
    """A model for embeddings that is loaded, and that the key may use."""
    loaded = box.placement.loaded
    for model in box.catalog.models:
        if model.id in loaded and key.policy.serves(model.id) and _embeds(model):
            return model
    return None


def _embeds(model: Model) -> bool:
    architecture = model.header.architecture
    return "bert" in architecture or "embed" in architecture or "embed" in model.id


async def recalled(box: Box, key: Key, memories: Memories, text: str) -> list[Memory]:
    """Those that the text is about, the most relevant first."""
    if (model := embedding_model(box, key)) is not None:
        try:
            async with asyncio.timeout(_SECONDS):
                return await _by_vectors(box, key, model, memories, text[:_MAX_TEXT])
        except (BoxError, TimeoutError) as error:
            log.info("memories are searched by words, for the embeddings failed: %s", error)
    every = await memories.ls()
    return await asyncio.to_thread(recall.by_words, every, text)


async def _by_vectors(
    box: Box, key: Key, model: Model, memories: Memories, text: str
) -> list[Memory]:
    known = await memories.with_vectors(model.id)
    if not known:
        return []
    new = [memory for memory, vector in known if not vector][:_MAX_NEW_VECTORS]
    wanted, *made = await own_requests.vectors(
        box, key, model, [text, *(memory.text for memory in new)]
    )
    for memory, vector in zip(new, made, strict=True):
        await memories.put_vector(memory, model.id, vector)
    vectors = {memory.id: vector for memory, vector in zip(new, made, strict=True)}
    all_known = [(memory, vectors.get(memory.id, vector)) for memory, vector in known]
    return await asyncio.to_thread(recall.by_vectors, all_known, wanted)
