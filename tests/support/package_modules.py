"""The modules of the package."""

from __future__ import annotations

from pathlib import Path

from tests.support.paths import ROOT

PACKAGE = "pinaivu_box"
# Library -> what the names of modules begin with that may import it.
ONLY_IN = {
    "llama_cpp": "engine.llama_",
    "iroh": "transport.iroh_",
    "pynvml": "nvml",
    "zeroconf": "transport.lan",
}


def modules() -> dict[str, Path]:
    """Every module by its name inside the package; "" is the package itself."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def in_engine(module: str) -> bool:
    """Whether it belongs to the child alone."""
    return module.split(".")[0] == "engine" and module != "engine.messages"
