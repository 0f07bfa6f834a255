"""A job as it goes to another box, and back into a job there."""

from __future__ import annotations

from typing import Any

from pinaivu_box.engine.messages import SamplingDefaults
from pinaivu_box.errors import InvalidBody, NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.sizes import check_sizes
from pinaivu_box.legs.wire import MAX_CALLS, MAX_MESSAGES, SAMPLING_FIELDS, Task
from pinaivu_box.models.catalog import Model

_SAME = tuple(
    name
    for name in Task.__struct_fields__
    if name not in ("model", "asked", "read", "settled", "tag", *SAMPLING_FIELDS)
)


def to_task(job: Job, tag: str | None = None) -> Task:
    """`tag` is the peer's name of the job's scope.  Raises NoNodesAvailable for what no peer
    takes."""
    calls = max((len(message.get("tool_calls", ())) for message in job.messages), default=0)
    if job.images:
        raise NoNodesAvailable(
            "Images are not sent to peers: only the box that was asked sees them."
        )
    if len(job.messages) > MAX_MESSAGES or calls > MAX_CALLS:
        raise NoNodesAvailable("The request has more messages, or calls in one, than peers take.")
    sampling = job.sampling
    return Task(
        model=job.model.id,
        asked=SamplingDefaults(
            sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p
        ),
        read=job.prompt_tokens,
        settled=job.drawn_with,
        tag=tag,
        **{name: getattr(sampling, name) for name in SAMPLING_FIELDS},
        **{name: getattr(job, name) for name in _SAME},
    )


def to_job(task: Task, model: Model, tenant: str, scope: str = "") -> Job:
    """The job that serves a task of that tenant.  Raises InvalidBody."""
    sampling = task.sampling
    if task.settled is not None and not task.settled.follows(sampling):
        raise InvalidBody("how an earlier leg drew is not how this one is asked to")
    check_sizes(task.tools, task.constraint, task.stop)
    same: dict[str, Any] = {name: getattr(task, name) for name in _SAME}
    return Job(
        model=model,
        sampling=sampling,
        tenant=tenant,
        scope=scope,
        prompt_tokens=task.read,
        drawn_with=task.settled,
        **same,
    )
