"""`/v1/responses`: create, also as a stream of events, get, list its input, delete."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import BodyTooLarge, InvalidBody, NotFound, quoted
from pinaivu_box.gateway.requests import Begun, Failed, Finished, RequestEvent, Said
from pinaivu_box.gateway.sizes import check_tools
from pinaivu_box.openai.request import check_chat
from pinaivu_box.openai.response_items import Event, ResponseItems
from pinaivu_box.openai.response_tools import called, functions
from pinaivu_box.openai.responses import (
    ChosenCustom,
    ChosenFunction,
    DeletedResponse,
    FlatSchemaFormat,
    InputDetails,
    ItemList,
    OutputDetails,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    as_items,
    as_messages,
    as_stored,
    named_tool,
    referred,
    stored_form,
)
from pinaivu_box.openai.types import (
    ChatRequest,
    NamedSchema,
    SchemaFormat,
    UserMessage,
)
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.choices import Choices
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.inference import Call
from pinaivu_box.server.jobs import chat_job
from pinaivu_box.store import responses as stored
from pinaivu_box.store.responses import StoredResponse

_ITEM_ID = re.compile(r"(?:[a-z]+_)+?(?P<suffix>[0-9a-z]{26})(?:_in)?_[0-9]{1,6}")
_MOST_LOOKED_UP = 16
# By finish reason; all others complete it.
_STATUS = {"length": "incomplete", "cancelled": "cancelled"}


async def create(request: Request) -> Response:
    call = Call(request)
    body = await call.body(ResponseRequest)
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
    running = await call.start([job])
    answer = _Answer(call, body, as_stored(items), model.id, Choices([job]))
    if body.stream:
        return await call.stream(running, answer.encode, settle=answer.keep)
    async for event in call.collect(running):
        if isinstance(event, Finished):
            await answer.keep(event)
        answer.take(event)
    return JSON(answer.response())


async def get(request: Request) -> Response:
    found = await _find(request)
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
    await stored.delete(box.database, found.id, found.account_id)
    return JSON(DeletedResponse(request.scope["state"]["request_id"], found.id))


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


async def _history(call: Call, body: ResponseRequest) -> list[dict[str, Any]]:
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


async def _resolved(call: Call, given: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
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


async def _items_of(call: Call, response_id: str) -> dict[str, dict[str, Any]]:
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
    choice = body.tool_choice
    return ChatRequest(
        model=body.model,
        messages=[UserMessage(content="")],
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=body.max_output_tokens,
        tools=functions(body.tools or ()),
        tool_choice=(
            named_tool(choice) if isinstance(choice, ChosenFunction | ChosenCustom) else choice
        ),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=form,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


class _Answer:
    """One response while it is made: `take` events or `encode` them, then `keep` it."""

    def __init__(
        self,
        call: Call,
        body: ResponseRequest,
        asked: list[dict[str, Any]],
        model_id: str,
        choices: Choices,
    ) -> None:
        self._call = call
        self._body = body
        self._asked = asked
        self._model_id = model_id
        self._choices = choices
        self._suffix = call.request_id.removeprefix("req_")
        self._items = ResponseItems(self._suffix, called(body.tools or ()))
        self._finish_reason = ""
        self._end: Finished | None = None
        self._numbers = 0

    def take(self, event: RequestEvent) -> list[Event]:
        """What a stream tells of it."""
        match event:
            case Begun():
                self._choices.begin(event)
                begun = self._described("in_progress")
                kinds = ("response.created", "response.in_progress")
                return [{"type": kind, "response": begun} for kind in kinds]
            case Said():
                part = self._choices.take(event)
                self._finish_reason = part.finish_reason or self._finish_reason
                return self._items.add(part.pieces)
            case Finished():
                self._end = event
                response = self.response()
                closed = self._items.close(response.status)
                return [*closed, {"type": f"response.{response.status}", "response": response}]
            case Failed(error):
                failed = {"code": error.code, "message": error.message}
                return [{"type": "response.failed", "response": self._described("failed", failed)}]

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        parts = []
        # Each is encoded before the next is made: what it says of the response grows afterwards.
        for one in (one for event in events for one in self.take(event)):
            whole = {**one, "sequence_number": self._numbers, "request_id": self._call.request_id}
            self._numbers += 1
            data = msgspec.json.encode(whole)
            parts.append(b"event: " + one["type"].encode() + b"\ndata: " + data + b"\n\n")
        return b"".join(parts)

    async def keep(self, end: Finished) -> None:
        """Store it, unless the client does not want that; returns once it is on disk."""
        if self._body.store is False:
            return
        self._end = end
        response, retention = self.response(), self._call.box.config.retention
        await stored.insert(
            self._call.box.database,
            StoredResponse(
                response.id,
                self._call.key.account_id,
                response.previous_response_id,
                response.created_at * 1000,
                msgspec.json.encode(self._asked),
                msgspec.json.encode(stored_form(response)),
                self._call.key.id,
            ),
            most=retention.responses_per_key,
            most_bytes=round(retention.responses_mb_per_key * 1e6),
        )

    def response(self) -> ResponseObject:
        return self._described(_STATUS.get(self._finish_reason, "completed"))

    def _described(self, status: str, error: dict[str, Any] | None = None) -> ResponseObject:
        body = self._body
        incomplete = status == "incomplete"
        text = msgspec.to_builtins(body.text) if body.text else {}
        reasoning = msgspec.to_builtins(body.reasoning) if body.reasoning else {}
        return ResponseObject(
            id=f"resp_{self._suffix}",
            request_id=self._call.request_id,
            created_at=self._call.created_at,
            status=status,
            model=self._model_id,
            output=self._items.settled("in_progress" if status == "failed" else status),
            usage=self._usage(),
            error=error,
            incomplete_details={"reason": "max_output_tokens"} if incomplete else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning={"effort": None, "summary": None, **reasoning},
            service_tier="default" if body.service_tier else None,
            store=body.store is not False,
            temperature=body.temperature,
            text={**text, "format": text.get("format") or {"type": "text"}},
            tool_choice=msgspec.to_builtins(body.tool_choice or "auto"),
            tools=msgspec.to_builtins(body.tools or []),
            top_p=body.top_p,
            user=body.user,
            ignored_parameters=[name[:100] for name in self._call.ignored[:100]],
        )

    def _usage(self) -> ResponseUsage | None:
        end = self._end
        if end is None:
            return None
        return ResponseUsage(
            end.prompt_tokens,
            InputDetails(end.cached_tokens),
            end.completion_tokens,
            OutputDetails(),
            end.prompt_tokens + end.completion_tokens,
        )
