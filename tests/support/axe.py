"""axe-core, which finds what people with assistive technology cannot use.

It comes from npm into the build's cache, once; no copy is in this repository.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

_VERSION = "4.14.1"
_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
_RUN = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  return found.violations.map(({ id, impact, help, nodes }) => (
    { id, impact, help, nodes: nodes.map((node) => `${node.target}: ${node.failureSummary}`) }
  ));
}"""


def serious_violations(page: Page) -> list[str]:
    """What axe-core calls serious or critical on this page, a text for each; skips the test where
    axe-core cannot be had."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(_source())  # no script of the page's, so its CSP does not count
    found: list[dict[str, Any]] = page.evaluate(_RUN)
    return [
        f"{one['id']} ({one['help']}): {'; '.join(one['nodes'][:5])}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@cache
def _source() -> str:
    archive = _cache() / f"axe-core-{_VERSION}.tgz"
    if not archive.exists():
        _fetch(archive)
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != _SHA512:
        raise AssertionError(f"{archive} is not axe-core {_VERSION}: delete it")
    with tarfile.open(archive) as files:
        script = files.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def _fetch(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = ["npm", "pack", "--silent", f"axe-core@{_VERSION}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"axe-core cannot be had from npm: {error}")
        (archive,) = Path(folder).iterdir()
        archive.rename(target)


def _cache() -> Path:
    """As `build/environment.cache` finds it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return Path(os.environ.get("PINAIVU_BUILD_CACHE") or home / "pinaivu-build")
