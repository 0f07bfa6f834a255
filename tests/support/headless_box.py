"""A whole box with peering in a process of its own: `tests.support.headless_box HOME [COMMAND...]`.

`invite` prints a ticket, `join TICKET` redeems one; then it prints its peers as a line of JSON
whenever they change, until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pinaivu_box import config
from pinaivu_box.box_services import open_box
from pinaivu_box.network.network import Network
from pinaivu_box.network.peer import Peer

SETTINGS: dict[tuple[str, ...], Any] = {
    ("peering", "enabled"): True,
    ("peering", "host"): "127.0.0.1",
    ("peering", "port"): 0,
}


def seen(peer: Peer) -> dict[str, object]:
    models = [offer.id for offer in peer.advert.models] if peer.advert else None
    return {"state": peer.state, "models": models, "why": peer.why}


async def tell(network: Network) -> None:
    told = ""
    while True:
        line = json.dumps({peer.name: seen(peer) for peer in network.peers()})
        if line != told:
            print(line, flush=True)
            told = line
        await asyncio.sleep(0.05)


async def main(home: Path, *command: str) -> None:
    fake = config.ModelConfig(name="fake:1", path="fake:0")
    overrides = {**SETTINGS, ("peering", "name"): home.name}
    load = partial(config.load, None, environ={}, overrides=overrides, extra_models=[fake])
    async with open_box(load, home) as box:
        assert box.network is not None
        if command[:1] == ("invite",):
            print(json.dumps({"ticket": await box.network.invite(uses=9)}), flush=True)
        elif command[:1] == ("join",):
            await box.network.join(command[1])
        telling = asyncio.create_task(tell(box.network))
        await asyncio.to_thread(sys.stdin.read)
        telling.cancel()
        await box.drain()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
