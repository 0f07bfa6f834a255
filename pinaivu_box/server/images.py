"""The images of a request: the files behind its URLs, for a model that sees images."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pinaivu_box.box import Box
from pinaivu_box.errors import BodyTooLarge, InvalidBody, UnsupportedParameter
from pinaivu_box.gateway.backend import Job
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai import images
from pinaivu_box.policy import Policy
from pinaivu_box.upstream.upstream import OWNER

_SMALL_URL = 64 * 1024  # characters; a longer one is decoded in a thread
# Of all choices of a request together: each of them is sent to the engine with its images.
_MAX_BYTES_OF_CHOICES = 256 * 1024 * 1024
_MAX_SECONDS = 60.0  # for all images of a request
_MAX_NAMED = 5  # models


def fetches_images(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether some of them are on other servers."""
    return any(not url.startswith("data:") for url, _ in images.references(messages))


async def with_images(box: Box, policy: Policy, jobs: list[Job]) -> list[Job]:
    """The jobs of a request with the files of their images, and the digests in their place.

    Raises UnsupportedParameter if the model sees none, InvalidBody for a URL that leads to no file,
    BodyTooLarge.
    """
    messages = jobs[0].messages  # of all choices: only the prompts of completions differ
    wanted = list(images.references(messages))
    if not wanted:
        return jobs
    _check_sees(box, policy, jobs[0].model, wanted[0][1])
    if len(wanted) > images.MAX_IMAGES:
        raise InvalidBody(f"there are more than {images.MAX_IMAGES} images")
    files: dict[str, bytes] = {}
    left = box.config.server.max_body_bytes
    try:
        async with asyncio.timeout(_MAX_SECONDS):
            for url, at in wanted:
                if url not in files:
                    files[url] = await _file(box, url, at, left)
                    left -= len(files[url])
    except TimeoutError:
        raise InvalidBody(f"its images did not come within {_MAX_SECONDS:g} s") from None
    if sum(map(len, files.values())) * len(jobs) > _MAX_BYTES_OF_CHOICES:
        raise BodyTooLarge("The images of all choices together are too large: lower n.")
    seen = images.resolved(messages, files)
    by_digest = {images.digest_of(data): data for data in files.values()}
    return [replace(job, messages=seen, images=by_digest) for job in jobs]


async def _file(box: Box, url: str, at: tuple[str | int, ...], max_bytes: int) -> bytes:
    """Raises InvalidBody, BodyTooLarge."""
    if len(url) > _SMALL_URL:
        data = await asyncio.to_thread(images.data_in, url, *at)
    else:
        data = images.data_in(url, *at)
    if data is None:
        from pinaivu_box.server.image_fetch import fetch  # loads httpx, for few requests

        return await fetch(url, at, box.config.server.image_hosts, max_bytes)
    return data


def _check_sees(box: Box, policy: Policy, model: Model, at: tuple[str | int, ...]) -> None:
    """Raises UnsupportedParameter."""
    if model.projector is not None or model.owner == OWNER:  # an upstream says itself if it cannot
        return
    seeing = [other.id for other in box.admission.models(policy) if other.projector is not None]
    instead = "send text only"
    if seeing:
        instead = f"use {' or '.join(seeing[:_MAX_NAMED])}"
    why = f"the model {model.id} sees no images: {instead}"
    if model.remote:
        why = f"{model.id} is at peers of this box, to which it sends no images: {instead}"
    raise UnsupportedParameter(why, loc=("body", *at), kind="value_error.unsupported")
