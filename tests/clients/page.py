"""The snippets of docs/clients.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/clients.md").read_text()
MODEL = "smollm2:135m"
_ADDRESS = "http://localhost:4001"
_KEY = "sk-pnv-..."


def titles() -> set[str]:
    return set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))


def fenced(title: str, language: str, url: str, key: str) -> str:
    """The block of a section, with the address and key of a box."""
    section = PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(block).replace(_ADDRESS, url).replace(_KEY, key)
