"""`/api/pull`: Ollama's way to pull a model by name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box.errors import Conflict, InvalidBody
from pinaivu_box.model_admin import pull as pulling
from pinaivu_box.model_admin.progress import PullProgress
from pinaivu_box.model_admin.pull import Pull
from pinaivu_box.server.context import actor_of, box_of, request_id_of
from pinaivu_box.server.json_response import JsonLines
from pinaivu_box.text import NO_CONTROLS

_Name = Annotated[str, Meta(max_length=2000, pattern=NO_CONTROLS)]


class OllamaPull(Struct, frozen=True):
    """Body of `POST /api/pull`; `name` is an older spelling of `model`."""

    model: _Name = ""
    name: _Name = ""
    insecure: bool | None = None  # no effect: registries without TLS are those of this machine
    stream: bool | None = None


class PullStatus(Struct, frozen=True):
    """A line of the progress: `completed` of `total` bytes are here.  The last line says `success`,
    or has an `error`."""

    status: str | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    total: int | UnsetType = UNSET
    completed: int | UnsetType = UNSET
    error: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


async def pull(request: Request, body: OllamaPull) -> PullStatus | JsonLines[PullStatus]:
    """Raises Conflict, InvalidBody."""
    name = body.model or body.name
    if not name:
        raise InvalidBody("field required", loc=("body", "model"))
    progress = await pulling.by_name(
        box_of(request), Pull(name), actor_of(request), request_id_of(request)
    )
    lines = _lines(progress)
    if body.stream is not False:
        return JsonLines(lines)
    async for line in lines:  # until the last
        last = line
    if last.error is not UNSET:
        raise Conflict(last.error)
    return last


async def _lines(progress: AsyncIterator[PullProgress]) -> AsyncIterator[PullStatus]:
    yield PullStatus("pulling manifest")
    async for line in progress:
        match line.state:
            case "copying":
                yield _copying(line)
            case "checking":
                yield PullStatus("verifying sha256 digest")
            case "failed":
                yield PullStatus(error=line.message, request_id=line.request_id)
            case "done":
                yield _copying(line)
                yield PullStatus("success", request_id=line.request_id)


def _copying(line: PullProgress) -> PullStatus:
    digest = f"sha256:{line.digest}" if line.digest else UNSET
    return PullStatus(f"pulling {line.digest[:12]}".rstrip(), digest, line.size, line.bytes)
