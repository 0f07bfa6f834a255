"""What several files share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.network_sites import SiteGroup
from tests.support.peer_box import MakePeerBox, PeerBox
from tests.support.three_boxes import ThreeBoxes, three_boxes
from tests.support.waiting import soon


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeBoxes]:
    async with three_boxes(tmp_path_factory.mktemp("company")) as found:
        yield found


@pytest.fixture
def member(tmp_path: Path) -> Iterator[MakePeerBox]:
    """`member(name, more_settings, *serve_args)`: not started."""
    made: list[PeerBox] = []

    def make(name: str, more: str = "", *args: str) -> PeerBox:
        made.append(PeerBox(tmp_path / name, name, more, *args))
        return made[-1]

    yield make
    for one in made:
        if hasattr(one, "process"):
            one.end()


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[SiteGroup]:
    made = SiteGroup(tmp_path)
    yield made
    for site in made.sites:
        if not site.running.done():
            await soon(site.close())
