"""Image manifests, as Ollama's registry and its cache folder have them: the layers of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct, field

from pinaivu_box.text import whole

_OLLAMA = "application/vnd.ollama.image."
_MAX_TEXT_BYTES = 128 * 1024  # of all layers of a kind, such as the licences
TEXTS = ("license", "system", "params")  # kinds of layers that say something about a model

Size = Annotated[int, Meta(ge=1, le=2**50)]


class Layer(Struct, frozen=True):
    """A part of a manifest."""

    media_type: str = field(name="mediaType")
    digest: Annotated[str, Meta(pattern=whole("sha256:[0-9a-f]{64}"))]
    size: Size

    @property
    def sha256(self) -> str:
        return self.digest.removeprefix("sha256:")


class ImageManifest(Struct, frozen=True):
    """An image manifest, version 2, as Docker's registry and Ollama's have them."""

    layers: Annotated[tuple[Layer, ...], Meta(max_length=1024)]


class NoModel(ValueError):
    """Why an image cannot be served, as the end of the sentence "NAME ..."."""


@dataclass(frozen=True)
class ModelLayers:
    """The layers that count here: the weights, by kind those of text, and the projector of a model
    that sees images."""

    weights: Layer
    texts: dict[str, list[Layer]]
    projector: Layer | None = None


def model_layers(manifest: ImageManifest) -> ModelLayers:
    """Raises NoModel."""
    kinds: dict[str, list[Layer]] = {}
    for layer in manifest.layers:
        kinds.setdefault(layer.media_type.removeprefix(_OLLAMA), []).append(layer)
    if "adapter" in kinds:
        raise NoModel("is an adapter (LoRA) for another model: choose that one")
    weights = kinds.get("model", [])
    if len(weights) != 1:
        raise NoModel("has no weights as GGUF there: choose another name")
    texts = {kind: kinds.get(kind, []) for kind in TEXTS}
    for kind, layers in texts.items():
        if sum(layer.size for layer in layers) > _MAX_TEXT_BYTES:
            raise NoModel(
                f"is described by more than {_MAX_TEXT_BYTES:,} bytes of {kind}: that is too much"
            )
    projectors = kinds.get("projector", [])
    if len(projectors) > 1:
        raise NoModel("has more than one projector for images there: choose another name")
    return ModelLayers(weights[0], texts, projectors[0] if projectors else None)


def joined(parts: list[bytes]) -> str:
    """The text of several layers of a kind."""
    return b"\n\n".join(parts).decode("utf-8", "replace")
