"""What several files share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.three_boxes import World, company


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with company(tmp_path_factory.mktemp("company")) as found:
        yield found
