"""Any application, served as a box is, in the event loop of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from hypercorn.asyncio import serve as hypercorn_serve

from pinaivu_box.server import serve
from tests.support.waiting import DEADLINE, soon

App = Callable[[Any, Any, Any], Awaitable[None]]


@asynccontextmanager
async def served(app: App) -> AsyncIterator[int]:
    """Its port."""
    listener = serve.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config = serve._Config()
    config.bind, config.errorlog = [f"fd://{listener.detach()}"], None
    config.keep_alive_timeout = DEADLINE
    over = asyncio.Event()
    running = asyncio.create_task(hypercorn_serve(app, config, shutdown_trigger=over.wait))
    try:
        yield port
    finally:
        over.set()
        await soon(running)
