"""`/v1/admin/models`: the models and their files, and copying a model from other boxes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from starlette.requests import Request

from pinaivu_box.box import Box, NotServed, not_served_in
from pinaivu_box.errors import (
    Conflict,
    CopyFailed,
    InvalidBody,
    ModelNotFound,
    PeeringError,
    PullFailed,
)
from pinaivu_box.files import download
from pinaivu_box.files import store as file_store
from pinaivu_box.files.download import Download, DownloadSource
from pinaivu_box.files.wire import PURPOSE
from pinaivu_box.gossip.adverts import Offer
from pinaivu_box.models import catalog, memory
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.model_copy import copy_model
from pinaivu_box.models.names import MAX_NAME, is_model_id, printable
from pinaivu_box.models.record import ModelRecord
from pinaivu_box.network.network import Network
from pinaivu_box.registry import pulls
from pinaivu_box.registry.client import RegistryClient
from pinaivu_box.registry.pulls import RunningPull
from pinaivu_box.registry.reference import LocalModel, parse
from pinaivu_box.registry.transfer import Transfer
from pinaivu_box.server.admin_peers import network_of
from pinaivu_box.server.context import actor_of, box_of, named_field, request_id_of
from pinaivu_box.server.json_response import JsonLines
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import SqlStatement
from pinaivu_box.text import NO_CONTROLS

_PROGRESS_SECONDS = 0.5
ANY = "any"
Reference = Annotated[str, Meta(min_length=1, max_length=2000, pattern=NO_CONTROLS)]
State = Literal["copying", "checking", "done", "failed"]


class Pull(Struct, frozen=True):
    """`from` is the name of a peer, or `any` for all peers that have the model.  Without it `model`
    says where the model is: see docs/models.md.

    `digest`, the beginning of the file's SHA-256 in hex, selects the file; `model` then only names
    it on this box.  `as` is another name for it on this box.
    """

    model: Reference
    from_: str = field(name="from", default="")
    digest: str = ""
    as_: Annotated[str, Meta(min_length=1, max_length=128)] | None = field(name="as", default=None)


class PullSource(Struct, frozen=True):
    """`bytes` came from this peer; `left_out` says why it is not asked for more."""

    peer: str
    name: str
    bytes: int
    left_out: str = ""


class PullProgress(Struct, frozen=True):
    """`bytes` of `size` have been copied.  The last line is `done`, or `failed` with a `message`;
    `done` has a message too if there was nothing to copy."""

    state: State
    model: str
    digest: str
    size: int
    bytes: int
    sources: list[PullSource]
    message: str = ""
    request_id: str = ""


class ModelView(Struct, frozen=True):
    """`size` in bytes, `context` in tokens.  `files` are all files of a model in several parts."""

    id: str
    size: int
    owner: str
    architecture: str
    context: int
    files: list[str]


class ModelFiles(Struct, frozen=True):
    """`not_served` are the files of the models folder that are not served, and why."""

    request_id: str
    data: list[ModelView]
    not_served: list[NotServed]


async def list_model_files(request: Request) -> ModelFiles:
    box = box_of(request)
    return ModelFiles(
        request_id_of(request),
        [_view(model, box) for model in box.catalog.models],
        not_served_in(box.catalog),
    )


def _view(model: Model, box: Box) -> ModelView:
    return ModelView(
        id=model.id,
        size=model.size,
        owner=model.owner,
        architecture=model.header.architecture,
        context=memory.context_of(model, box.config.engine.context),
        files=[printable(str(file.path)) for file in model.files],
    )


async def pull(request: Request, body: Pull) -> JsonLines[PullProgress]:
    """Raises Conflict, ModelNotFound, PeerNotFound, InvalidBody."""
    box = box_of(request)
    if not body.from_:
        return await _pull_by_name(request, body)
    network = network_of(request)
    _check_digest(body)
    name = _name_here(body)
    if len(body.model) > MAX_NAME:
        raise InvalidBody(
            f"it has more than {MAX_NAME} characters: no peer has such a model",
            loc=("body", "model"),
        )
    open_stream = partial(network.open, purpose=PURPOSE)
    try:
        offers, unusable = await download.find(
            open_stream, _sources(network, body), body.model, body.digest
        )
    except CopyFailed as error:
        raise Conflict(error.message) from error
    offer = next(iter(offers.values()))
    present = await _present(box, offer.digest, offer.size)
    task = _Pull(box, name, actor_of(request), request_id_of(request))
    if present is None:
        task.check_name_is_free()
        copy = Download(open_stream, offers, catalog.directory(box.config, box.home), name)
        copy.left_out.update(unusable)
        return JsonLines(task.watch(RunningPull(copy, task.run(copy))))
    message = f"This box has that file already, as {present.id}."
    if body.as_ is not None and name not in (present.id, f"{present.id}:latest"):
        present = await task.add_name(present)
        message = f"{message[:-1]}, and serves it as {name} too."
    return JsonLines(task.done(present, offer.digest, message))


async def _pull_by_name(request: Request, body: Pull) -> JsonLines[PullProgress]:
    """Raises Conflict, InvalidBody."""
    _check_digest(body)
    box = box_of(request)
    try:
        reference = parse(body.model, box.config.registry, body.as_)
    except PullFailed as error:
        raise InvalidBody(error.message, loc=("body", "model")) from error
    task = _Pull(box, reference.id, actor_of(request), request_id_of(request))
    if (running := box.pulls.running(reference.id)) is not None:
        return JsonLines(task.watch(running))
    if isinstance(reference, LocalModel):
        if body.digest:
            raise InvalidBody(
                "it chooses among files of registries and peers: remove it", loc=("body", "digest")
            )
        return JsonLines(task.done(*await task.link(reference)))
    client = pulls.client_for(reference)
    try:
        listing = await pulls.look_up(client, reference)
    except PullFailed as error:
        await client.aclose()
        raise Conflict(error.message) from error
    copy = Transfer(client, listing, catalog.directory(box.config, box.home))
    if not copy.digest.startswith(body.digest):
        await client.aclose()
        raise Conflict(f"{listing.record.source} is another file than --digest says.")
    present = await _present(box, copy.digest, copy.size) if copy.digest else None
    if present is None:
        task.check_name_is_free()
        return JsonLines(task.download(client, copy))
    await client.aclose()
    message = f"This box has that file already, as {present.id}."
    if present.id != reference.id:
        present = await task.add_name(present, listing.record)
        message = f"{message[:-1]}, and serves it as {present.id} too."
    return JsonLines(task.done(present, copy.digest, message))


def _check_digest(body: Pull) -> None:
    """Raises InvalidBody."""
    if body.digest and not re.fullmatch(r"[0-9a-f]{8,64}", body.digest):
        raise InvalidBody(
            f"'{body.digest}' is not a digest: write 8 to 64 hex digits of one.",
            loc=("body", "digest"),
        )


def _name_here(body: Pull) -> str:
    """The name on this box, with its tag.  Raises InvalidBody."""
    given, field_name = (body.model, "model") if body.as_ is None else (body.as_, "as")
    name = given if ":" in given else f"{given}:latest"
    with named_field("body", field_name):
        if not is_model_id(name):
            raise ValueError(f"'{given}' is not a model name: write it as name:tag.")
        if "/" in name:
            raise ValueError(
                f"'{given}' cannot be the name of a file: give the model another name here (--as)."
            )
    return name


def _sources(network: Network, body: Pull) -> list[DownloadSource]:
    """The peers to ask.  Raises PeerNotFound, ModelNotFound."""
    if body.from_ != ANY:
        peer = network.peer(body.from_)
        return [DownloadSource(peer.node_id, peer.name)]
    offers = {
        peer: peer.advert.models
        for peer in sorted(network.peers(), key=lambda peer: peer.state != "connected")
        if peer.advert is not None and peer.state != "revoked" and not peer.gone
    }
    sources = [
        DownloadSource(peer.node_id, peer.name)
        for peer, models in offers.items()
        if any(_matches(offer, body) for offer in models)
    ]
    if not sources:
        ids = {offer.id for models in offers.values() for offer in models}
        offered = ", ".join(sorted(filter(is_model_id, ids)))
        raise ModelNotFound(
            f"No peer offers {body.model}. Offered: {offered or 'nothing'}.", param="model"
        )
    return sources


def _matches(offer: Offer, body: Pull) -> bool:
    if body.digest:
        return offer.digest.hex().startswith(body.digest)
    names = (body.model, f"{body.model}:latest", body.model.removesuffix(":latest"))
    return offer.id in names


async def _present(box: Box, digest: str, size: int) -> Model | None:
    """The model with that file, if this box has it.  Files of other sizes are not read."""
    for model in box.catalog.models:
        with suppress(OSError):  # deleted since
            if model.size == size and await box.digests.of(model) == digest:
                return model
    return None


@dataclass(frozen=True)
class _Pull:
    """A pull of a file that gets the name `model` on this box."""

    box: Box
    model: str
    actor: Actor
    request_id: str

    def check_name_is_free(self) -> None:
        """Raises Conflict if another file has the name."""
        names = {model.id for model in self.box.catalog.models}
        if names & {self.model, self.model.removesuffix(":latest")}:
            raise Conflict(
                f"This box serves another file as {self.model}: give the new one another name "
                "(--as)."
            )

    async def add_name(self, model: Model, record: ModelRecord | None = None) -> Model:
        """Serve a model of this box under the name as well, with what a registry says about it.
        Raises Conflict."""
        self.check_name_is_free()
        box = self.box
        folder = catalog.directory(box.config, box.home)
        try:
            targets = await asyncio.to_thread(copy_model, model, folder, self.model, record)
            await box.look_for_models()
        except OSError as error:
            reason = error.strerror or error
            raise Conflict(f"{model.id} cannot be called {self.model} too: {reason}.") from error
        for target in targets:
            if why := box.catalog.not_served.get(target):
                raise Conflict(f"{printable(str(target))} exists, but cannot be served: {why}.")
        digests = [await box.digests.of(file) for file in model.files]
        await box.database.write(
            *map(file_store.named, targets, digests),
            self._record(digest=await box.digests.of(model), same_as=model.id),
        )
        return box.catalog.find(self.model)

    async def done(self, model: Model, digest: str, message: str) -> AsyncIterator[PullProgress]:
        """The only line of a pull that had nothing to copy."""
        size = model.size
        yield PullProgress("done", model.id, digest, size, size, [], message, self.request_id)

    async def link(self, model: LocalModel) -> tuple[Model, str, str]:
        """Serve a file of this machine where it is.  Returns what `done` says.  Raises Conflict."""
        box = self.box
        for served in box.catalog.models:
            with suppress(OSError):
                if served.id == self.model and served.path.samefile(model.path):
                    return served, "", f"This box serves that file already, as {served.id}."
        self.check_name_is_free()
        try:
            folder = catalog.directory(box.config, box.home)
            links = await asyncio.to_thread(pulls.link, model, folder)
        except (PullFailed, OSError) as error:
            raise Conflict(getattr(error, "message", None) or f"{error}.") from error
        await box.look_for_models()
        for path in links:
            if why := box.catalog.not_served.get(path):
                for link in links:
                    link.unlink()
                raise Conflict(f"{printable(str(model.path))} cannot be served: {why}.")
        await box.database.write(self._record(path=str(model.path)))
        served = box.catalog.find(self.model)
        return served, "", f"{self.model} is served from {printable(str(model.path))}."

    async def download(self, client: RegistryClient, copy: Transfer) -> AsyncIterator[PullProgress]:
        """The progress of a pull by name, which others may watch too."""
        running = self.box.pulls.running(self.model)
        if running is None:
            running = self.box.pulls.start(copy, self._download(client, copy))
        else:  # somebody was quicker
            await client.aclose()
        async for line in self.watch(running):
            yield line

    async def _download(self, client: RegistryClient, copy: Transfer) -> None:
        """Raises PullFailed, CopyFailed."""
        async with client:
            await self.run(copy)

    async def watch(self, running: RunningPull) -> AsyncIterator[PullProgress]:
        """Its progress.  If nobody reads it any more, it stops; what has been copied stays."""
        copy = running.copy
        async with aclosing(running.watch(_PROGRESS_SECONDS)) as ticks:
            async for _ in ticks:
                yield self._line(copy, "checking" if copy.checking else "copying")
        try:
            running.task.result()
        except (PeeringError, PullFailed) as error:
            yield self._line(copy, "failed", error.message)
        else:
            yield self._line(copy, "done")

    async def run(self, copy: Download | Transfer) -> None:
        """Copy the model and serve it.  Raises CopyFailed, PullFailed."""
        await copy.run()
        box = self.box
        names = sorted(source.name for source in copy.sent)
        await box.database.write(
            *chain.from_iterable(file_store.copied(*file) for file in copy.files),
            self._record(digest=copy.digest, **{"from": names}),
        )
        await box.look_for_models()
        for target, *_ in copy.files:
            if why := box.catalog.not_served.get(target):
                raise CopyFailed(f"{target} exists, but cannot be served: {why}.")

    def _line(self, copy: Download | Transfer, state: State, message: str = "") -> PullProgress:
        sources = [
            PullSource(source.peer, source.name, copy.sent[source], copy.left_out.get(source, ""))
            for source in sorted({*copy.sources, *copy.left_out}, key=lambda source: source.name)
        ]
        copied = (copy.digest, copy.size, copy.bytes)
        return PullProgress(state, self.model, *copied, sources, message, self.request_id)

    def _record(self, **detail: Any) -> SqlStatement:
        return audit.record(self.actor, "model.pull", self.model, **detail)
