"""A job as it goes to another box, and back into a job there."""

from __future__ import annotations

from typing import Any

import msgspec

from pinaivu_box.config import SamplingConfig
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.errors import InvalidBody, NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.sizes import check_sizes
from pinaivu_box.legs.wire import MAX_CALLS, MAX_MESSAGES, Asked, Task, may_draw
from pinaivu_box.models.catalog import Model

_SAME = tuple(name for name in Task.__struct_fields__ if name not in ("model", "asked", "tag"))


def to_task(job: Job, tag: str | None = None) -> Task:
    """`tag` is the peer's name of the job's scope.  Raises NoNodesAvailable for what no peer
    takes."""
    calls = max((len(one.get("tool_calls", ())) for one in job.messages), default=0)
    if len(job.messages) > MAX_MESSAGES or calls > MAX_CALLS:
        raise NoNodesAvailable("The request has more messages, or calls in one, than peers take.")
    asked = Asked(**msgspec.structs.asdict(job.asked))
    same = {name: getattr(job, name) for name in _SAME}
    return Task(model=job.model.id, asked=asked, tag=tag, **same)


def to_job(task: Task, model: Model, asked: SamplingConfig, tenant: str, scope: str = "") -> Job:
    """`asked` are the settings with which tasks of that tenant are served.  Raises InvalidBody."""
    if task.settled is not None:
        _check(task.settled, task)
    check_sizes(task.tools, task.constraint, task.stop)
    same: dict[str, Any] = {name: getattr(task, name) for name in _SAME}
    return Job(model=model, asked=asked, tenant=tenant, scope=scope, **same)


def sampling_of(task: Task) -> SamplingConfig:
    return SamplingConfig(**msgspec.structs.asdict(task.asked))


def _check(settled: Sampling, task: Task) -> None:
    """How an earlier leg drew is within the same bounds, and what this task says itself."""
    same = ("seed", "ignore_eos", "frequency_penalty", "presence_penalty", "repeat_penalty",
            "typical_p", "logit_bias", "min_tokens")  # fmt: skip
    if not may_draw(settled) or any(getattr(settled, name) != getattr(task, name) for name in same):
        raise InvalidBody("how an earlier leg drew is not how this one is asked to")
