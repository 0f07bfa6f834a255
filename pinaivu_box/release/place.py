"""The page where releases are published."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from importlib.metadata import metadata
from pathlib import Path

PROJECT = "pinaivu-box"
# A clone has it beside the package, and the executable, too (pinaivu.spec).
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def releases_url(environ: Mapping[str, str] = os.environ) -> str:
    """Its URL without a slash at the end: `PINAIVU_RELEASES`, or else `Releases` in the project's
    URLs, which pyproject.toml names and an installed package has in its metadata."""
    return (environ.get("PINAIVU_RELEASES") or _project_urls()["Releases"]).rstrip("/")


def _project_urls() -> dict[str, str]:
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        if project["name"] == PROJECT:
            return dict(project["urls"])
    lines = metadata(PROJECT).get_all("Project-URL") or []
    return dict(line.split(", ", 1) for line in lines)
