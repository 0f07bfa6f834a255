"""`/v1/conversations/{id}/answers`: ask a model, follow its answer, stop it.

The request is one of the account's pages key as any other: admitted, metered and receipted by the
same path as `/v1/chat/completions`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from msgspec import UnsetType
from starlette.requests import Request

from pinaivu_box.chats import extraction, titles
from pinaivu_box.chats.conversations import (
    MAX_CONVERSATION_BYTES,
    Changed,
    Chats,
    new_id,
    title_from,
)
from pinaivu_box.chats.memories import Memories
from pinaivu_box.chats.prompt import chat_messages
from pinaivu_box.chats.recall import telling_words
from pinaivu_box.chats.said import said_in
from pinaivu_box.errors import Conflict, Forbidden, InvalidBody
from pinaivu_box.gateway.backend import Job
from pinaivu_box.openai import conversations as wire
from pinaivu_box.openai.conversations import (
    AnswerRequest,
    AnswerStarted,
    Conversation,
    FollowAnswer,
    Message,
    Stopped,
    TextFile,
)
from pinaivu_box.openai.memories import Memory
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.types import ChatRequest
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.conversations import answers_of
from pinaivu_box.server.idle_work import IdleWork, Spoken, Untitled
from pinaivu_box.server.inference import InferenceCall, disconnected
from pinaivu_box.server.jobs import chat_job
from pinaivu_box.server.recalled import recalled
from pinaivu_box.server.running_answers import RunningAnswer
from pinaivu_box.server.sessions import require_session
from pinaivu_box.server.sse import EventStream, encode_event
from pinaivu_box.server.truncation import truncated
from pinaivu_box.server.unlocked import chats_of, memories_of
from pinaivu_box.store.times import now_ms
from pinaivu_box.text import encodable

# Bytes of messages above which it is looked whether they fit into the model's context.
_LONG = 8_000
_MAX_FORGOTTEN = 20  # memories, by one sentence
_MAX_SAID = 10  # sentences of one message to remember, and to forget


async def create_answer(
    call: InferenceCall, conversation_id: str, body: AnswerRequest
) -> EventStream:
    if "inference" not in call.key.policy.scopes:
        raise Forbidden("Your account may not run models: an admin can give it the scope.")
    request = call.request
    chats, memories = await chats_of(request), await memories_of(request)
    conversation = await chats.get(conversation_id)
    await chats.check_messages(conversation_id)
    model = encodable(body.model) or conversation.model
    if not model:
        raise InvalidBody("choose a model, for the conversation has none", loc=("body", "model"))
    path, message = _asked(body, *await _before(call, chats, conversation, body))
    uses_memory = conversation.memory and await memories.enabled()
    question = next(one for one in reversed(path) if one.role == "user")
    if message is not None and uses_memory:
        question = message = await _heard(memories, message)
        path[-1] = message
    notes = await recalled(call.box, call.key, memories, question.content) if uses_memory else []
    job = await _job(call, body, model, conversation, notes, path)
    await call.start([job], background=True)
    answer = Message(
        id=new_id("msg"),
        parent=question.id,
        role="assistant",
        created_at=max(now_ms(), question.created_at + 1),
        content="",
        status="running",
        model=job.model.id,
        request_id=call.request_id,
        memories=[memory.id for memory in notes],
    )
    try:
        stored = await _store(chats, conversation_id, model, message, answer)
    except BaseException:
        call.running.cancel()
        raise

    def ended(running: RunningAnswer) -> None:
        idle_work: IdleWork = request.app.state.idle_work
        asked = (key_of(request).id, require_session(request).session.id, job.model.id)
        if message is None:
            return
        if not stored.before.title and running.message.status == "complete":
            beginning = titles.beginning(message.content, running.message.content)
            idle_work.put(Untitled(*asked, conversation_id, stored.after.title, beginning))
        if uses_memory and extraction.clauses(message.content):
            idle_work.put(Spoken(*asked, message.content))

    running = RunningAnswer(call, job, chats, stored.after, answer, ended)
    answers_of(request).start(call, running)
    return running.follow(request, AnswerStarted(conversation_id, message, answer))


async def _before(
    call: InferenceCall, chats: Chats, conversation: Conversation, body: AnswerRequest
) -> tuple[str | None, list[Message]]:
    """The message after which the answer or the new message comes, and the branch up to it; its
    memory is reserved with the body's.  Raises InvalidBody, RateLimited, NoNodesAvailable."""
    parent = conversation.leaf if isinstance(body.parent, UnsetType) else body.parent
    if parent is None:
        return None, []
    size = await chats.branch_size(conversation.id, parent)
    account = call.key.account_id
    await call.bodies.reserve_chat_of(call.request, account, size, MAX_CONVERSATION_BYTES)
    path = await chats.branch(conversation.id, parent)
    if not path:
        raise InvalidBody("the conversation has no such message", loc=("body", "parent"))
    return parent, path


def _asked(
    body: AnswerRequest, parent: str | None, path: list[Message]
) -> tuple[list[Message], Message | None]:
    """The branch up to the user's message that is to be answered, and that message if it is new.
    Raises Conflict."""
    if body.content or body.files or body.images:
        message = Message(
            id=new_id("msg"),
            parent=parent,
            role="user",
            created_at=max([now_ms(), *(one.created_at + 1 for one in path[-1:])]),
            content=encodable(body.content),
            files=[TextFile(encodable(file.name), encodable(file.text)) for file in body.files],
            images=body.images,
        )
        return [*path, message], message
    while path and path[-1].role != "user":
        path.pop()
    if not path:
        raise Conflict("There is no message to answer yet: send one with 'content'.")
    return path, None


async def _heard(memories: Memories, message: Message) -> Message:
    """The user's message, after what it asks to remember and to forget was done."""
    said = said_in(message.content)
    if forget := said.forget[:_MAX_SAID]:
        found = await asyncio.to_thread(_matching, await memories.ls(), forget)
        await memories.delete_some(found)
    if not (remember := said.remember[:_MAX_SAID]):
        return message
    now = now_ms()
    added = await memories.add_all([(what, now) for what in remember], "said")
    # One that there was no room for is left out; the list is full, and shows it.
    ids = [memory.id for memory, _ in added if memory is not None]
    return msgspec.structs.replace(message, remembered=ids)


def _matching(memories: list[Memory], forget: list[str]) -> list[str]:
    """The ids of those that have all telling words of something to forget."""
    known = [(memory.id, set(telling_words(memory.text))) for memory in memories]
    found: list[str] = []
    for what in forget:
        if words := set(telling_words(what)):
            found += [one for one, own in known if words <= own][:_MAX_FORGOTTEN]
    return list(dict.fromkeys(found))


async def _job(
    call: InferenceCall,
    body: AnswerRequest,
    model: str,
    conversation: Conversation,
    notes: list[Memory],
    path: list[Message],
) -> Job:
    """Raises what `/v1/chat/completions` does."""
    chat = ChatRequest(
        model=model,
        messages=[],
        max_completion_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        reasoning_effort=body.reasoning_effort,
    )
    base = call.job(chat)
    # Notes make a system prompt, which would replace the one that the model's publisher recommends.
    system = conversation.system or (base.system if notes else "")
    chat = msgspec.structs.replace(chat, messages=chat_messages(system, notes, path))
    check_chat(chat)
    job = chat_job(chat, base)
    if sum(len(message.content) for message in path) > _LONG:
        job = await truncated(call, await call.seeing(job))
    return job


async def _store(
    chats: Chats,
    conversation_id: str,
    model: str,
    message: Message | None,
    answer: Message,
) -> Changed:
    """Store the new messages, and what they change in the conversation, which is the newest from
    now on.  Raises RowNotFound if it was deleted meanwhile."""

    def change(conversation: Conversation) -> Conversation:
        title = conversation.title
        if not title and message is not None:
            names = ", ".join(file.name for file in message.files)
            title = title_from(message.content or names) or "Images"
        return msgspec.structs.replace(
            conversation, model=model, title=title, leaf=answer.id, updated_at=now_ms()
        )

    return await chats.change(
        conversation_id, change, [answer] if message is None else [message, answer]
    )


async def follow_answer(
    request: Request, conversation_id: str, message_id: str, query: FollowAnswer
) -> EventStream:
    chats = await chats_of(request)
    message = await chats.message(conversation_id, message_id)
    running = answers_of(request).find(key_of(request).account_id, message_id)
    if running is not None:
        started = AnswerStarted(conversation_id, None, running.message)
        return running.follow(request, started, query.offset)
    conversation = await chats.get(conversation_id)
    message = answers_of(request).shown(key_of(request).account_id, message)
    watcher = asyncio.create_task(disconnected(request.receive))
    return EventStream(_replayed(conversation, message, query.offset), watcher)


async def _replayed(
    conversation: Conversation, message: Message, offset: str
) -> AsyncIterator[bytes]:
    """The events of an answer that has ended."""
    thoughts, text = map(int, offset.split("."))
    begun = msgspec.structs.replace(message, content="", reasoning="")
    yield encode_event(AnswerStarted(conversation.id, None, begun))
    reasoning, added = message.reasoning[thoughts:], message.content[text:]
    if reasoning or added:
        end = f"{len(message.reasoning)}.{len(message.content)}"
        yield encode_event(wire.AnswerDelta(end, added, reasoning))
    yield encode_event(wire.AnswerFinished(message, conversation.title))


async def stop_answer(request: Request, conversation_id: str, message_id: str) -> Stopped:
    chats = await chats_of(request)
    await chats.message(conversation_id, message_id)
    running = answers_of(request).find(key_of(request).account_id, message_id)
    return Stopped(message_id, running is not None and await running.stop())
