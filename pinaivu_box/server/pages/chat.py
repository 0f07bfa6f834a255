"""`/chat` and `/memories`, and what the chat's script needs beside `/v1/conversations`: the same
messages and answers, with their Markdown as HTML."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.chats.conversations import branch
from pinaivu_box.openai.conversations import AnswerDelta, AnswerFinished, Message
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.conversations import answers_of, shown_messages
from pinaivu_box.server.inference import disconnected
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.running_answers import RunningAnswer
from pinaivu_box.server.sealed_data import get_sealed
from pinaivu_box.server.sessions import require_login
from pinaivu_box.server.sse import EventStream, encode_event
from pinaivu_box.server.unlocked import chats_of

# They load markdown-it and Pygments: imported by the first chat that is shown.
if TYPE_CHECKING:
    from pinaivu_box.server.pages.markdown import AnswerHtml, Blocks

_MAX_RENDERED = 1_000_000  # characters of one conversation, its newest; older answers stay text
_LONG = 10_000  # characters at once that the event loop does not render


class ShownMessage(Message, frozen=True):
    """`html`: the content, of answers of the branch that is shown."""

    html: str | None = None


class ShownMessages(Struct, frozen=True):
    """See `MessageList`."""

    data: list[ShownMessage]
    leaf: str | None
    object: str = "list"


async def chat(request: Request) -> HTMLResponse:
    """Raises LoginNeeded."""
    require_login(request)
    return page(request, "chat.html", seals=await get_sealed(request))


async def conversation(request: Request, conversation_id: str) -> HTMLResponse:
    """The same page: its script opens the conversation that the address names."""
    return await chat(request)


async def memories(request: Request) -> HTMLResponse:
    """Raises LoginNeeded."""
    require_login(request)
    return page(request, "memories.html", seals=await get_sealed(request))


async def messages(request: Request, conversation_id: str) -> ShownMessages:
    """As `GET /v1/conversations/{id}/messages`, with HTML.  Raises Locked, RowNotFound."""
    found = await (await chats_of(request)).get(conversation_id)
    stored = await shown_messages(request, conversation_id)
    return ShownMessages(await asyncio.to_thread(_rendered, stored, found.leaf), found.leaf)


def _rendered(stored: list[Message], leaf: str | None) -> list[ShownMessage]:
    from pinaivu_box.server.pages.markdown import render

    left = _MAX_RENDERED
    html: dict[str, str] = {}
    for message in reversed(branch(stored, leaf)):
        if message.role == "assistant" and message.status != "running":
            left -= len(message.content)
            if left < 0:
                break
            html[message.id] = render(message.content)
    return [
        ShownMessage(**msgspec.structs.asdict(message), html=html.get(message.id))
        for message in stored
    ]


async def follow_answer(request: Request, conversation_id: str, message_id: str) -> EventStream:
    """The events of an answer from its beginning: `blocks` (see `markdown.Blocks`) as often as a
    page can use them, and `finished` (see `AnswerFinished`).

    Raises Locked, RowNotFound, RateLimited.
    """
    chats = await chats_of(request)
    message = await chats.message(conversation_id, message_id)
    answers, account = answers_of(request), key_of(request).account_id
    if (running := answers.find(account, message_id)) is not None:
        running.check_followers()
        watcher = asyncio.create_task(disconnected(request.receive))
        return EventStream(_events(running, watcher), watcher)
    title = (await chats.get(conversation_id)).title
    finished = AnswerFinished(answers.shown(account, message), title)
    watcher = asyncio.create_task(disconnected(request.receive))
    return EventStream(_ended(finished), watcher)


async def _events(running: RunningAnswer, watcher: asyncio.Task[None]) -> AsyncIterator[bytes]:
    from pinaivu_box.server.pages.markdown import AnswerHtml

    answer = AnswerHtml()
    with running.followed(watcher):
        async for delta in running.deltas(watcher):
            if len(delta.text) > _LONG:
                blocks = await asyncio.to_thread(_updated, answer, delta)
            else:
                blocks = _updated(answer, delta)
            if blocks is not None:
                yield encode_event(blocks, name="blocks")
            await asyncio.wait(
                {running.task, watcher},
                timeout=answer.wait_seconds(),
                return_when=asyncio.FIRST_COMPLETED,
            )
        if watcher.done():
            return
        if (blocks := await asyncio.to_thread(answer.finish)) is not None:
            yield encode_event(blocks, name="blocks")
        finished = AnswerFinished(running.message, running.conversation.title)
        yield encode_event(finished, name="finished")


def _updated(answer: AnswerHtml, delta: AnswerDelta) -> Blocks | None:
    answer.text(delta.text)
    answer.thoughts(delta.reasoning)
    return answer.update()


async def _ended(finished: AnswerFinished) -> AsyncIterator[bytes]:
    if (blocks := await asyncio.to_thread(_whole, finished.answer)) is not None:
        yield encode_event(blocks, name="blocks")
    yield encode_event(finished, name="finished")


def _whole(message: Message) -> Blocks | None:
    from pinaivu_box.server.pages.markdown import AnswerHtml

    answer = AnswerHtml()
    answer.text(message.content)
    answer.thoughts(message.reasoning)
    return answer.finish()
