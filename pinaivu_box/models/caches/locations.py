"""Where the folders are that `model_caches` names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pinaivu_box.models.caches import hub, llama_cpp, lm_studio, ollama
from pinaivu_box.models.caches.cache import LLAMA_CPP, LM_STUDIO, OLLAMA, Cache, CacheLayout
from pinaivu_box.models.regular_files import expanded

_HOME = Path("~")
# Where Ollama's installer for Linux has its service keep models.
_OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")
_HUB_VARIABLES = (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"))


def caches(names: Sequence[str]) -> list[Cache]:
    """The folders of these programs, and the folders at these paths."""
    return [cache for name in names for cache in _caches(name)]


def _caches(name: str) -> list[Cache]:
    match name:
        case "ollama":
            own = os.environ.get("OLLAMA_MODELS")
            folders = [Path(own)] if own else [_HOME / ".ollama/models", _OLLAMA_SERVICE]
            return [Cache(OLLAMA, root, ollama) for root in _present(folders)]
        case "lm-studio":
            folders = [_HOME / ".lmstudio/models", _HOME / ".cache/lm-studio/models"]
            return [Cache(LM_STUDIO, root, lm_studio) for root in _present(folders)]
        case "llama.cpp":
            folders = _present(_of_llama_cpp())
            layouts: tuple[CacheLayout, ...] = (hub, llama_cpp)
            return [Cache(LLAMA_CPP, root, layout) for root in folders for layout in layouts]
    (root,) = _present([Path(name)])
    return _by_layout(root)


def _of_llama_cpp() -> list[Path]:
    """What llama.cpp itself would use, and its folder of before."""
    if own := os.environ.get("LLAMA_CACHE"):
        return [Path(own)]
    general = Path(os.environ.get("XDG_CACHE_HOME") or _HOME / ".cache")
    hubs = [
        Path(os.environ[name]) / below for name, below in _HUB_VARIABLES if os.environ.get(name)
    ]
    return [hubs[0] if hubs else general / "huggingface/hub", general / "llama.cpp"]


def _present(folders: Sequence[Path]) -> list[Path]:
    """Those that exist, without links; the first if none does, so that it can be named."""
    real = [Path(os.path.realpath(expanded(folder))) for folder in folders]
    there = [folder for folder in real if os.path.isdir(folder)]  # noqa: PTH112 - which raises
    return list(dict.fromkeys(there)) or real[:1]


def _by_layout(root: Path) -> list[Cache]:
    """The cache of whichever program has arranged this folder."""
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError:
        names = []
    found = []
    if ollama.MANIFESTS in names:
        found.append(Cache(OLLAMA, root, ollama))
    if any(name.startswith(hub.PREFIX) for name in names):
        found.append(Cache(LLAMA_CPP, root, hub))
    if any(name.startswith(llama_cpp.MANIFEST) for name in names):
        found.append(Cache(LLAMA_CPP, root, llama_cpp))
    return found or [Cache(LM_STUDIO, root, lm_studio)]
