"""What a registry has under a name: the files of a model, and what it says about them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from msgspec import Meta, Struct, field

from pinaivu_box.errors import PullFailed, quoted
from pinaivu_box.models import projectors, splits
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.image_manifest import (
    ImageManifest,
    Layer,
    NoModel,
    Size,
    joined,
    model_layers,
)
from pinaivu_box.models.record import ModelParameters, ModelRecord
from pinaivu_box.registry.client import HttpStatus, RegistryClient
from pinaivu_box.registry.reference import HubModel, RegistryModel, UrlModel, host_of
from pinaivu_box.text import END, whole

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_DEFAULT_QUANTS = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "Q8_0")  # the first that there is


class LargeFile(Struct):
    """How the Hub describes a file that is too large for Git."""

    sha256: Annotated[str, Meta(pattern=whole("[0-9a-f]{64}"))]
    size: Size


class Sibling(Struct):
    """A file of a repository of the Hub."""

    rfilename: str
    lfs: LargeFile | None = None


class CardData(Struct):
    license: Any = None
    license_name: Any = None


class Repository(Struct):
    """A repository of the Hub at one commit."""

    sha: Annotated[str, Meta(pattern=whole("[0-9a-f]{40,64}"))]
    siblings: Annotated[list[Sibling], Meta(max_length=100_000)]
    card: CardData | None = field(name="cardData", default=None)


@dataclass(frozen=True)
class RemoteFile:
    """A file of `size` bytes; None where only a request for it tells.  `digest` is its SHA-256 in
    hex, None where nobody tells it beforehand."""

    url: str
    size: int | None
    digest: str | None


@dataclass(frozen=True)
class Listing:
    """A model as a registry has it: its files in the order of its parts, and what is said about
    it."""

    files: tuple[RemoteFile, ...]
    record: ModelRecord
    projector: RemoteFile | None = None


async def of_registry(client: RegistryClient, model: RegistryModel) -> Listing:
    """Read a manifest and the small layers of it that count here.  Raises PullFailed."""
    base = f"{model.base}/v2/{model.repository}"
    try:
        manifest = await client.document(
            f"{base}/manifests/{model.tag}", ImageManifest, accept=f"{_MANIFEST}, {_OCI_MANIFEST}"
        )
    except HttpStatus as error:
        raise _explained(error, model.id) from error
    try:
        layers = model_layers(manifest)
    except NoModel as error:
        raise PullFailed(f"{model.id} {error}.") from error

    async def text_of(kind: str) -> str:
        return joined([await _blob(client, base, layer) for layer in layers.texts[kind]])

    record = ModelRecord(
        model.id,
        f"{host_of(base)}/{model.repository}:{model.tag}",
        await text_of("license"),
        await text_of("system"),
        ModelParameters.parse(await text_of("params")),
    )

    def file_of(layer: Layer) -> RemoteFile:
        return RemoteFile(f"{base}/blobs/{layer.digest}", layer.size, layer.sha256)

    projector = file_of(layers.projector) if layers.projector is not None else None
    return Listing((file_of(layers.weights),), record, projector)


async def _blob(client: RegistryClient, base: str, layer: Layer) -> bytes:
    """Raises PullFailed, also if it is not what its digest says."""
    url = f"{base}/blobs/{layer.digest}"
    data = await client.download(url, max_bytes=layer.size)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != layer.digest:
        raise PullFailed(f"A part of the description from {url} is not what its digest says.")
    return data


async def of_hub(client: RegistryClient, model: HubModel) -> Listing:
    """Choose files of a repository.  Raises PullFailed."""
    url = f"{model.base}/api/models/{model.repository}?blobs=true"
    try:
        repository = await client.document(url, Repository)
    except HttpStatus as error:
        if error.status in (401, 403):
            raise PullFailed(
                f"{model.repository} is private or needs its terms accepted: accept them on "
                f"{model.base}/{model.repository}, and set HF_TOKEN for the box."
            ) from error
        raise _explained(error, model.id) from error
    large = {s.rfilename: s.lfs for s in repository.siblings if s.lfs is not None}
    names = choose(list(large), model.choice)
    if not names:
        raise PullFailed(_no_such_file(model, list(large)))
    if (part := splits.parse(names[0].rpartition("/")[2])) and len(names) < part.count:
        raise PullFailed(f"{model.repository} lacks some of the {part.count} parts of {names[0]}.")

    def file_of(name: str) -> RemoteFile:
        url = f"{model.base}/{model.repository}/resolve/{repository.sha}/{quote(name)}"
        return RemoteFile(url, large[name].size, large[name].sha256)

    card = repository.card or CardData()
    license_ = card.license_name or card.license
    source = f"{host_of(model.base)}/{model.repository}@{repository.sha[:12]}/{names[0]}"
    projector = projectors.choose(list(large), names[0])
    return Listing(
        tuple(map(file_of, names)),
        ModelRecord(model.id, source, license_ if isinstance(license_, str) else ""),
        file_of(projector) if projector else None,
    )


def of_url(model: UrlModel) -> Listing:
    return Listing((RemoteFile(model.url, None, None),), ModelRecord(model.id, model.url))


def choose(names: list[str], choice: str) -> list[str]:
    """The GGUF files of a repository that are the model: all parts of it, in order.

    `choice` is the name of a file (of any part), with or without its ending, or a quantisation;
    empty for the usual one.
    """
    models: dict[str, dict[int, str]] = {}
    for name in names:
        file = name.rpartition("/")[2]
        if not file.lower().endswith(".gguf") or projectors.MARK in file.lower():
            continue
        try:
            part = splits.parse(file)
        except BadGguf:
            continue
        stem = name.removesuffix(file) + (part.stem if part else file[: -len(".gguf")])
        models.setdefault(stem, {})[part.number if part else 1] = name
    for wanted in (choice,) if choice else _DEFAULT_QUANTS:
        for stem in sorted(models, key=lambda stem: (stem.count("/"), len(stem), stem)):
            if _is_called(stem, wanted):
                return [models[stem][number] for number in sorted(models[stem])]
    if not choice and models:
        stem = min(models)
        return [models[stem][number] for number in sorted(models[stem])]
    return []


def _is_called(stem: str, wanted: str) -> bool:
    """Whether a file's name is `wanted`, or ends in it as its quantisation."""
    file = stem.rpartition("/")[2].lower()
    wanted = splits.stem_of(wanted).lower() if wanted.lower().endswith(".gguf") else wanted.lower()
    return (
        file == wanted or re.search(rf"(?:^|[^a-z0-9]){re.escape(wanted)}{END}", file) is not None
    )


def _no_such_file(model: HubModel, names: list[str]) -> str:
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if not ggufs:
        return (
            f"{model.repository} has no GGUF files: look for a repository of the same model that "
            "has some (its name often ends in -GGUF)."
        )
    shown = ", ".join(quoted(name) for name in ggufs[:12])
    return f"{model.repository} has no file for '{quoted(model.choice)}'. It has: {shown}."


def _explained(error: HttpStatus, model_id: str) -> PullFailed:
    if error.status == 404:
        return PullFailed(f"{error.host} has no model {model_id}: check its name and tag.")
    if error.status in (401, 403):
        return PullFailed(f"{error.host} does not give {model_id} to everybody, or has no such.")
    return error
