"""A request on which the box fails in a way that nobody has foreseen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NoReturn

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import Route

from pinaivu_box.config import Config
from pinaivu_box.server.access_log import AccessLog

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def fail(_request: Request) -> NoReturn:
    raise RuntimeError("sesame")


async def asked(path: str, accept: str, box: object) -> httpx.Response:
    app = Starlette(
        routes=[Route("/page", fail), Route("/v1/thing", fail)],
        middleware=[Middleware(AccessLog, answered=lambda _access, _status: None)],
    )
    app.state.box = box
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
        return await client.get(path, headers={"accept": accept})


@pytest.fixture
def box() -> object:
    return SimpleNamespace(config=Config(), identity=SimpleNamespace(node_id="node_" + "0" * 64))


async def test_a_browser_gets_a_page_and_a_program_json(box: object) -> None:
    answer = await asked("/page", "text/html,*/*", box)
    assert answer.status_code == 500 and "The box failed on this request" in answer.text
    assert answer.headers["x-request-id"] in answer.text and "Try again" in answer.text
    for path, accept in (("/page", "*/*"), ("/v1/thing", "text/html")):
        answer = await asked(path, accept, box)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "sesame" not in answer.text


async def test_a_page_that_cannot_be_made_is_no_reason_for_silence() -> None:
    answer = await asked("/page", "text/html", None)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
