"""The spans of a request that has ended, made from what is recorded of it.

Names and attributes are those of OpenTelemetry's semantic conventions for generative AI.  Nothing
that was asked or answered is in a span: no prompt, no output, no tool, no name of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pinaivu_box.engine.messages import Sampling
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.records import ChoiceRecord, FailedLeg, LegRecord, RequestRecord
from pinaivu_box.tracing.context import TraceContext
from pinaivu_box.tracing.span import Kind, Span, Value

PROVIDER = "pinaivu"
CLIENT_GONE = 499

Attributes = dict[str, Value | None]


class RequestSpans:
    """`address_of` is the host and port of an upstream, by its name."""

    def __init__(
        self,
        node_id: str,
        address_of: Callable[[str], tuple[str, int] | None],
        add: Callable[[Span], None],
    ) -> None:
        self._node_id, self._address_of, self._add = node_id, address_of, add

    def ended(self, record: RequestRecord, status: int, error: str) -> None:
        """Add the spans of a request, if it is traced; `error` is the code of its error."""
        context = record.job.request_trace
        if context is None:
            return
        ended = record.created + record.elapsed_ms() / 1000
        failed = error if status >= 400 and status != CLIENT_GONE else ""
        self._add(
            Span(
                context, _name(record.job), Kind.INTERNAL, context.began, ended,
                _request_attributes(record, error), failed,
            )
        )  # fmt: skip
        for choice in record.choices:
            self._add_legs(choice)

    def served_for_peer(self, leg: LegRecord, error: str) -> None:
        """Add the spans of a leg that was computed for a peer, if it is traced; `error` is the code
        of what the peer was refused with."""
        if leg.job.trace is not None:
            own, *parts = self._of_leg(leg, leg.job.trace)
            self._add(replace(own, name=_name(leg.job), kind=Kind.SERVER, error=error))
            for part in parts:
                self._add(part)

    def _add_legs(self, choice: ChoiceRecord) -> None:
        for failure in choice.failures:
            self._add_failure(failure)
        for leg in choice.legs:
            if leg.job.trace is not None:
                for span in self._of_leg(leg, leg.job.trace):
                    self._add(span)

    def _add_failure(self, failure: FailedLeg) -> None:
        job = failure.job
        if job.trace is None:
            return
        remote = failure.node_id != self._node_id
        kind = Kind.CLIENT if remote else Kind.INTERNAL
        attributes: Attributes = {
            "gen_ai.operation.name": _operation(job),
            "gen_ai.request.model": job.model.id,
            "pinaivu.node_id": failure.node_id,
        }
        name = _name(job) if remote else "leg"
        began, ended = job.trace.began, failure.ended
        self._add(Span(job.trace, name, kind, began, ended, attributes, failure.error))

    def _of_leg(self, leg: LegRecord, context: TraceContext) -> Iterator[Span]:
        upstream = leg.started.upstream
        remote = upstream is not None or leg.started.node_id != self._node_id
        address = self._address_of(upstream.upstream) if upstream is not None else None
        attributes: Attributes = {
            "gen_ai.operation.name": _operation(leg.job),
            "gen_ai.provider.name": upstream.upstream if upstream is not None else PROVIDER,
            "gen_ai.request.model": upstream.model if upstream is not None else leg.job.model.id,
            "gen_ai.usage.input_tokens": leg.prompt_tokens,
            "gen_ai.usage.output_tokens": leg.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": leg.cached_tokens,
            "gen_ai.response.finish_reasons": [leg.finish_reason],
            "server.address": address[0] if address else None,
            "server.port": address[1] if address else None,
            "pinaivu.node_id": leg.started.node_id,
            "pinaivu.leg": leg.job.leg,
            "pinaivu.choice": leg.job.choice,
        }
        ended = leg.started_at + leg.duration_ms / 1000
        name = _name(leg.job) if remote else "leg"
        kind = Kind.CLIENT if remote else Kind.INTERNAL
        yield Span(context, name, kind, context.began, ended, attributes)
        if leg.ttft_ms is None:
            return
        # An upstream says that it has begun with its first output; what it read before is its own.
        in_queue = leg.queue_ms / 1000
        queued = (context.began if upstream is not None else leg.started_at) + in_queue
        first = max(queued, leg.started_at + leg.ttft_ms / 1000)
        for part, began, end in (
            ("queue", context.began, queued),
            ("prompt", queued, first),
            ("generation", first, max(first, ended)),
        ):
            yield Span(context.child(), part, Kind.INTERNAL, began, end)


def _request_attributes(record: RequestRecord, error: str) -> Attributes:
    job = record.job
    sampling: Sampling | None = None
    if record.served:
        sampling = record.served[0].started.sampling
    return {
        "gen_ai.operation.name": _operation(job),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": job.model.id,
        "gen_ai.response.model": job.model.id if record.served else None,
        "gen_ai.response.id": job.request_id,
        "gen_ai.request.choice.count": len(record.choices) if len(record.choices) > 1 else None,
        "gen_ai.request.max_tokens": job.max_tokens,
        "gen_ai.request.temperature": sampling.temperature if sampling is not None else None,
        "gen_ai.request.top_p": sampling.top_p if sampling is not None else None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.finish_reasons": [
            choice.legs[-1].finish_reason for choice in record.choices if choice.legs
        ]
        or None,
        "pinaivu.error_code": error or None,
    }


def _operation(job: Job) -> str:
    if job.inputs is not None:
        return "embeddings"
    return "chat" if job.prompt is None else "text_completion"


def _name(job: Job) -> str:
    return f"{_operation(job)} {job.model.id}"
