"""How `pinaivu peers` reaches the box: the running one, or one that is opened for one question."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pinaivu_box.cli.home import ask_running, load_config
from pinaivu_box.errors import CliError, NotRunning

PATH = "/v1/admin/peers"
# A join may try several addresses.
SECONDS = 40.0


def path_of(peer: str) -> str:
    return f"{PATH}/{quote(peer, safe='')}"


def ask(
    home: Path, config: Path | None, path: str, *, method: str, body: Any, off: str = ""
) -> Any:
    """Ask the box that runs on this home; where none runs, one that lives for this question (but
    not if `off` says why, and peering is off).

    CliError if it refuses.
    """
    try:
        return ask_running(home, path, method=method, body=body, seconds=SECONDS)
    except NotRunning:
        if off and not load_config(home, config).peering.enabled:
            raise CliError(off) from None
        return asyncio.run(_ask_opened(home, config, path, method, body))


async def _ask_opened(home: Path, config: Path | None, path: str, method: str, body: Any) -> Any:
    import httpx

    from pinaivu_box.box import open_box
    from pinaivu_box.server.app import create_app

    def load() -> Any:
        return load_config(home, config, overrides={("peering", "enabled"): True})

    async with open_box(load, home) as box:
        transport = httpx.ASGITransport(create_app(box))
        async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
            answer = await client.request(
                method,
                path,
                headers={"Authorization": f"Bearer {box.control_token}"},
                json=body,
                timeout=SECONDS,
            )
    if answer.is_error:
        raise CliError(answer.json()["error"]["message"])
    return answer.json()
