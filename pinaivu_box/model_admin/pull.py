"""Pulls of models: by name from registries, or from the boxes of the network."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from msgspec import Meta, Struct, field

from pinaivu_box.box import Box
from pinaivu_box.errors import Conflict, CopyFailed, InvalidBody, ModelNotFound, PullFailed
from pinaivu_box.files import download
from pinaivu_box.files.download import Download, DownloadSource
from pinaivu_box.files.wire import PURPOSE
from pinaivu_box.gossip.adverts import Offer
from pinaivu_box.model_admin.progress import PullProgress
from pinaivu_box.model_admin.target import Target, present
from pinaivu_box.models import catalog
from pinaivu_box.models.names import MAX_NAME, is_model_id, spellings, with_tag
from pinaivu_box.network.network import Network
from pinaivu_box.registry import pulls
from pinaivu_box.registry.pulls import RunningPull
from pinaivu_box.registry.reference import LocalModel, parse
from pinaivu_box.store.audit import Actor
from pinaivu_box.text import NO_CONTROLS

ANY = "any"
Reference = Annotated[str, Meta(min_length=1, max_length=2000, pattern=NO_CONTROLS)]


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


async def by_name(
    box: Box, wanted: Pull, actor: Actor, request_id: str = ""
) -> AsyncIterator[PullProgress]:
    """Start a pull by name, or join the one that runs; return its progress.  If nobody reads that
    any more, the pull stops.  Raises Conflict, InvalidBody."""
    _check_digest(wanted)
    try:
        reference = parse(wanted.model, box.config.registry, wanted.as_)
    except PullFailed as error:
        raise InvalidBody(error.message, loc=("body", "model")) from error
    target = Target(box, reference.id, actor, request_id)
    target.check_is_no_alias()
    if (running := box.pulls.running(reference.id)) is not None:
        return target.watch(running)
    if isinstance(reference, LocalModel):
        if wanted.digest:
            raise InvalidBody(
                "it chooses among files of registries and peers: remove it", loc=("body", "digest")
            )
        return target.done(*await target.link(reference))
    client = pulls.client_for(reference)
    try:
        listing = await pulls.look_up(client, reference)
    except PullFailed as error:
        await client.aclose()
        raise Conflict(error.message) from error
    from pinaivu_box.registry.transfer import Transfer  # loads httpx, as `client_for` has

    copy = Transfer(client, listing, catalog.directory(box.config, box.home))
    if not copy.digest.startswith(wanted.digest):
        await client.aclose()
        raise Conflict(f"{listing.record.source} is another file than --digest says.")
    held = await present(box, copy.digest, copy.model_size) if copy.digest else None
    if held is None or (listing.projector and not held.projector and held.id != reference.id):
        target.check_name_is_free()
        return target.download(client, copy)
    await client.aclose()
    message = f"This box has that file already, as {held.id}."
    if held.id != reference.id:
        held = await target.add_name(held, listing.record)
        message = f"{message[:-1]}, and serves it as {held.id} too."
    return target.done(held, copy.digest, message)


async def from_peers(
    box: Box, network: Network, wanted: Pull, actor: Actor, request_id: str = ""
) -> AsyncIterator[PullProgress]:
    """Start a copy from other boxes; return its progress.  If nobody reads that any more, the copy
    stops.  Raises Conflict, ModelNotFound, PeerNotFound, InvalidBody."""
    _check_digest(wanted)
    name = _name_here(wanted)
    if len(wanted.model) > MAX_NAME:
        raise InvalidBody(
            f"it has more than {MAX_NAME} characters: no peer has such a model",
            loc=("body", "model"),
        )
    open_stream = partial(network.open, purpose=PURPOSE)
    try:
        offers, unusable = await download.find(
            open_stream, _sources(network, wanted), wanted.model, wanted.digest
        )
    except CopyFailed as error:
        raise Conflict(error.message) from error
    offer = next(iter(offers.values()))
    held = await present(box, offer.digest, offer.size)
    target = Target(box, name, actor, request_id)
    target.check_is_no_alias()
    if held is None:
        target.check_name_is_free()
        copy = Download(open_stream, offers, catalog.directory(box.config, box.home), name)
        copy.left_out.update(unusable)
        return target.watch(RunningPull(copy, target.run(copy)))
    message = f"This box has that file already, as {held.id}."
    if wanted.as_ is not None and name not in (held.id, f"{held.id}:latest"):
        held = await target.add_name(held)
        message = f"{message[:-1]}, and serves it as {name} too."
    return target.done(held, offer.digest, message)


def _check_digest(wanted: Pull) -> None:
    """Raises InvalidBody."""
    if wanted.digest and not re.fullmatch(r"[0-9a-f]{8,64}", wanted.digest):
        raise InvalidBody(
            f"'{wanted.digest}' is not a digest: write 8 to 64 hex digits of one.",
            loc=("body", "digest"),
        )


def _name_here(wanted: Pull) -> str:
    """The name on this box, with its tag.  Raises InvalidBody."""
    given, field_name = (wanted.model, "model") if wanted.as_ is None else (wanted.as_, "as")
    name = with_tag(given)
    if not is_model_id(name):
        raise InvalidBody(
            f"'{given}' is not a model name: write it as name:tag.", loc=("body", field_name)
        )
    if "/" in name:
        raise InvalidBody(
            f"'{given}' cannot be the name of a file: give the model another name here (--as).",
            loc=("body", field_name),
        )
    return name


def _sources(network: Network, wanted: Pull) -> list[DownloadSource]:
    """The peers to ask.  Raises PeerNotFound, ModelNotFound."""
    if wanted.from_ != ANY:
        peer = network.peer(wanted.from_)
        return [DownloadSource(peer.node_id, peer.name)]
    offers = {
        peer: peer.advert.models
        for peer in sorted(network.peers(), key=lambda peer: peer.state != "connected")
        if peer.advert is not None and peer.state != "revoked" and not peer.gone
    }
    sources = [
        DownloadSource(peer.node_id, peer.name)
        for peer, models in offers.items()
        if any(_matches(offer, wanted) for offer in models)
    ]
    if not sources:
        ids = {offer.id for models in offers.values() for offer in models}
        offered = ", ".join(sorted(filter(is_model_id, ids)))
        raise ModelNotFound(
            f"No peer offers {wanted.model}. Offered: {offered or 'nothing'}.", param="model"
        )
    return sources


def _matches(offer: Offer, wanted: Pull) -> bool:
    if wanted.digest:
        return offer.digest.hex().startswith(wanted.digest)
    return offer.id in spellings(wanted.model)
