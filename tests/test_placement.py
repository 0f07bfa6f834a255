"""What the placement does, with engines that are numbers; `test_placement_plan` has what it
decides, and `test_placement_devices` the same with real engines."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from pinaivu_box.config import ModelConfig
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.gateway import placement as placements
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.prefix_affinity import PrefixAffinity, ReplicaLoad, choose
from pinaivu_box.models.catalog import Catalog
from tests.support import waiting
from tests.support.engine_stand_in import Machine, StandIn, placement_on

THREE = ("a:300", "b:300", "c:300")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def named(*names: str) -> list[ModelConfig]:
    return [ModelConfig(name=name, path="none") for name in names]


async def ask(placement: Placement, catalog: Catalog, name: str, seconds: float = 0.0) -> None:
    engine = await placement.acquire(catalog.find(name))
    await asyncio.sleep(seconds)
    placement.release(engine)


# -- models that do not fit together ---------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sizes", "at_a_time"),
    [((350,), 1), ((650,), 2), ((350, 310), 2), ((310, 320, 50, 60, 70, 80, 90, 20), 3)],
    ids=["one GPU for one", "one GPU for two", "two GPUs", "eight GPUs"],
)
async def test_200_requests_for_three_models_end_an_engine_for_each_load_and_no_other(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], at_a_time: int
) -> None:
    """The one that is ended is idle, and the cheapest to be without."""
    machine, draw = Machine(*sizes), random.Random(17)
    placement, catalog = placement_on(machine, monkeypatch, *named(*THREE))
    misses = 0
    try:
        for _ in range(200):
            name = draw.choice(THREE)
            before = {e.model_id: placement._set.running(e).cost for e in placement.engines}
            await ask(placement, catalog, name)
            after = placement.loaded
            if name in before:
                assert after == set(before)
                continue
            misses += 1
            gone = set(before) - after
            assert len(gone) == (len(before) == at_a_time)
            assert all(engine.plan.layout.devices != ["CPU"] for engine in placement.engines)
        assert machine.loads == misses
        assert len(placement.loaded) == at_a_time
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_200_requests_at_the_same_time_take_turns_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No engine is ended in use (the stand-in would say so), and all models get their turns."""
    machine, draw = Machine(350), random.Random(3)
    placement, catalog = placement_on(machine, monkeypatch, *named(*THREE))
    monkeypatch.setattr(placements, "_LOOK_SECONDS", 0.01)
    names = [draw.choice(THREE) for _ in range(200)]
    free = asyncio.Semaphore(16)

    async def one(name: str) -> None:
        async with free:
            await ask(placement, catalog, name, 0.002)

    try:
        await waiting.soon(asyncio.gather(*map(one, names)))
        changes = sum(a != b for a, b in itertools.pairwise(names))
        assert 3 <= machine.loads < changes  # requests for the same model shared a turn
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_a_model_that_is_asked_for_all_the_time_makes_way_for_another_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement, catalog = placement_on(Machine(350), monkeypatch, *named("a:300", "b:300"))
    monkeypatch.setattr(placements, "_LOOK_SECONDS", 0.01)
    stop = asyncio.Event()

    async def keep_asking() -> None:
        while not stop.is_set():
            await ask(placement, catalog, "a:300", 0.01)

    clients = [asyncio.create_task(keep_asking()) for _ in range(3)]
    try:
        await waiting.wait_until(lambda: placement.loaded == {"a:300"})
        await waiting.soon(ask(placement, catalog, "b:300"))
        await waiting.wait_until(lambda: placement.loaded == {"a:300"})
        stop.set()
        await waiting.soon(asyncio.gather(*clients))
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_a_request_that_leaves_while_it_waits_for_memory_lets_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement, catalog = placement_on(Machine(350), monkeypatch, *named("a:300", "b:300"))
    monkeypatch.setattr(placements, "_LOOK_SECONDS", 0.01)
    try:
        held = await placement.acquire(catalog.find("a:300"))
        leaving = asyncio.create_task(placement.acquire(catalog.find("b:300")))
        await waiting.wait_until(lambda: placement._must_yield("a:300"))
        waits = asyncio.create_task(ask(placement, catalog, "a:300"))
        await asyncio.sleep(0.05)
        assert not waits.done()
        leaving.cancel()
        await waiting.soon(waits)
        placement.release(held)
    finally:
        await placement.close()


# -- settings of a model ---------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_pinned_model_stays_and_another_goes_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [ModelConfig(name="a:300", path="none", pin=True), *named("b:300", "c:300")]
    placement, catalog = placement_on(Machine(350), monkeypatch, *models, keep_alive="0")
    try:
        await ask(placement, catalog, "a:300")
        await ask(placement, catalog, "b:300")
        await asyncio.sleep(0.5)  # longer than an idle engine stays
        assert placement.loaded == {"a:300"}
        assert await placement.unload("a:300") == 0
        assert placement.loaded == set()
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_models_are_loaded_at_the_start_and_end_none_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (
        ModelConfig(name=name, path="none", preload=True, devices=("CUDA0",))
        for name in ("a:300", "b:300")
    )
    placement, catalog = placement_on(Machine(350), monkeypatch, first, second, *named("c:300"))
    try:
        placement.start()
        await waiting.wait_until(lambda: placement.loaded == {"a:300"})
        assert not placement.starting
        placement.reloaded()
        await asyncio.sleep(0.05)
        assert placement.loaded == {"a:300"}
        await ask(placement, catalog, "b:300")  # a request may
        assert placement.loaded == {"b:300"}
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_keep_alive_and_parallel_of_a_model_are_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = ModelConfig(name="a:100", path="none", keep_alive="0", parallel=3)
    placement, catalog = placement_on(Machine(350), monkeypatch, short, *named("b:100"))
    try:
        assert (placement.places("a:100"), placement.places("b:100")) == (3, 64)
        await ask(placement, catalog, "b:100")
        await ask(placement, catalog, "a:100")
        assert placement.replicas("a:100")[0].ready.max_sequences == 3
        await waiting.wait_until(lambda: placement.loaded == {"b:100"})
    finally:
        await placement.close()


# -- memory that others take -----------------------------------------------------------------------


@pytest.mark.anyio
async def test_memory_of_other_programs_is_respected_and_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placements, "_WATCH_SECONDS", 0.02)
    machine = Machine(350, 320)
    placement, catalog = placement_on(machine, monkeypatch, *named("a:300", "b:300"))
    try:
        placement.start()
        machine.others["CUDA0"] = 100 * 2**20
        await ask(placement, catalog, "a:300")
        (engine,) = placement.engines
        assert engine.plan.layout.devices == ["CUDA1"]
        await asyncio.sleep(0.1)
        assert engine.alive
        machine.others["CUDA1"] = machine.totals["CUDA1"] - 300 * 2**20  # all that is left
        await waiting.wait_until(lambda: not engine.alive)
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_a_load_without_memory_is_planned_once_more_and_then_refused_with_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(350, 340)
    placement, catalog = placement_on(machine, monkeypatch, *named("a:300", "b:300"))

    async def read(*, anew: bool = False) -> object:
        devices = await Machine.read(machine)
        machine.others.update(CUDA0=machine.totals["CUDA0"])  # once somebody has looked
        return devices

    monkeypatch.setattr(machine, "read", read)
    try:
        await ask(placement, catalog, "a:300")
        assert placement.engines[0].plan.layout.devices == ["CUDA1"]
        placement.forget_failures()
        machine.others.update(CUDA1=machine.totals["CUDA1"], CPU=2**40)
        with pytest.raises(
            NoNodesAvailable, match=r"needs about 301 MiB of memory and 0 MiB on CUDA0"
        ):
            await ask(placement, catalog, "b:300")
    finally:
        await placement.close()


# -- replicas --------------------------------------------------------------------------------------


def test_a_request_goes_where_its_prefix_is_unless_that_replica_is_much_busier() -> None:
    beginning = tuple(bytes([n]) for n in range(16))  # 8 KiB: about 2,000 tokens
    warm = 16 * 512
    assert choose([ReplicaLoad(0, 8), ReplicaLoad(0, 8, warm)], beginning) == 1
    assert choose([ReplicaLoad(0, 8), ReplicaLoad(5, 8, warm)], beginning) == 1
    assert choose([ReplicaLoad(0, 8), ReplicaLoad(9, 16, warm)], beginning) == 0
    assert choose([ReplicaLoad(0, 8), ReplicaLoad(2, 2, warm)], beginning) == 0
    assert choose([ReplicaLoad(3, 8), ReplicaLoad(2, 8)], ()) == 1


def test_what_is_remembered_of_prefixes_is_bounded() -> None:
    affinity: PrefixAffinity[int] = PrefixAffinity(max_entries=100)
    beginnings = [tuple(f"{n}.{k}".encode() for k in range(10)) for n in range(50)]
    for number, beginning in enumerate(beginnings):
        affinity.note(number % 2, beginning)
    assert affinity.matched(0, beginnings[0]) == 0
    assert affinity.matched(1, beginnings[49]) == 5120
    assert affinity.matched(0, beginnings[49]) == 0
    assert affinity.matched(1, (*beginnings[49][:4], b"other")) == 2048


@pytest.mark.anyio
async def test_conversations_stay_with_their_replica_and_new_ones_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placements, "_BUSY_SECONDS", 0.0)
    machine = Machine(350, 340, 330)
    placement, catalog = placement_on(machine, monkeypatch, *named("a:300"), max_sequences=2)
    model = catalog.find("a:300")
    conversations = [tuple(f"{n}.{k}".encode() for k in range(8)) for n in range(3)]
    try:
        held = [await placement.acquire(model, conversations[0]) for _ in range(3)]
        await waiting.wait_until(lambda: len(placement.engines) == 2)
        held += [await placement.acquire(model, conversations[1]) for _ in range(3)]
        await waiting.wait_until(lambda: len(placement.engines) == 3)
        devices = [engine.plan.layout.devices for engine in placement.engines]
        assert sorted(devices) == [["CUDA0"], ["CUDA1"], ["CUDA2"]]
        for engine in held:
            placement.release(engine)
        homes = []
        for conversation in conversations[:2]:
            engine = await placement.acquire(model, conversation)
            placement.release(engine)
            homes.append(engine)
        assert homes == [held[0], held[3]] and homes[0] is not homes[1]
        lost = homes[0]
        assert isinstance(lost, StandIn)
        lost.end()
        await waiting.wait_until(lambda: len(placement.engines) == 2)
        assert placement.failing(model) is None and homes[1].alive
        assert await placement.unload("a:300") == 0
        assert placement.loaded == set()
    finally:
        await placement.close()
