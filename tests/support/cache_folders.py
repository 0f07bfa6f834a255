"""Folders with models as Ollama, LM Studio and llama.cpp arrange them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.support.registry_server import MANIFEST

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put_ollama(root: Path, name: str, weights: bytes, **layers: str | bytes) -> Path:
    """`name` as registry.ollama.ai/library/llama3.2/1b.  Returns the manifest's path."""
    described = []
    contents: dict[str, bytes | str] = {"model": weights, **layers}
    for kind, content in contents.items():
        data = content.encode() if isinstance(content, str) else content
        digest = hashlib.sha256(data).hexdigest()
        put(root / "blobs" / f"sha256-{digest}", data)
        described.append(
            {
                "mediaType": f"application/vnd.ollama.image.{kind}",
                "digest": f"sha256:{digest}",
                "size": len(data),
            }
        )
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": described}
    return put(root / "manifests" / name, json.dumps(manifest))


def put_hub(root: Path, repository: str, name: str, data: bytes) -> Path:
    """Returns the path of the file in its snapshot, a link."""
    folder = root / f"models--{repository.replace('/', '--')}"
    blob = put(folder / "blobs" / hashlib.sha256(data).hexdigest(), data)
    put(folder / "refs/main", COMMIT)
    link = folder / "snapshots" / COMMIT / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return link


def put_llama_cpp(root: Path, repository: str, tag: str, name: str, data: bytes) -> Path:
    owner, _, repo = repository.partition("/")
    described = json.dumps({"ggufFile": {"rfilename": name}})
    put(root / f"manifest={owner}={repo}={tag}.json", described)
    return put(root / f"{owner}_{repo}_{name}", data)
