"""What a member says that asks another for something, frame by frame."""

from __future__ import annotations

from typing import Any

import msgspec
from ulid import ULID

from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.tasks import to_task
from pinaivu_box.models.catalog import remote
from pinaivu_box.peering import work
from pinaivu_box.peering.transport import Stream
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN
from tests.peering.company import DEAR, FAKE, World
from tests.peering.worlds import soon

PRICES = (DEAR, DEAR, DEAR)


def task(world: World, text: str = "Hello", **more: Any) -> work.Task:
    digest = world.carl.models[0].digest.hex()
    job = Job(
        f"req_{ULID()}".lower(), remote(FAKE, digest), [{"role": "user", "content": text}],
        SamplingParams(seed=7), 20, [], "",
    )  # fmt: skip
    return msgspec.structs.replace(to_task(job), **more)


def ask(world: World, text: str = "Hello", **more: Any) -> work.Ask:
    digest = world.carl.models[0].digest.hex()
    return work.Ask(task(world, text, **more), digest, [], PRICES, "credits")


async def opened(world: World) -> Stream:
    return await soon(world.carl.network.open(world.ben.node_id, work.PURPOSE))


async def heard(stream: Stream) -> list[work.ToCoordinator]:
    """All that ben says, up to its end."""
    found = []
    while (one := await soon(work.receive(stream, work.to_coordinator))) is not None:
        found.append(one)
        if isinstance(one, work.Outputs) and one.outputs[-1].finish_reason:
            break
    return found


async def served(world: World, asked: work.Ask) -> tuple[Stream, work.Proved]:
    stream = await opened(world)
    await work.send(stream, asked)
    found = await heard(stream)
    (proved,) = [one for one in found if isinstance(one, work.Proved)]
    return stream, proved


async def refused(world: World, asked: work.ToServing) -> work.Refused:
    stream = await opened(world)
    await work.send(stream, asked)
    (found,) = [one for one in await heard(stream) if isinstance(one, work.Refused)]
    await stream.finish()
    return found


async def accept(stream: Stream, signature: bytes) -> None:
    await work.send(stream, work.Accepted(signature.hex()))
    await stream.finish()
    while await soon(stream.receive()) is not None:
        pass


def sign(world: World, proved: work.Proved) -> bytes:
    return world.carl.identity.sign(ACCEPTANCE_DOMAIN, proved.signed.encode())


async def entry(world: World, asked: work.Ask) -> dict[str, Any] | None:
    rows = [dict(one) for one in await world.ben.entries(world.carl)]
    return next((one for one in rows if one["request_id"] == asked.task.request_id), None)
