"""`/v1/responses`: create one, also streamed or in the background, and what can be done with it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request

from pinaivu_box.errors import BadRequest, BodyTooLarge, InvalidBody, NotFound, quoted
from pinaivu_box.gateway.sizes import check_tools
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.response_input import as_items, as_messages, as_stored, referenced_id
from pinaivu_box.openai.responses import (
    DeletedResponse,
    FlatSchemaFormat,
    ItemList,
    ResponseObject,
    ResponseRequest,
    Retrieve,
    chat_choice,
)
from pinaivu_box.openai.tools import chat_tools, client_tools
from pinaivu_box.openai.types import ChatRequest, SchemaFormat, UserMessage
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.background import Background, BackgroundResponse, replayed
from pinaivu_box.server.context import box_of, request_id_of
from pinaivu_box.server.inference import InferenceCall, disconnected
from pinaivu_box.server.jobs import chat_job
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.response_answer import ResponseAnswer
from pinaivu_box.server.sse import EventStream, encode_event
from pinaivu_box.server.truncation import leading_system, truncated
from pinaivu_box.store import responses as stored
from pinaivu_box.store.responses import StoredResponse

_ITEM_ID = re.compile(r"(?:[a-z]+_)+?(?P<suffix>[0-9a-z]{26})(?:_in)?_[0-9]{1,6}")
_MAX_REFERENCED_RESPONSES = 16  # of one request


class _StoredFields(msgspec.Struct):
    """The fields of a stored response that are read here."""

    status: str
    request_id: str = ""
    background: bool = False


async def create_response(
    call: InferenceCall, body: ResponseRequest
) -> ResponseObject | EventStream:
    if body.background and body.store is False:
        message = "background needs store: what is not stored cannot be retrieved later"
        raise InvalidBody(message, loc=("body", "background"))
    if body.tools:  # the response contains them in several of its events
        check_tools(len(msgspec.json.encode(body.tools)))
    chat = _as_chat(body)
    check_chat(chat)
    items = await _resolve_references(call, as_items(body.input))
    messages = as_messages([*await _history(call, body), *items])
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    messages = _join_system_messages(messages)
    job = await call.seeing(replace(chat_job(chat, call.job(chat)), messages=messages))
    if body.reasoning and body.reasoning.effort not in (None, "none", "minimal"):
        call.thinking_field = "reasoning.effort"
    if body.truncation == "auto":
        job = await truncated(call, job)
    answer = ResponseAnswer(call, body, as_stored(items), job)
    if not body.background:
        return await call.answer([job], answer, stream=body.stream, settle=answer.keep)
    await call.start([job], background=True)
    response = await _background(call.request).start(call, answer)
    return response.follow(call.request, -1) if body.stream else response.response()


async def get_response(
    request: Request, response_id: str, query: Retrieve
) -> JSON[ResponseObject] | EventStream:
    if (running := _running(request, response_id)) is not None:
        if query.stream:
            return running.follow(request, query.starting_after)
        return JSON(running.response())
    row = await _find(request, response_id)
    if not query.stream:
        return JSON(msgspec.Raw(row.body))
    head = msgspec.json.decode(row.body, type=_StoredFields)
    if not head.background:
        raise BadRequest(
            f"The response '{row.id}' was not created with background, so it cannot be streamed "
            "again: get it without stream.",
            param="stream",
        )
    events = await stored.events_of(box_of(request).database, row.id, row.account_id)
    watcher = asyncio.create_task(disconnected(request.receive))
    if events is not None:
        return EventStream(replayed(events, query.starting_after), watcher)
    # The box was killed while it ran: only its end is known.
    return EventStream(_last_event(row, head, query.starting_after + 1), watcher)


async def _last_event(
    row: StoredResponse, head: _StoredFields, sequence_number: int
) -> AsyncIterator[bytes]:
    event = {
        "type": f"response.{head.status}",
        "response": msgspec.Raw(row.body),
        "sequence_number": sequence_number,
        "request_id": head.request_id,
    }
    yield encode_event(event, name=f"response.{head.status}")


async def cancel_response(request: Request, response_id: str) -> JSON[ResponseObject]:
    running = _running(request, response_id)
    if running is not None and not await running.cancel():
        return JSON(running.response())
    row = await _find(request, response_id)
    if not msgspec.json.decode(row.body, type=_StoredFields).background:
        raise BadRequest(
            f"The response '{row.id}' was not created with background, so it cannot be cancelled; "
            "to stop such a response, close its connection."
        )
    return JSON(msgspec.Raw(row.body))


async def list_input_items(request: Request, response_id: str) -> ItemList:
    row = await _find(request, response_id)
    items = msgspec.json.decode(row.input)
    newest_first = [{"id": f"{row.id}_in_{n}", **item} for n, item in enumerate(items)][::-1]
    ids = [item["id"] for item in newest_first]
    return ItemList(
        request_id=request_id_of(request),
        data=newest_first,
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=False,
    )


async def delete_response(request: Request, response_id: str) -> DeletedResponse:
    row = await _find(request, response_id)
    running = _running(request, response_id)
    await stored.delete(box_of(request).database, row.id, row.account_id)
    if running is not None:
        _background(request).forget(running)
        await running.cancel()
    return DeletedResponse(request_id_of(request), row.id)


def _background(request: Request) -> Background:
    background: Background = request.app.state.background
    return background


def _running(request: Request, response_id: str) -> BackgroundResponse | None:
    """The response if it runs in the background.  Call it before `_find`, or the response may end
    in between."""
    require_account(request)
    return _background(request).find(response_id, key_of(request).account_id)


async def _find(request: Request, response_id: str) -> StoredResponse:
    """Raises NotFound."""
    require_account(request)
    row = await stored.find(box_of(request).database, response_id, key_of(request).account_id)
    if row is None:
        raise _unknown(response_id)
    return row


def _unknown(response_id: str) -> NotFound:
    return NotFound(f"This account has no stored response '{response_id[:100]}'.")


async def _history(call: InferenceCall, body: ResponseRequest) -> list[dict[str, Any]]:
    """The items of the conversation before.  Raises NotFound."""
    previous = body.previous_response_id
    if previous is None:
        return []
    account, max_bytes = call.key.account_id, call.box.config.server.max_body_bytes
    size = await stored.conversation_size(call.box.database, previous, account, max_bytes)
    await call.bodies.reserve_history(call.request, account, size, max_bytes)
    rows = await stored.conversation(call.box.database, previous, account, max_bytes)
    if not rows:
        raise _unknown(previous)
    return await call.bodies.history(account, rows)


def _join_system_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the system messages at the beginning joined: templates accept one."""
    count = leading_system(messages)
    if count < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


async def _resolve_references(
    call: InferenceCall, items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replace references by the stored items that they name.  Raises NotFound, InvalidBody,
    BodyTooLarge."""
    known: dict[str, dict[str, Any]] = {}
    suffixes: set[str] = set()
    resolved: list[dict[str, Any]] = []
    remaining_bytes = call.box.config.server.max_body_bytes  # as if they were sent
    for number, item in enumerate(items):
        item_id = referenced_id(item)
        if item_id is None:
            resolved.append(item)
            continue
        match = _ITEM_ID.fullmatch(item_id)
        if match is not None and match["suffix"] not in suffixes:
            suffixes.add(match["suffix"])
            if len(suffixes) > _MAX_REFERENCED_RESPONSES:
                raise InvalidBody(
                    f"items of more than {_MAX_REFERENCED_RESPONSES} responses are referenced",
                    loc=("body", "input", number),
                )
            known |= await _items_of(call, f"resp_{match['suffix']}")
        if item_id not in known:
            raise NotFound(f"This account has no stored item '{quoted(item_id)}'.")
        remaining_bytes -= len(msgspec.json.encode(known[item_id]))
        if remaining_bytes < 0:
            raise BodyTooLarge("The referenced items are larger than a body may be.")
        resolved.append(known[item_id])
    return resolved


async def _items_of(call: InferenceCall, response_id: str) -> dict[str, dict[str, Any]]:
    """The items of a stored response by their ids."""
    account = call.key.account_id
    row = await stored.find(call.box.database, response_id, account)
    if row is None:
        return {}
    items = await call.bodies.history(account, [(row.input, row.body)])
    return {item.get("id") or f"{response_id}_in_{n}": item for n, item in enumerate(items)}


def _as_chat(body: ResponseRequest) -> ChatRequest:
    """The same request as a chat, without its messages."""
    text_format = body.text.format if body.text else None
    response_format = (
        SchemaFormat(text_format) if isinstance(text_format, FlatSchemaFormat) else text_format
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
        tool_choice=chat_choice(body.tool_choice, client_tools(tools)),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=response_format,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
