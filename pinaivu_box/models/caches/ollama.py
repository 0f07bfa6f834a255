"""Ollama's folder: `manifests/HOST/NAMESPACE/NAME/TAG`, and `blobs/sha256-HEX` with the layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pinaivu_box.models import folder_scan, image_manifest
from pinaivu_box.models.caches.cache import CachedModel, inside, read_document
from pinaivu_box.models.folder_scan import FolderScan
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.image_manifest import ImageManifest, Layer, NoModel
from pinaivu_box.models.names import RULE, is_model_id
from pinaivu_box.models.record import ModelParameters, ModelRecord
from pinaivu_box.models.regular_files import stat_regular

MANIFESTS = "manifests"
_OWN_HOST, _OWN_NAMESPACE = "registry.ollama.ai", "library"  # left out of names
_DEPTH = 4  # of a manifest
_MAX_MANIFEST_BYTES = 1024 * 1024


def find(root: Path) -> FolderScan:
    """The manifests.  Raises BadGguf, OSError."""
    folder = inside(root, root / MANIFESTS)
    found = folder_scan.scan(folder, suffix="", links=False)
    found.files = [path for path in found.files if len(path.relative_to(folder).parts) == _DEPTH]
    return found


def read(root: Path, files: Sequence[Path], not_served: dict[Path, str]) -> list[CachedModel]:
    models = []
    for path in files:
        try:
            models.append(_model(root, path))
        except (NoModel, BadGguf, OSError) as error:
            not_served[path] = getattr(error, "strerror", None) or str(error)
    return models


def _model(root: Path, path: Path) -> CachedModel:
    """Raises NoModel, BadGguf, OSError."""
    host, namespace, name, tag = path.parts[-_DEPTH:]
    model_id = _id(host, namespace, name, tag)
    if not is_model_id(model_id):
        raise BadGguf(f"its path is no model id ({RULE})")
    data = read_document(root, path, _MAX_MANIFEST_BYTES)
    try:
        manifest = msgspec.json.decode(data, type=ImageManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadGguf(f"it is no manifest of a model: {error}") from error
    layers = image_manifest.model_layers(manifest)
    weights = _file(root, layers.weights, "weights")
    projector = layers.projector and _file(root, layers.projector, "projector")
    license_, system, params = (
        image_manifest.joined([_text(root, layer) for layer in layers.texts[kind]])
        for kind in image_manifest.TEXTS
    )
    source = f"{host}/{namespace}/{name}:{tag}"
    parameters = ModelParameters.parse(params)
    sees = str(projector) if projector else ""
    record = ModelRecord(model_id, source, license_, system, parameters, sees)
    return CachedModel(model_id, (weights,), record)


def _id(host: str, namespace: str, name: str, tag: str) -> str:
    """As Ollama writes it, with the port of a host as `registry.reference` has it."""
    if host != _OWN_HOST:
        return f"{host.replace(':', '_')}/{namespace}/{name}:{tag}"
    return f"{name}:{tag}" if namespace == _OWN_NAMESPACE else f"{namespace}/{name}:{tag}"


def _blob(root: Path, layer: Layer) -> Path:
    return root / "blobs" / layer.digest.replace(":", "-")


def _file(root: Path, layer: Layer, what: str) -> Path:
    """Raises BadGguf, OSError."""
    path = inside(root, _blob(root, layer))
    if (size := stat_regular(path).st_size) != layer.size:
        raise BadGguf(
            f"its {what}: {size:,} bytes, and it says {layer.size:,}: pull it again with ollama"
        )
    return path


def _text(root: Path, layer: Layer) -> bytes:
    """Raises BadGguf, OSError."""
    data = read_document(root, _blob(root, layer), layer.size)
    if hashlib.sha256(data).hexdigest() != layer.sha256:
        raise BadGguf(
            f"its layer {layer.digest[:19]} is not what its digest says: pull it again with ollama"
        )
    return data
