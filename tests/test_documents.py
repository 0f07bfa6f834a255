"""The documentation as a whole: links and anchors lead somewhere, every page is reached, what is
configuration is accepted, and programs name pages that exist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box import config
from tests.support.documents import PAGES, README, ROOT, Block, Link, anchors, blocks, links, read

# Programs and pages in which a path of the documentation may stand.
SOURCES = [
    *(ROOT / "pinaivu_box").rglob("*.py"),
    *(ROOT / "pinaivu_box" / "server").rglob("*.html"),
    *(ROOT / "pinaivu_box" / "server").rglob("*.js"),
    *(
        path
        for path in (ROOT / "build").iterdir()
        if path.is_file() and path.suffix in ("", ".py", ".sh")
    ),
    ROOT / "sample.toml",
]


def resolved(link: Link) -> tuple[str, str]:
    """The path from the root of the repository, and the anchor."""
    path, _, anchor = link.target.partition("#")
    if not path:
        return link.page, anchor
    return os.path.normpath(Path(link.page).parent / path), anchor


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page: str) -> None:
    missing = []
    for link in links(page):
        path, anchor = resolved(link)
        if not (ROOT / path).exists() or (anchor and anchor not in anchors(path)):
            missing.append(link.target)
    assert not missing


def test_every_page_is_reached_from_the_readme() -> None:
    reached: set[str] = set()
    waiting = [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {path for path, _ in map(resolved, links(page))}
        waiting += [target for target in targets & set(PAGES) if target not in reached]
    assert set(PAGES) <= reached


def test_every_page_is_in_the_index() -> None:
    listed = {path for path, _ in map(resolved, links("docs/README.md"))}
    assert {page for page in PAGES if page.startswith("docs/")} - {"docs/README.md"} <= listed


def mentioned() -> Iterator[tuple[Path, str]]:
    for source in SOURCES:
        for path in re.findall(r"(?<!/)\bdocs/[\w.-]+\.md\b", source.read_text()):
            yield source, path


def test_pages_that_programs_name_are_there() -> None:
    missing = {(str(source), path) for source, path in mentioned() if not (ROOT / path).exists()}
    assert not missing


def configurations() -> list[Block]:
    """Those of docs/clients.md are for other programs."""
    found = [block for page in PAGES for block in blocks(page) if page != "docs/clients.md"]
    return [block for block in found if block.language == "toml"]


@pytest.mark.parametrize("block", configurations(), ids=lambda one: f"{one.page}:{one.line}")
def test_what_is_printed_as_configuration_is_accepted(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(block.text)
    config.load(file, environ={})


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(read(README).splitlines()) <= 200
