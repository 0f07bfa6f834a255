"""Models on fake GPUs: real engines, the real model, and devices that refuse what does not fit."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.config import Config, EngineConfig, ModelConfig
from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.engine.messages import CPU, Output, SamplingParams
from pinaivu_box.errors import EngineLost
from pinaivu_box.gateway.backend import Event, Job
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.models import bundled, catalog_loader
from pinaivu_box.models.catalog import Model
from pinaivu_box.settings import BoxSettings, LiveSettings
from tests.support import fake_gpu, waiting

# The model takes about 290 MiB with these sizes, 45 of them for its cache.
SIZES = {"context": 1024, "kv_tokens": 2048, "max_sequences": 4, "keep_alive": "-1"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    yield


class Gpus:
    """Models `m0:1` to `m3:1`, all of the bundled file, on fake GPUs."""

    def __init__(self, settings: dict[str, Any], engine: dict[str, Any]) -> None:
        location = bundled.find()
        assert location is not None
        models = [
            ModelConfig(name=f"m{n}:1", path=str(location.path), **settings.get(f"m{n}", {}))
            for n in range(4)
        ]
        config = Config(engine=EngineConfig(**{**SIZES, **engine}), model=models)
        self.models = catalog_loader.load(config, Path("/nonexistent"))
        live = LiveSettings(BoxSettings(config, self.models))
        self.devices = DeviceMonitor()
        self._ids = itertools.count()
        self.placement = Placement(live, self._digest, self.devices)
        self.backend = LocalBackend(self.placement, "", live)

    async def _digest(self, _: Model) -> str:
        return "00" * 32

    async def load(self, number: int) -> EngineProcess:
        engine = await self.placement.acquire(self.models.find(f"m{number}:1"))
        self.placement.release(engine)
        return engine

    @property
    def loaded(self) -> list[str]:
        return sorted(engine.model_id for engine in self.placement.engines)

    async def tokens(self, number: int) -> int:
        """How many tokens an answer has."""
        job = Job(
            request_id=f"r{next(self._ids)}",
            model=self.models.find(f"m{number}:1"),
            messages=[{"role": "user", "content": "Hello!"}],
            sampling=SamplingParams(ignore_eos=True),
            max_tokens=3,
            stop=[],
            tenant="t",
        )
        events: list[Event] = []
        await self.backend.start(job).run(events.append)
        return sum(len(each.tokens) for each in events if isinstance(each, Output))


@asynccontextmanager
async def gpus(
    monkeypatch: pytest.MonkeyPatch,
    sizes: str,
    settings: dict[str, Any] | None = None,
    *,
    shared: Path | None = None,
    fail: str = "",
    **engine: Any,
) -> AsyncIterator[Gpus]:
    for name, value in fake_gpu.environment(sizes, shared=shared, fail=fail).items():
        monkeypatch.setenv(name, value)
    made = Gpus(settings or {}, engine)
    try:
        yield made
    finally:
        await made.placement.close()
        made.devices.close()


@pytest.mark.anyio
async def test_models_spread_over_unequal_gpus_and_the_cheapest_idle_one_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"m1": {"pin": True}}
    async with gpus(monkeypatch, "CUDA0:420,CUDA1:400", settings) as box:
        first, second = await box.load(0), await box.load(1)
        assert first.plan.layout.devices == ["CUDA0"]
        assert second.plan.layout.devices == ["CUDA1"]
        assert first.plan.why.startswith("all on CUDA0: ")
        assert {each.device for each in first.ready.memory} == {"CUDA0", CPU}
        third = await box.load(2)
        assert box.loaded == ["m1:1", "m2:1"]
        assert third.plan.layout.devices == ["CUDA0"]
        assert third.plan.why.endswith("in place of m0:1")
        assert await box.tokens(2) == 3


@pytest.mark.anyio
async def test_what_no_gpu_holds_is_divided_and_what_they_do_not_hold_stays_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["CUDA0", "CUDA1", "CUDA2"]
    sizes = "CUDA0:190,CUDA1:230,CUDA2:250"
    async with gpus(monkeypatch, sizes, {"m0": {"pin": True}}) as box:
        divided = await box.load(0)
        counts = dict(divided.plan.layout.division.layers)
        assert sum(counts.values()) == divided.plan.layout.layers
        assert len(counts) > 1 and set(counts) <= set(names)
        assert set(counts) <= {each.device for each in divided.ready.memory if each.weights}
        assert await box.tokens(0) == 3
        partly = await box.load(1)
        assert partly.plan.layout.devices[-1] == CPU
        assert "CPU" in partly.plan.why


@pytest.mark.anyio
@pytest.mark.parametrize("others", [400, 330], ids=["weights", "cache"])
async def test_memory_that_is_short_at_the_load_is_tried_again_with_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: int
) -> None:
    """Another program took it after it was looked at: once so much that the weights find no room,
    once so that the cache does not."""
    async with gpus(monkeypatch, "CUDA0:500,CUDA1:450", shared=tmp_path) as box:
        await box.devices.read()
        (tmp_path / "others").write_text(f"0 {others}\n")
        engine = await box.load(0)
        assert engine.plan.layout.devices == ["CUDA1"]
        assert await box.tokens(0) == 3


@pytest.mark.anyio
async def test_a_load_that_fails_twice_is_reported_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pinaivu_box.errors import NoNodesAvailable

    only = {"m0": {"devices": ("CUDA0",), "context": 512}}
    async with gpus(monkeypatch, "CUDA0:500", only, shared=tmp_path) as box:
        await box.devices.read()
        (tmp_path / "others").write_text("0 490\n")
        with pytest.raises(NoNodesAvailable) as failed:
            await box.load(0)
        assert "CUDA0" in failed.value.message and "MiB" in failed.value.message
        assert box.loaded == []


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["fail", "memory", "abort"])
async def test_a_model_leaves_a_gpu_on_which_its_engine_died_twice(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """At once, if it said that it found no memory."""
    async with gpus(monkeypatch, "CUDA0:500,CUDA1:450", fail=f"CUDA0:{how}:0") as box:
        for _ in range(1 if how == "memory" else 2):
            with pytest.raises(EngineLost):
                await box.tokens(0)
            await waiting.wait_until(lambda: not box.placement.engines)
        assert await box.tokens(0) == 3
        (engine,) = box.placement.engines
        assert engine.plan.layout.devices == ["CUDA1"]


@pytest.mark.anyio
async def test_a_busy_model_gets_replicas_and_one_may_die_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pinaivu_box.gateway.placement._BUSY_SECONDS", 0.0)
    async with gpus(monkeypatch, "CUDA0:420,CUDA1:400,CUDA2:100", max_sequences=2) as box:
        model = box.models.find("m0:1")
        held = [await box.placement.acquire(model) for _ in range(3)]
        await waiting.wait_until(lambda: len(box.placement.engines) == 2)
        first, second = box.placement.engines
        assert [first.plan.layout.devices, second.plan.layout.devices] == [["CUDA0"], ["CUDA1"]]
        assert (first.replica, second.replica) == (0, 1)
        assert "another replica" in second.plan.why
        assert box.placement.places("m0:1") == 4
        held.append(await box.placement.acquire(model))
        assert held[-1] is second
        for engine in held:
            box.placement.release(engine)
        first._process.kill()
        await waiting.wait_until(lambda: len(box.placement.engines) == 1)
        assert second.alive and box.placement.failing(model) is None
        assert await asyncio.gather(*(box.tokens(0) for _ in range(2))) == [3, 3]
        assert box.placement.engines == [second]


@pytest.mark.anyio
async def test_hidden_gpus_are_not_used_and_settings_of_a_model_are_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    settings = {
        "m0": {"split": "tensor"},
        "m1": {"devices": ("CUDA1",), "gpu_layers": 10, "parallel": 2},
        "m2": {"gpu_layers": 0},
    }
    async with gpus(monkeypatch, "CUDA0:4000,CUDA1:600,CUDA2:900", settings) as box:
        tensors = await box.load(0)
        assert sorted(tensors.plan.layout.devices) == ["CUDA0", "CUDA1"]  # named anew
        assert "as split says" in tensors.plan.why
        some = await box.load(1)
        assert dict(some.plan.layout.division.layers) == {"CUDA1": 10}
        assert some.ready.max_sequences == 2
        none = await box.load(2)
        assert none.plan.layout.devices == [CPU]
        assert [await box.tokens(n) for n in range(3)] == [3, 3, 3]
