"""The packages of OpenAI and Ollama for Node, installed once."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class NodePackage:
    """Scripts in `folder` find the packages."""

    program: str
    folder: Path


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> NodePackage:
    program, npm = shutil.which("node"), shutil.which("npm")
    if not program or not npm:
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("node")
    try:
        done = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "openai", "ollama"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not come to an end here")
    if done.returncode != 0:
        pytest.skip(f"npm cannot install them here: {done.stderr[-200:]}")
    return NodePackage(program, folder)
