"""What was asked for, as the commitment to a prompt covers it."""

from __future__ import annotations

from pinaivu_box.gateway.backend import Job, committed
from pinaivu_box.receipts import commitment


def asked_text(job: Job) -> str:
    """What the client asked, as the prompt's commitment covers it."""
    if job.inputs is not None:
        return commitment.prompt_text([], job.stop, input=job.inputs)
    if job.prompt is None:
        more = committed(job.tools, job.constraint)
        return commitment.prompt_text(job.messages, job.stop, **more)
    more = {"suffix": job.suffix} if job.suffix else {}
    return commitment.prompt_text([], job.stop, prompt=[job.prompt], **more)
