"""The folder of older versions of llama.cpp: `OWNER_REPO_FILE.gguf`, and beside it
`manifest=OWNER=REPO=TAG.json`, which says what file of which repository that is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct, field

from pinaivu_box.models.caches import gguf_files
from pinaivu_box.models.caches.cache import CachedModel, read_document
from pinaivu_box.models.folder_scan import MAX_ENTRIES, MAX_FILES, SUFFIX, FolderScan
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.names import with_tag

MANIFEST, _ENDING = "manifest=", ".json"
_MAX_MANIFEST_BYTES = 1024 * 1024


class _File(Struct, frozen=True):
    name: str = field(name="rfilename")


class _Manifest(Struct, frozen=True):
    """What the Hub answers when it is asked for a model by its tag."""

    file: _File = field(name="ggufFile")


def find(root: Path) -> FolderScan:
    """Raises OSError."""
    names = [name for name in _names(root) if name.lower().endswith(SUFFIX)]
    return FolderScan([root / name for name in names[:MAX_FILES]])


def _names(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in islice(entries, MAX_ENTRIES))


def read(root: Path, files: Sequence[Path], not_served: dict[Path, str]) -> list[CachedModel]:
    """What a manifest names is called as llama.cpp calls it, OWNER/REPO:TAG; others after their
    file."""
    ids: dict[str, str] = {}
    for name in _names(root):
        if name.startswith(MANIFEST) and name.endswith(_ENDING):
            try:
                file, model_id = _described(root, name)
                ids[file] = model_id
            except (BadGguf, OSError) as error:
                not_served[root / name] = getattr(error, "strerror", None) or str(error)

    def name_of(path: Path, stem: str) -> str:
        return ids.get(path.name) or with_tag(stem)

    return gguf_files.models(root, files, not_served, name_of)


def _described(root: Path, name: str) -> tuple[str, str]:
    """The name of a file and the id of its model.  Raises BadGguf, OSError."""
    owner, _, rest = name.removeprefix(MANIFEST).removesuffix(_ENDING).partition("=")
    repository, _, tag = rest.partition("=")
    data = read_document(root, root / name, _MAX_MANIFEST_BYTES)
    try:
        manifest = msgspec.json.decode(data, type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadGguf(f"it is no manifest of llama.cpp: {error}") from error
    file = f"{owner}_{repository}_{manifest.file.name}".replace("/", "_")
    if tag in ("", "latest"):  # llama.cpp then shows the quantisation that it got
        return file, gguf_files.of_repository(f"{owner}/{repository}", file[: -len(SUFFIX)])
    return file, f"{owner}/{repository}:{tag}"
