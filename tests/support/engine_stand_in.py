"""Engines without processes on devices that are numbers: for what the placement decides, in as many
turns as somebody wants."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pinaivu_box.config import Config, EngineConfig, ModelConfig
from pinaivu_box.devices import Device
from pinaivu_box.engine.messages import CPU, OutOfMemory, Ready, SamplingDefaults
from pinaivu_box.gateway import placement as placements
from pinaivu_box.gateway.device_spaces import gpu_reserve
from pinaivu_box.gateway.engine_process import EngineProcess, StartFailed
from pinaivu_box.gateway.layouts import Division, Sizes
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.models import memory
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.settings import BoxSettings, LiveSettings
from tests.support.layer_needs import MIB, LayerNeeds


class Machine:
    """GPUs of so many MiB for models, named CUDA0 and so on, and 64 GiB beside them.  `taken` is
    what engines have of each device; other programs have `others` of them."""

    def __init__(self, *sizes: int) -> None:
        # What stays free for others comes on top.
        self.totals = {f"CUDA{n}": _with_reserve(size * MIB) for n, size in enumerate(sizes)}
        self.taken: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.engines: list[StandIn] = []
        self.loads = 0

    async def read(self, *, anew: bool = False) -> Sequence[Device]:
        return [
            Device(
                name=name,
                description="numbers",
                kind="gpu",
                total=total,
                free=total - self.taken[name] - self.others[name],
                measured=True,
            )
            for name, total in self.totals.items()
        ]


def _with_reserve(size: int) -> int:
    total = size
    while total - gpu_reserve(total) < size:
        total += size - (total - gpu_reserve(total))
    return total


class StandIn(EngineProcess):
    """Takes memory of the machine, as long as it lives."""

    machine: Machine
    load_time = 0.0

    @property
    def pid(self) -> int:
        return 0

    async def start(self, seconds: float) -> None:
        await asyncio.sleep(self.load_time)
        machine, sizes = self.machine, self.plan.layout.sizes
        for device, size in self.plan.layout.memory.items():
            free = machine.totals.get(device, 2**40) - machine.taken[device]
            if size > free - machine.others[device]:
                raise StartFailed("no room", OutOfMemory(device, size, "weights"))
        machine.taken.update(self.plan.layout.memory)
        machine.loads += 1
        self.ready = Ready(
            build="none", device="numbers", context=sizes.context, kv_tokens=sizes.kv_tokens,
            max_sequences=sizes.sequences, defaults=SamplingDefaults(),
        )  # fmt: skip
        machine.engines.append(self)

    def name_prefixes(self, texts: Sequence[str]) -> None:
        pass

    async def stop(self) -> None:
        assert not self.users, "an engine was ended in the middle of a request"
        self.end()

    def end(self) -> None:
        """As if its process had ended, whatever it does."""
        self.closed.set()
        self.machine.taken.subtract(self.plan.layout.memory)


class StandInNeeds(LayerNeeds):
    """Of a model whose id ends with its size in MiB, as in "a:300": 16 layers, and nothing else."""

    def __init__(self, model: Model, *_: Any) -> None:
        super().__init__(16, int(model.id.partition(":")[2]) * MIB // 16, 0, 0, MIB)

    def memory(self, sizes: Sizes, division: Division) -> dict[str, int]:
        taken = super().memory(sizes, division)
        return {device: size for device, size in taken.items() if size or device == CPU}


def placement_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, *models: ModelConfig, **engine: Any
) -> tuple[Placement, Catalog]:
    """A placement of models that stay loaded, on that machine."""
    sizes = {"keep_alive": "-1", "context": 1024, "kv_tokens": 1024, **engine}
    catalog = Catalog({each.name: _model(each) for each in models})
    config = Config(engine=EngineConfig(**sizes), model=list(models))
    stand_in = type("StandInHere", (StandIn,), {"machine": machine})
    monkeypatch.setattr(placements, "EngineProcess", stand_in)
    monkeypatch.setattr(placements, "ModelNeeds", StandInNeeds)
    monkeypatch.setattr(placements, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(memory, "available", lambda: 64 * 2**30)

    async def digest(_: Model) -> str:
        return "00" * 32

    return Placement(LiveSettings(BoxSettings(config, catalog)), digest, machine), catalog


def _model(config: ModelConfig) -> Model:
    from pathlib import Path

    return Model(config.name, Path("none"), settings=config)
