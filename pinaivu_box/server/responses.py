"""`/v1/responses`: create, also as a stream of events or in the background, get, cancel, list its
input, delete."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import BadRequest, BodyTooLarge, InvalidBody, NotFound, quoted
from pinaivu_box.gateway.request import Finished
from pinaivu_box.gateway.request import Request as Running
from pinaivu_box.gateway.sizes import check_tools
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.responses import (
    DeletedResponse,
    FlatSchemaFormat,
    ItemList,
    ResponseRequest,
    Retrieve,
    as_items,
    as_messages,
    as_stored,
    chat_choice,
    referred,
)
from pinaivu_box.openai.tools import called, chat_tools
from pinaivu_box.openai.types import (
    ChatRequest,
    NamedSchema,
    SchemaFormat,
    UserMessage,
)
from pinaivu_box.server.admin import query
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.background import Background, BackgroundResponse, replayed
from pinaivu_box.server.bodies import take_room
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import InferenceCall, disconnected
from pinaivu_box.server.jobs import chat_job
from pinaivu_box.server.response_answer import ResponseAnswer
from pinaivu_box.server.stream import EventStream
from pinaivu_box.server.truncation import fitted
from pinaivu_box.store import responses as stored
from pinaivu_box.store.responses import StoredResponse

_ITEM_ID = re.compile(r"(?:[a-z]+_)+?(?P<suffix>[0-9a-z]{26})(?:_in)?_[0-9]{1,6}")
_MOST_LOOKED_UP = 16
_EVENTS = "text/event-stream"


class _Stored(msgspec.Struct):
    """What of a stored body is looked at."""

    status: str
    request_id: str = ""
    background: bool = False


async def create(request: Request) -> Response:
    call = InferenceCall(request)
    body = await call.body(ResponseRequest)
    if body.background and body.store is False:
        why = "background needs store: what is not stored cannot be asked for later"
        raise InvalidBody(why, loc=("body", "background"))
    if body.tools:  # the answer shows them in several of its events, called or not
        check_tools(len(msgspec.json.encode(body.tools)))
    chat = _as_chat(body)
    check_chat(chat)
    items = as_items(await _resolved(call, body.input))
    messages = as_messages([*await _history(call, body), *items])
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    messages = _joined(messages)
    model = call.admit(body.model)
    job = replace(chat_job(chat, model, call.request_id, call.key.id), messages=messages)
    if body.reasoning and body.reasoning.effort not in (None, "none", "minimal"):
        call.wants_thoughts("reasoning.effort")
    if body.truncation == "auto":
        job = await fitted(call, job)
    running = await call.start([job], background=bool(body.background))
    answer = ResponseAnswer(call, body, as_stored(items), job)
    if body.background:
        made = await _in_background(request, call, running, answer)
        return made.follow(request, -1) if body.stream else JSON(made.shown())
    if body.stream:
        return await call.stream(running, answer.encode, settle=answer.keep)
    async for event in call.collect(running):
        if isinstance(event, Finished):
            await answer.keep(event)
        answer.take(event)
    return JSON(answer.response())


async def _in_background(
    request: Request, call: InferenceCall, running: Running, answer: ResponseAnswer
) -> BackgroundResponse:
    # Its body is held until it has ended, not until it is answered.
    leave = take_room(request)
    try:
        made = BackgroundResponse(call, running, answer, leave)
        await stored.insert(call.box.database, answer.row(), **answer.room)
    except BaseException:
        running.cancel()
        leave()
        raise
    background: Background = request.app.state.background
    background.start(made)
    return made


async def get(request: Request) -> Response:
    asked = query(request, Retrieve)
    if (running := _running(request)) is not None:
        if asked.stream:
            return running.follow(request, asked.starting_after)
        return JSON(running.shown())
    found = await _find(request)
    if not asked.stream:
        return Response(found.body, media_type="application/json")
    its = msgspec.json.decode(found.body, type=_Stored)
    if not its.background:
        raise BadRequest(
            f"The response '{found.id}' was not created with background, and only those are "
            "streamed again: get it without stream.",
            param="stream",
        )
    box: Box = request.app.state.box
    events = await stored.events_of(box.database, found.id, found.account_id)
    if events is not None:
        leaving = asyncio.create_task(disconnected(request.receive))
        return EventStream(replayed(events, asked.starting_after), leaving)
    # The box was killed: nothing but its end is known.
    data = {
        "type": f"response.{its.status}",
        "response": msgspec.Raw(found.body),
        "sequence_number": asked.starting_after + 1,
        "request_id": its.request_id,
    }
    said = b"event: response.%b\ndata: %b\n\n" % (its.status.encode(), msgspec.json.encode(data))
    return Response(said, media_type=_EVENTS)


async def cancel(request: Request) -> Response:
    running = _running(request)
    if running is not None and not await running.cancel():
        return JSON(running.shown())
    found = await _find(request)
    if not msgspec.json.decode(found.body, type=_Stored).background:
        raise BadRequest(
            f"The response '{found.id}' was not created with background, and only those can be "
            "cancelled; to stop another one, close its connection."
        )
    return Response(found.body, media_type="application/json")


async def input_items(request: Request) -> Response:
    found = await _find(request)
    items = msgspec.json.decode(found.input)
    listed = [{"id": f"{found.id}_in_{n}", **item} for n, item in enumerate(items)][::-1]
    ids = [item["id"] for item in listed]
    return JSON(
        ItemList(
            request_id=request.scope["state"]["request_id"],
            data=listed,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=False,
        )
    )


async def delete(request: Request) -> Response:
    found = await _find(request)
    box: Box = request.app.state.box
    running = _running(request)
    await stored.delete(box.database, found.id, found.account_id)
    if running is not None:
        background: Background = request.app.state.background
        background.forget(running)
        await running.cancel()
    return JSON(DeletedResponse(request.scope["state"]["request_id"], found.id))


def _running(request: Request) -> BackgroundResponse | None:
    """The response if it runs in the background.  To be asked before `_find`, or it may end in
    between."""
    require_account(request)
    background: Background = request.app.state.background
    return background.find(request.path_params["response_id"], key_of(request).account_id)


async def _find(request: Request) -> StoredResponse:
    require_account(request)
    box: Box = request.app.state.box
    response_id = request.path_params["response_id"]
    found = await stored.find(box.database, response_id, key_of(request).account_id)
    if found is None:
        raise _unknown(response_id)
    return found


def _unknown(response_id: str) -> NotFound:
    return NotFound(f"This account has no stored response '{response_id[:100]}'.")


async def _history(call: InferenceCall, body: ResponseRequest) -> list[dict[str, Any]]:
    previous = body.previous_response_id
    if previous is None:
        return []
    account, most = call.key.account_id, call.box.config.server.max_body_bytes
    size = await stored.conversation_size(call.box.database, previous, account, most)
    await call.make_room(size)
    found = await stored.conversation(call.box.database, previous, account, most)
    if not found:
        raise _unknown(previous)
    return await call.bodies.history(account, found)


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With one system message at the beginning, where there are several: templates know one."""
    count = 0
    while count < len(messages) and messages[count]["role"] in ("system", "developer"):
        count += 1
    if count < 2:
        return messages
    text = "\n\n".join(one["content"] for one in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


async def _resolved(
    call: InferenceCall, given: str | list[dict[str, Any]]
) -> str | list[dict[str, Any]]:
    """With the items in the place of what refers to them.  Raises NotFound, InvalidBody."""
    if isinstance(given, str):
        return given
    found: dict[str, dict[str, Any]] = {}
    looked: set[str] = set()
    made: list[dict[str, Any]] = []
    room = call.box.config.server.max_body_bytes  # as if they were sent
    for number, item in enumerate(given):
        wanted = referred(item)
        if wanted is None:
            made.append(item)
            continue
        match = _ITEM_ID.fullmatch(wanted)
        if match is not None and match["suffix"] not in looked:
            looked.add(match["suffix"])
            if len(looked) > _MOST_LOOKED_UP:
                raise InvalidBody(
                    f"items of more than {_MOST_LOOKED_UP} responses are referred to",
                    loc=("body", "input", number),
                )
            found |= await _items_of(call, f"resp_{match['suffix']}")
        if wanted not in found:
            raise NotFound(f"This account has no stored item '{quoted(wanted)}'.")
        room -= len(msgspec.json.encode(found[wanted]))
        if room < 0:
            raise BodyTooLarge("The items that are referred to are larger than a body may be.")
        made.append(found[wanted])
    return made


async def _items_of(call: InferenceCall, response_id: str) -> dict[str, dict[str, Any]]:
    """The items of a stored response by their ids."""
    account = call.key.account_id
    one = await stored.find(call.box.database, response_id, account)
    if one is None:
        return {}
    items = await call.bodies.history(account, [(one.input, one.body)])
    return {item.get("id") or f"{response_id}_in_{n}": item for n, item in enumerate(items)}


def _as_chat(body: ResponseRequest) -> ChatRequest:
    """The same as a chat request, but for its messages."""
    asked = body.text.format if body.text else None
    form = (
        SchemaFormat(NamedSchema(asked.name, asked.schema, asked.description, asked.strict))
        if isinstance(asked, FlatSchemaFormat)
        else asked
    )
    tools = body.tools or ()
    return ChatRequest(
        model=body.model,
        messages=[UserMessage(content="")],
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=body.max_output_tokens,
        tools=chat_tools(tools),
        tool_choice=chat_choice(body.tool_choice, called(tools)),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=form,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
