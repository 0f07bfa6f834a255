"""What a member says that asks another for something, frame by frame."""

from __future__ import annotations

from typing import Any

import msgspec
from ulid import ULID

from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.gateway.backend import Job
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.codec import to_task
from pinaivu_box.models.catalog import remote
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN
from pinaivu_box.transport.link import Stream
from tests.support.fake_model import DEAR, FAKE
from tests.support.three_boxes import ThreeBoxes
from tests.support.waiting import soon

PRICES = (DEAR, DEAR, DEAR)


def task(world: ThreeBoxes, text: str = "Hello", **more: Any) -> leg_wire.Task:
    digest = world.carl.models[0].digest.hex()
    job = Job(
        f"req_{ULID()}".lower(), remote(FAKE, digest), [{"role": "user", "content": text}],
        SamplingParams(seed=7), 20, [], "",
    )  # fmt: skip
    return msgspec.structs.replace(to_task(job), **more)


def ask(world: ThreeBoxes, text: str = "Hello", **more: Any) -> leg_wire.LegRequest:
    digest = world.carl.models[0].digest.hex()
    return leg_wire.LegRequest(task(world, text, **more), digest, [], PRICES, "credits")


async def opened(world: ThreeBoxes) -> Stream:
    stream: Stream = await soon(world.carl.network.open(world.ben.node_id, leg_wire.PURPOSE))
    return stream


async def heard(stream: Stream) -> list[leg_wire.ToCoordinator]:
    """All that ben says, up to its end."""
    found = []
    while (one := await soon(leg_wire.receive(stream, leg_wire.to_coordinator))) is not None:
        found.append(one)
        if isinstance(one, leg_wire.Outputs) and one.outputs[-1].finish_reason:
            break
    return found


async def served(world: ThreeBoxes, asked: leg_wire.LegRequest) -> tuple[Stream, leg_wire.LegProof]:
    stream = await opened(world)
    await leg_wire.send(stream, asked)
    found = await heard(stream)
    (proved,) = [one for one in found if isinstance(one, leg_wire.LegProof)]
    return stream, proved


async def refused(world: ThreeBoxes, asked: leg_wire.ToServing) -> leg_wire.LegRefused:
    stream = await opened(world)
    await leg_wire.send(stream, asked)
    (found,) = [one for one in await heard(stream) if isinstance(one, leg_wire.LegRefused)]
    await stream.finish()
    return found


async def accept(stream: Stream, signature: bytes) -> None:
    await leg_wire.send(stream, leg_wire.Accepted(signature.hex()))
    await stream.finish()
    while await soon(stream.receive()) is not None:
        pass


def sign(world: ThreeBoxes, proved: leg_wire.LegProof) -> bytes:
    return world.carl.identity.sign(ACCEPTANCE_DOMAIN, proved.signed.encode())


async def entry(world: ThreeBoxes, asked: leg_wire.LegRequest) -> dict[str, Any] | None:
    rows = [dict(one) for one in await world.ben.entries(world.carl)]
    return next((one for one in rows if one["request_id"] == asked.task.request_id), None)
