"""A span, and how OTLP's JSON encoding (1.x) writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgspec

from pinaivu_box.tracing.context import TraceContext

Value = str | bool | int | float | Sequence[str]
_SCOPE = "pinaivu_box"
_STATUS_ERROR = 2


class Kind(IntEnum):
    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


@dataclass(frozen=True)
class Span:
    """`began` and `ended` in Unix seconds; `error` is the code of what went wrong, "" if nothing
    did.  Attributes that are None are left out."""

    context: TraceContext
    name: str
    kind: Kind
    began: float
    ended: float
    attributes: Mapping[str, Value | None] = field(default_factory=dict)
    error: str = ""


def export_request(resource: Mapping[str, Value | None], spans: Sequence[Span]) -> bytes:
    """An `ExportTraceServiceRequest` as JSON."""
    scope = {"scope": {"name": _SCOPE}, "spans": [_span(span) for span in spans]}
    group = {"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}
    return msgspec.json.encode({"resourceSpans": [group]})


def _span(span: Span) -> dict[str, Any]:
    context = span.context
    attributes = {**span.attributes, "error.type": span.error or None}
    parent = {"parentSpanId": context.parent_id} if context.parent_id else {}
    status = {"status": {"code": _STATUS_ERROR}} if span.error else {}
    return {
        "traceId": context.trace_id,
        "spanId": context.span_id,
        **parent,
        "name": span.name,
        "kind": int(span.kind),
        # 64-bit integers are text in the JSON encoding of protobuf.
        "startTimeUnixNano": str(round(span.began * 1e9)),
        "endTimeUnixNano": str(round(max(span.began, span.ended) * 1e9)),
        "attributes": _attributes(attributes),
        **status,
    }


def _attributes(attributes: Mapping[str, Value | None]) -> list[dict[str, Any]]:
    return [
        {"key": name, "value": _value(value)}
        for name, value in attributes.items()
        if value is not None
    ]


def _value(value: Value) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
        case _:
            return {"arrayValue": {"values": [{"stringValue": each} for each in value]}}
