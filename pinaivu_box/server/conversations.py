"""`/v1/conversations`: an account's chats, which only its sessions can open."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pinaivu_box.chats import exports
from pinaivu_box.chats.conversations import MAX_CONVERSATION_BYTES, Chats
from pinaivu_box.errors import Conflict
from pinaivu_box.openai.conversations import (
    Conversation,
    ConversationChange,
    ConversationList,
    Deleted,
    ExportQuery,
    Imported,
    ListConversations,
    Message,
    MessageList,
    NewConversation,
    Portable,
)
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.bodies import Bodies
from pinaivu_box.server.context import box_of
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.running_answers import RunningAnswers
from pinaivu_box.server.unlocked import chats_of, memories_of
from pinaivu_box.text import encodable

MARKDOWN = "text/markdown"


def answers_of(request: Request) -> RunningAnswers:
    answers: RunningAnswers = request.app.state.answers
    return answers


async def list_conversations(request: Request, query: ListConversations) -> ConversationList:
    chats = await chats_of(request)
    if query.search.strip():
        return await chats.search(query.search, query.after, query.limit)
    return await chats.page(query.after, query.limit)


async def create_conversation(request: Request, body: NewConversation) -> Conversation:
    """Raises RowConflict if the account has as many as it may."""
    chats = await chats_of(request)
    title, system = encodable(body.title), encodable(body.system)
    return await chats.create(title, encodable(body.model), system, memory=body.memory)


async def get_conversation(request: Request, conversation_id: str) -> Conversation:
    return await (await chats_of(request)).get(conversation_id)


async def change_conversation(
    request: Request, conversation_id: str, body: ConversationChange
) -> Conversation:
    chats = await chats_of(request)
    if not isinstance(body.leaf, UnsetType):
        await chats.message(conversation_id, body.leaf)
    changes = {
        name: encodable(value) if isinstance(value, str) else value
        for name, value in msgspec.structs.asdict(body).items()
        if value is not UNSET
    }
    changed = await chats.change(
        conversation_id, lambda conversation: msgspec.structs.replace(conversation, **changes)
    )
    return changed.after


async def delete_conversation(request: Request, conversation_id: str) -> Deleted:
    chats = await chats_of(request)
    await chats.get(conversation_id)
    for running in answers_of(request).of_account(key_of(request).account_id):
        if running.conversation.id == conversation_id:
            await running.stop()
    await chats.delete(conversation_id)
    return Deleted(conversation_id)


async def list_messages(request: Request, conversation_id: str) -> MessageList:
    chats = await chats_of(request)
    conversation = await chats.get(conversation_id)
    return MessageList(await shown_messages(request, conversation_id), conversation.leaf)


async def shown_messages(request: Request, conversation_id: str) -> list[Message]:
    """All messages of a conversation as they are now, oldest first.  Their memory is reserved until
    the request ends.  Raises RateLimited, NoNodesAvailable."""
    account, chats = key_of(request).account_id, await chats_of(request)
    size = await chats.size(conversation_id)
    bodies: Bodies = request.app.state.bodies
    await bodies.reserve_chat_of(request, account, size, MAX_CONVERSATION_BYTES)
    return await _as_they_are(request, chats, conversation_id)


async def _as_they_are(request: Request, chats: Chats, conversation_id: str) -> list[Message]:
    answers, account = answers_of(request), key_of(request).account_id
    messages = await chats.messages(conversation_id)
    return [answers.shown(account, message) for message in messages]


async def export_conversation(
    request: Request, conversation_id: str, query: ExportQuery
) -> JSON[Portable] | Response:
    chats = await chats_of(request)
    conversation = await chats.get(conversation_id)
    messages = await shown_messages(request, conversation_id)
    if query.format == "markdown":
        text = exports.markdown(conversation, messages)
        headers = _as_file(conversation.title, "md")
        return Response(text.encode(), media_type=MARKDOWN, headers=headers)
    portable = exports.portable(conversation, messages)
    headers = _as_file(conversation.title, "json")
    return JSON(Portable("pinaivu-chats", 1, [portable]), headers=headers)


async def export_all(request: Request) -> JSON[Portable] | Response:
    """All conversations and memories, in the JSON that an import takes."""
    chats, memories = await chats_of(request), await memories_of(request)
    account, bodies = key_of(request).account_id, request.app.state.bodies

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"format":"pinaivu-chats","version":1,"conversations":['
        after: str | None = ""
        separator = b""
        while after is not None:
            page = await chats.page(after, 200)
            for conversation in page.data:
                size = await chats.size(conversation.id)
                release = await bodies.reserve_chat(account, size, MAX_CONVERSATION_BYTES)
                try:
                    messages = await _as_they_are(request, chats, conversation.id)
                    portable = exports.portable(conversation, messages)
                    del messages
                    yield separator + await asyncio.to_thread(msgspec.json.encode, portable)
                finally:
                    release()
                separator = b","
            after = page.next
        found = exports.portable_memories(await memories.ls())
        yield b'],"memories":' + msgspec.json.encode(found) + b"}"

    headers = _as_file("pinaivu-chats", "json")
    return StreamingResponse(parts(), media_type="application/json", headers=headers)


async def import_conversations(request: Request) -> Imported:
    """Of JSON, or of Markdown if the media type says so.

    Raises what `Bodies.receive` does, InvalidBody for messages that are no tree, Conflict while
    another import of the account runs.
    """
    chats, memories = await chats_of(request), await memories_of(request)
    max_bytes = box_of(request).config.server.max_body_bytes
    account = key_of(request).account_id
    bodies: Bodies = request.app.state.bodies
    if request.headers.get("content-type", "").split(";")[0].strip().lower() == MARKDOWN:
        body = await bodies.receive_markdown(request, account, max_bytes)
    else:
        body, _ = await bodies.receive(request, account, Portable, max_bytes, strict=False)
    importing: set[str] = request.app.state.importing
    if account in importing:
        raise Conflict("Another import of your account runs: wait for its end.")
    importing.add(account)
    try:
        return await exports.import_all(chats, memories, body)
    finally:
        importing.discard(account)


def _as_file(title: str, ending: str) -> dict[str, str]:
    """The header by which a browser saves an answer."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")[:60] or "conversation"
    return {"Content-Disposition": f'attachment; filename="{name}.{ending}"'}
