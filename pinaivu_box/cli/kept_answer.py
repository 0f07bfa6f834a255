"""A transcript of what a client has kept of a request, for `pinaivu receipts audit`."""

from __future__ import annotations

from typing import Any

import msgspec

from pinaivu_box.cli.receipt_audit import TranscriptReader
from pinaivu_box.errors import CliError


def transcript_of_files(request: bytes, answer: bytes, usual_stop: list[str]) -> TranscriptReader:
    """One that is made of the JSON bodies of a request and its answer, which an engine reads."""

    async def read(engine: Any, model: Any, legs: list[Any]) -> Any:
        from pinaivu_box.audits.from_answer import transcript_from
        from pinaivu_box.errors import ApiError
        from pinaivu_box.receipts.answer import NoAnswer, choice_texts

        try:
            jobs = _jobs(request, model, legs[0].proof, usual_stop)
            choices = max(1, len({leg.proof.choice for leg in legs}) // len(jobs))
            echoed = [_echoed(job) for job in jobs for _ in range(choices)]
            found = choice_texts(answer, echoed)
            texts = {number: text for number, text in enumerate(found) if text is not None}
            return await transcript_from(engine, jobs, texts, legs)
        except NoAnswer as error:
            raise CliError(f"The answer {error}.") from error
        except ApiError as error:
            raise CliError(f"The request cannot be read: {error.message}") from error

    return read


def _jobs(data: bytes, model: Any, proof: Any, usual_stop: list[str]) -> list[Any]:
    """The jobs of the request's prompts.  Raises ApiError, CliError."""
    from dataclasses import replace

    from pinaivu_box.engine.messages import SamplingParams
    from pinaivu_box.gateway.backend import Job
    from pinaivu_box.openai.completions import CompletionRequest
    from pinaivu_box.openai.decoding import decode
    from pinaivu_box.openai.request import texts_or_tokens
    from pinaivu_box.openai.types import ChatRequest
    from pinaivu_box.server.jobs import chat_job, job_of

    system = model.record.system if model.record is not None else ""
    model = replace(model, id=proof.model)
    job = Job(proof.request_id, model, [], SamplingParams(), None, [], "audit", system=system)
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise CliError(f"The request is no JSON object: {error}.") from error
    if "messages" in fields:
        body, _ = decode(data, ChatRequest)
        job = chat_job(body, job)
        return [replace(job, stop=job.stop or usual_stop)]
    if "prompt" not in fields:
        raise CliError("The request is neither a chat nor a completion.")
    completion, _ = decode(data, CompletionRequest)
    job = job_of(completion, job)
    job = replace(job, stop=job.stop or usual_stop, suffix=completion.suffix or "")
    prompts = texts_or_tokens(completion.prompt, "prompt", len(data))
    echo = bool(completion.echo)
    return [
        replace(job, prompt=prompt, prompt_number=number, echo=echo)
        for number, prompt in enumerate(prompts)
    ]


def _echoed(job: Any) -> str:
    """What the text of its choices begins with that is not the model's."""
    return job.prompt if job.echo and isinstance(job.prompt, str) else ""
