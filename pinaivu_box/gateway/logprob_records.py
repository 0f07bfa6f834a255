"""Log-probabilities as the answer shows them, in the form that a commitment covers; pure.

Two endpoints return them.  Chat shows bytes and a list; completions shows names and a dictionary in
which the token itself is as well, and nothing for the first token of an echoed prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.gateway.backend import Job
from pinaivu_box.openai.completions import shown_likeliest, shown_token
from pinaivu_box.receipts.commitment import logprob_record, named_record


def records(job: Job, logprobs: Sequence[TokenLogprob], sent: int) -> list[bytes]:
    """Of the next tokens of a leg, which has `sent` those of so many."""
    if job.prompt is None:
        return [logprob_record(token.token, token.logprob, token.top) for token in logprobs]
    first = job.scored + sent
    return [_named(token, job.echo and first + at == 0) for at, token in enumerate(logprobs)]


def _named(token: TokenLogprob, first: bool) -> bytes:
    name = shown_token(token.token)
    if first:
        return named_record(name, None, {})
    return named_record(name, token.logprob, shown_likeliest(token.token, token.logprob, token.top))
