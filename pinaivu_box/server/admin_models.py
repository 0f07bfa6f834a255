"""`GET /v1/admin/models`: what is served, and which files are not.  `POST /v1/admin/models/pull`:
copy a model from other boxes, a line of JSON as it goes on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, starmap
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pinaivu_box.box import Box, not_served_in
from pinaivu_box.errors import (
    Conflict,
    CopyFailed,
    InvalidBody,
    ModelNotFound,
    PeeringError,
)
from pinaivu_box.files import download
from pinaivu_box.files import store as file_store
from pinaivu_box.files.download import DownloadProgress, DownloadSource, Open
from pinaivu_box.files.wire import PURPOSE, ModelAvailable, Name
from pinaivu_box.gossip.adverts import Offer
from pinaivu_box.models import catalog, memory
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.model_copy import copy_model
from pinaivu_box.models.names import is_model_id, printable
from pinaivu_box.network.network import Network
from pinaivu_box.server.admin import body, box_of, by
from pinaivu_box.server.admin_peers import OFF
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.operations import NotServed
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor

_LINE_SECONDS = 0.5
ANY = "any"


class Pull(Struct, frozen=True):
    """`from` names a peer, or `any` for all that have it.  `digest` is the beginning of the file's
    SHA-256 in hex; with it the name is only what the model is called here.  `as` is another name
    for it here."""

    model: Annotated[Name, Meta(min_length=1)]
    from_: str = field(name="from", default=ANY)
    digest: str = ""
    as_: Annotated[str, Meta(min_length=1, max_length=128)] | None = field(name="as", default=None)


class PullSource(Struct, frozen=True):
    """`bytes` came from it; `left_out` says why nothing more is asked of it."""

    peer: str
    name: str
    bytes: int
    left_out: str = ""


class PullProgress(Struct, frozen=True):
    """A line: `bytes` of `size` are here.  The last one is `done`, or `failed` with a `message`;
    `done` has one too if there was nothing to copy."""

    state: Literal["copying", "checking", "done", "failed"]
    model: str
    digest: str
    size: int
    bytes: int
    sources: list[PullSource]
    message: str = ""
    request_id: str = ""


class ModelView(Struct, frozen=True):
    """`size` in bytes, `context` the most tokens of one sequence.  A model in several files has all
    of them in `files`."""

    id: str
    size: int
    owner: str
    architecture: str
    context: int
    files: list[str]


class ModelFiles(Struct, frozen=True):
    """`not_served` are the files of the models folder that are not, and why."""

    request_id: str
    data: list[ModelView]
    not_served: list[NotServed]


async def ls(request: Request) -> Response:
    box = box_of(request)
    made = ModelFiles(
        request.scope["state"]["request_id"],
        [_view(model, box) for model in box.catalog.models],
        list(starmap(NotServed, not_served_in(box.catalog).items())),
    )
    return JSON(made)


def _view(model: Model, box: Box) -> ModelView:
    return ModelView(
        id=model.id,
        size=model.size,
        owner=model.owner,
        architecture=model.header.architecture,
        context=memory.context_of(model, box.config.engine.context),
        files=[printable(str(file.path)) for file in model.files],
    )


@dataclass(frozen=True)
class _Task:
    """What is to be called `model` here, and who asked for it."""

    model: str
    box: Box
    network: Network
    actor: Actor


async def pull(request: Request) -> Response:
    given = await body(request, Pull)
    box = box_of(request)
    network = box.network
    if network is None:
        raise Conflict(OFF)
    model = _name_here(given)
    task = _Task(model, box, network, by(request))
    open_stream = partial(network.open, purpose=PURPOSE)
    found, without = await _find(open_stream, _sources(network, given), given)
    have = next(iter(found.values()))
    here = await _here(box, have.digest)
    _check_free(task, here)
    request_id: str = request.scope["state"]["request_id"]
    if here is not None:
        said, size = f"This box has that file already, as {here.id}.", have.size
        if given.as_ is not None and not _is_called(here, task.model):
            _check_free(task, None)
            await _name_too(task, here)
            said = f"{said[:-1]}, and serves it as {task.model} too."
            here = box.catalog.find(task.model)
        line = PullProgress("done", here.id, have.digest, size, size, [], said, request_id)
        return StreamingResponse(iter([_line(line)]), media_type="application/x-ndjson")
    copy = download.copy_of(open_stream, found, catalog.directory(box.config, box.home), model)
    copy.left_out.update(without)
    return StreamingResponse(_lines(task, copy, request_id), media_type="application/x-ndjson")


def _name_here(given: Pull) -> str:
    """With its tag.  Raises InvalidBody."""
    if given.digest and not re.fullmatch(r"[0-9a-f]{8,64}", given.digest):
        raise InvalidBody(
            f"'{given.digest}' is no digest: write 8 to 64 hex digits of one.",
            loc=("body", "digest"),
        )
    name, loc = (given.model, "model") if given.as_ is None else (given.as_, "as")
    if not is_model_id(name if ":" in name else f"{name}:latest"):
        raise InvalidBody(f"'{name}' is not a model name: write it as name:tag.", loc=("body", loc))
    if "/" in name:
        raise InvalidBody(
            f"'{name}' cannot be the name of a file: give the model another name here (--as).",
            loc=("body", loc),
        )
    return name if ":" in name else f"{name}:latest"


def _sources(network: Network, given: Pull) -> list[DownloadSource]:
    """Whom to ask.  Raises PeerNotFound, ModelNotFound."""
    if given.from_ != ANY:
        peer = network.peer(given.from_)
        return [DownloadSource(peer.node_id, peer.name)]
    offers = {
        peer: peer.advert.models
        for peer in sorted(network.peers(), key=lambda peer: peer.state != "connected")
        if peer.advert is not None and peer.state != "revoked" and not peer.gone
    }
    fitting = [
        DownloadSource(peer.node_id, peer.name)
        for peer, models in offers.items()
        if any(_fits(offer, given) for offer in models)
    ]
    if not fitting:
        ids = {offer.id for models in offers.values() for offer in models}
        offered = ", ".join(sorted(filter(is_model_id, ids)))
        raise ModelNotFound(
            f"No peer offers {given.model}. Offered: {offered or 'nothing'}.", param="model"
        )
    return fitting


def _fits(offer: Offer, given: Pull) -> bool:
    if given.digest:
        return offer.digest.hex().startswith(given.digest)
    names = (given.model, f"{given.model}:latest", given.model.removesuffix(":latest"))
    return offer.id in names


async def _find(
    open_stream: Open, sources: list[DownloadSource], given: Pull
) -> tuple[dict[DownloadSource, ModelAvailable], dict[DownloadSource, str]]:
    """Raises Conflict."""
    try:
        return await download.find(open_stream, sources, given.model, given.digest)
    except CopyFailed as error:
        raise Conflict(error.message) from error


async def _here(box: Box, digest: str) -> Model | None:
    """The model of that file, if this box has it."""
    for model in box.catalog.models:
        with suppress(OSError):  # deleted since
            if await file_store.digest(box.database, model) == digest:
                return model
    return None


def _is_called(model: Model, name: str) -> bool:
    return name in (model.id, f"{model.id}:latest")


async def _name_too(task: _Task, here: Model) -> None:
    """Serve a model that is here under the task's name too.  Raises Conflict."""
    box = task.box
    folder = catalog.directory(box.config, box.home)
    try:
        targets = await asyncio.to_thread(copy_model, here, folder, task.model)
        await box.look_for_models()
    except OSError as error:
        reason = error.strerror or error
        raise Conflict(f"{here.id} cannot be called {task.model} too: {reason}.") from error
    for target in targets:
        if why := box.catalog.not_served.get(target):
            raise Conflict(f"{printable(str(target))} is here, and it cannot be served: {why}.")
    digests = await file_store.digests_of_parts(box.database, here)
    detail = {"digest": await box.digests.of(here), "same_as": here.id}
    await box.database.write(
        *map(file_store.named, targets, digests),
        audit.record(task.actor, "model.pull", task.model, **detail),
    )


def _check_free(task: _Task, here: Model | None) -> None:
    """Raises Conflict."""
    names = {model.id for model in task.box.catalog.models}
    if here is None and names & {task.model, task.model.removesuffix(":latest")}:
        raise Conflict(
            f"This box serves another file as {task.model}: give the new one another name (--as)."
        )


async def _lines(task: _Task, copy: DownloadProgress, request_id: str) -> AsyncIterator[bytes]:
    """Whoever reads this no more stops the copy; what is here of it stays."""
    progress: Callable[..., bytes] = partial(_progress, task, copy, request_id)
    doing = asyncio.create_task(_run(task, copy))
    try:
        while not doing.done():
            yield progress("checking" if copy.checking else "copying")
            await asyncio.wait({doing}, timeout=_LINE_SECONDS)
        try:
            doing.result()
        except PeeringError as error:
            yield progress("failed", error.message)
        else:
            yield progress("done")
    finally:
        # A file that has got its name is also served, whether somebody still looks on or not.
        doing.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not copy.finishing:
            doing.cancel()
        await asyncio.wait({doing})


def _progress(
    task: _Task,
    copy: DownloadProgress,
    request_id: str,
    state: Literal["copying", "checking", "done", "failed"],
    message: str = "",
) -> bytes:
    known = {*copy.sources, *copy.left_out}
    sources = [
        PullSource(source.peer, source.name, copy.sent[source], copy.left_out.get(source, ""))
        for source in sorted(known, key=lambda source: source.name)
    ]
    return _line(
        PullProgress(
            state, task.model, copy.digest, copy.size, copy.bytes, sources, message, request_id
        )
    )


def _line(progress: PullProgress) -> bytes:
    return msgspec.json.encode(progress) + b"\n"


async def _run(task: _Task, copy: DownloadProgress) -> None:
    """Copy, and serve what has come.  Raises CopyFailed."""
    await copy.run()
    box = task.box
    detail = {"digest": copy.digest, "from": sorted(source.name for source in copy.sent)}
    known = [file_store.copied(*file) for file in copy.files]
    await box.database.write(
        *chain.from_iterable(known),
        audit.record(task.actor, "model.pull", task.model, **detail),
    )
    await box.look_for_models()
    for target, *_ in copy.files:
        if why := box.catalog.not_served.get(target):
            raise CopyFailed(f"{target} is here, and it cannot be served: {why}.")
