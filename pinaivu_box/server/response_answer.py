"""A response while it is made: its object, its stream and its row in the database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pinaivu_box.engine.messages import Output
from pinaivu_box.errors import ApiError
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai.reader import Reader
from pinaivu_box.openai.response_items import Event, ResponseItems
from pinaivu_box.openai.responses import (
    InputDetails,
    OutputDetails,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    stored_form,
)
from pinaivu_box.openai.tools import client_tools
from pinaivu_box.server.inference import InferenceCall, reader_of
from pinaivu_box.server.sse import encode_event
from pinaivu_box.store import responses as stored
from pinaivu_box.store.responses import StoredResponse

# By finish reason; all others mean "completed".
_STATUS = {"length": "incomplete", "cancelled": "cancelled"}
# Of an item that may still grow, by the status of its response; all others mean "incomplete".
_STATUS_OF_ITEM = {"completed": "completed", "in_progress": "in_progress", "queued": "in_progress"}


class ResponseAnswer:
    """Either `take` the events of the request, or `encode` them for a stream.

    `input_items` are stored with the response.  In the background it is shown in its stored form
    from the beginning, so that it looks the same whenever it is read.
    """

    def __init__(
        self,
        call: InferenceCall,
        body: ResponseRequest,
        input_items: list[dict[str, Any]],
        job: Job,
    ) -> None:
        self._call = call
        self._body = body
        self._input_items = input_items
        self._job = job
        self._tools = client_tools(body.tools or ())
        self._reader = Reader(None)  # until it is started
        self._suffix = call.request_id.removeprefix("req_")
        self._items = ResponseItems(self._suffix, self._tools)
        self._background = bool(body.background)
        self._status = "queued" if self._background else "in_progress"
        self._error: dict[str, Any] | None = None
        self._end: Finished | None = None
        self._next_sequence_number = 0

    @property
    def storage_limits(self) -> dict[str, int]:
        """The limits of what a key may store."""
        retention = self._call.box.config.retention
        return {
            "max_count": retention.responses_per_key,
            "max_bytes": round(retention.responses_mb_per_key * 1e6),
        }

    def queue(self) -> list[bytes]:
        """The first events of a stream in the background."""
        response = self.whole()
        kinds = ("response.created", "response.queued")
        return self._encode([{"type": kind, "response": response} for kind in kinds])

    def take(self, event: RequestEvent) -> list[Event]:
        """The events of the stream."""
        match event:
            case ChoiceStarted():
                custom_tools = [name for name, tool in self._tools.items() if tool.custom]
                self._reader = reader_of(self._job, event, custom_tools)
                self._status = "in_progress"
                response = self.whole()
                kinds = ("response.created", "response.in_progress")[self._background :]
                return [{"type": kind, "response": response} for kind in kinds]
            case Output():
                return self._items.add(self._reader.read(event))
            case Finished():
                self._settle(event)
                return self._last_events()
            case Failed(error):
                self._fail(error)
                return self._last_events()

    def stop(self, end: Finished | Failed, error: ApiError | None = None) -> list[bytes]:
        """The last events if it was stopped: it is cancelled, or has failed with `error`."""
        self._end = end if isinstance(end, Finished) else None
        self._status = "cancelled"
        if error is not None:
            self._fail(error)
        return self._encode(self._last_events())

    def encode(self, event: RequestEvent) -> bytes:
        return b"".join(self._encode(self.take(event)))

    def encode_each(self, events: Sequence[RequestEvent]) -> list[bytes]:
        """As `encode`, with an entry for each event of the stream."""
        # Each is encoded before the next is taken: it contains the response, which grows.
        return [data for event in events for data in self._encode(self.take(event))]

    async def keep(self, end: Finished) -> None:
        """Store it, unless `store` is false; returns once it is on disk."""
        if self._body.store is not False:
            self._settle(end)
            await self.insert()

    async def insert(self) -> None:
        """Store it as it is so far; returns once it is on disk."""
        await stored.insert(self._call.box.database, self.row(), **self.storage_limits)

    def row(self) -> StoredResponse:
        """As it is so far."""
        response = self.whole()
        return StoredResponse(
            response.id,
            self._call.key.account_id,
            response.previous_response_id,
            response.created_at * 1000,
            msgspec.json.encode(self._input_items),
            msgspec.json.encode(stored_form(response)),
            self._call.key.id,
            response.status,
        )

    def whole(self) -> ResponseObject:
        """As it is so far.  Encode it before the next event is taken."""
        body, status = self._body, self._status
        text = msgspec.to_builtins(body.text) if body.text else {}
        reasoning = msgspec.to_builtins(body.reasoning) if body.reasoning else {}
        response = ResponseObject(
            id=f"resp_{self._suffix}",
            request_id=self._call.request_id,
            created_at=self._call.created_at,
            status=status,
            model=self._job.model.id,
            output=self._items.settled(_STATUS_OF_ITEM.get(status, "incomplete")),
            usage=self._usage(),
            error=self._error,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
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
            truncation=body.truncation or "disabled",
            user=body.user,
            background=self._background,
            ignored_parameters=[name[:100] for name in self._call.ignored[:100]],
        )
        return stored_form(response) if self._background else response

    def _fail(self, error: ApiError) -> None:
        self._status = "failed"
        self._error = {"code": error.code, "message": error.message}

    def _settle(self, end: Finished) -> None:
        self._end = end
        self._status = _STATUS.get(self._reader.finish_reason, "completed")

    def _last_events(self) -> list[Event]:
        status = self._status
        item_events = self._items.close(_STATUS_OF_ITEM.get(status, "incomplete"))
        return [*item_events, {"type": f"response.{status}", "response": self.whole()}]

    def _encode(self, events: Sequence[Event]) -> list[bytes]:
        encoded = []
        for event in events:
            numbered = {
                **event,
                "sequence_number": self._next_sequence_number,
                "request_id": self._call.request_id,
            }
            self._next_sequence_number += 1
            encoded.append(encode_event(numbered, name=event["type"]))
        return encoded

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
