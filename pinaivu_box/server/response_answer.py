"""A response while it is made: events of a request in, events of its stream and its rows out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pinaivu_box.errors import ApiError
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceOutput, ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai.response_items import Event, ResponseItems
from pinaivu_box.openai.responses import (
    InputDetails,
    OutputDetails,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    stored_form,
)
from pinaivu_box.openai.tools import called
from pinaivu_box.server.choices import Choices
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.store import responses as stored
from pinaivu_box.store.responses import StoredResponse

# By finish reason; all others complete it.
_STATUS = {"length": "incomplete", "cancelled": "cancelled"}
# Of an item that may still grow, by the status of its response; all others leave it incomplete.
_STATUS_OF_ITEM = {"completed": "completed", "in_progress": "in_progress", "queued": "in_progress"}


class ResponseAnswer:
    """`take` the events of its request, or `encode` them.

    `asked` are the items of its input, as they are stored.  In the background it is told in its
    stored form from the beginning, so that it is the same whenever somebody asks.
    """

    def __init__(
        self, call: InferenceCall, body: ResponseRequest, asked: list[dict[str, Any]], job: Job
    ) -> None:
        self._call = call
        self._body = body
        self._asked = asked
        self._model_id = job.model.id
        known = called(body.tools or ())
        self._choices = Choices([job], [name for name, its in known.items() if its.custom])
        self._suffix = call.request_id.removeprefix("req_")
        self._items = ResponseItems(self._suffix, known)
        self._background = bool(body.background)
        self._status = "queued" if self._background else "in_progress"
        self._error: dict[str, Any] | None = None
        self._finish_reason = ""
        self._end: Finished | None = None
        self._numbers = 0

    @property
    def room(self) -> dict[str, int]:
        """What its key may have stored."""
        retention = self._call.box.config.retention
        return {
            "most": retention.responses_per_key,
            "most_bytes": round(retention.responses_mb_per_key * 1e6),
        }

    def queue(self) -> list[bytes]:
        """The first events of a stream of one in the background."""
        told = self.response()
        kinds = ("response.created", "response.queued")
        return self._encoded([{"type": kind, "response": told} for kind in kinds])

    def take(self, event: RequestEvent) -> list[Event]:
        """What a stream tells of it."""
        match event:
            case ChoiceStarted():
                self._choices.begin(event)
                self._status = "in_progress"
                begun = self.response()
                kinds = ("response.created", "response.in_progress")[self._background :]
                return [{"type": kind, "response": begun} for kind in kinds]
            case ChoiceOutput():
                part = self._choices.take(event)
                self._finish_reason = part.finish_reason or self._finish_reason
                return self._items.add(part.pieces)
            case Finished():
                self._settle(event)
                return self._last()
            case Failed(error):
                self._fail(error)
                return self._last()

    def stop(self, end: Finished | Failed, error: ApiError | None = None) -> list[bytes]:
        """Its last events if it was stopped: it is cancelled, or has failed with that error."""
        self._end = end if isinstance(end, Finished) else None
        self._status = "cancelled"
        if error is not None:
            self._fail(error)
        return self._encoded(self._last())

    def encode(self, events: Sequence[RequestEvent]) -> bytes:
        return b"".join(self.encode_each(events))

    def encode_each(self, events: Sequence[RequestEvent]) -> list[bytes]:
        """An entry for each event of the stream."""
        # Each is encoded before the next is made: what it says of the response grows afterwards.
        return [one for event in events for one in self._encoded(self.take(event))]

    async def keep(self, end: Finished) -> None:
        """Store it, unless the client does not want that; returns once it is on disk."""
        if self._body.store is False:
            return
        self._settle(end)
        await stored.insert(self._call.box.database, self.row(), **self.room)

    def row(self) -> StoredResponse:
        """As it is now."""
        response = self.response()
        return StoredResponse(
            response.id,
            self._call.key.account_id,
            response.previous_response_id,
            response.created_at * 1000,
            msgspec.json.encode(self._asked),
            msgspec.json.encode(stored_form(response)),
            self._call.key.id,
            response.status,
        )

    def response(self) -> ResponseObject:
        """As it is now.  Encode it before the next event is taken."""
        body, status = self._body, self._status
        text = msgspec.to_builtins(body.text) if body.text else {}
        reasoning = msgspec.to_builtins(body.reasoning) if body.reasoning else {}
        made = ResponseObject(
            id=f"resp_{self._suffix}",
            request_id=self._call.request_id,
            created_at=self._call.created_at,
            status=status,
            model=self._model_id,
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
        return stored_form(made) if self._background else made

    def _fail(self, error: ApiError) -> None:
        self._status = "failed"
        self._error = {"code": error.code, "message": error.message}

    def _settle(self, end: Finished) -> None:
        self._end = end
        self._status = _STATUS.get(self._finish_reason, "completed")

    def _last(self) -> list[Event]:
        status = self._status
        closed = self._items.close(_STATUS_OF_ITEM.get(status, "incomplete"))
        return [*closed, {"type": f"response.{status}", "response": self.response()}]

    def _encoded(self, events: Sequence[Event]) -> list[bytes]:
        made = []
        for one in events:
            whole = {**one, "sequence_number": self._numbers, "request_id": self._call.request_id}
            self._numbers += 1
            data = msgspec.json.encode(whole)
            made.append(b"event: " + one["type"].encode() + b"\ndata: " + data + b"\n\n")
        return made

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
