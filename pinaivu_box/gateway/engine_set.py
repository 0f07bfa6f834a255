"""The engines of a box, and what they leave free: the world in which `placement_plan` plans."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pinaivu_box.config import ModelSettings
from pinaivu_box.devices import Device
from pinaivu_box.gateway.device_spaces import DeviceReader, spaces_of
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.gateway.load_failures import LoadFailures
from pinaivu_box.gateway.placement_plan import EngineKey, RunningEngine, Start, World
from pinaivu_box.models.memory import resident
from pinaivu_box.settings import LiveSettings


class EngineSet:
    """`engines` are ready; of those that are `starting`, some have a place, and some of these a
    process (`loading`).  `devices` is what was read last."""

    def __init__(self, settings: LiveSettings, reader: DeviceReader | None) -> None:
        self._settings, self._reader = settings, reader
        self.engines: dict[EngineKey, EngineProcess] = {}
        self.starting: dict[EngineKey, RunningEngine | None] = {}
        self.loading: dict[EngineKey, EngineProcess] = {}
        self.failures = LoadFailures()
        self.pins: dict[str, bool] = {}  # by model: whether it is pinned, whatever is configured
        self.devices: Sequence[Device] = ()

    @property
    def has_devices(self) -> bool:
        """Whether there may be others than the CPU."""
        return self._reader is not None

    @property
    def has_gpus(self) -> bool:
        return any(device.is_gpu for device in self.devices)

    async def read_devices(self, *, anew: bool) -> None:
        if self._reader is not None:
            self.devices = await self._reader.read(anew=anew)

    def replicas(self, model_id: str) -> list[EngineProcess]:
        """The engines of a model that are ready."""
        return [e for key, e in self.engines.items() if key.model == model_id and e.alive]

    def free_key(self, model_id: str) -> EngineKey:
        """For a further engine of the model."""
        taken = {*self.engines, *self.starting}
        numbers = range(len(taken) + 1)
        return next(k for n in numbers if (k := EngineKey(model_id, n)) not in taken)

    def reserve(self, key: EngineKey, start: Start) -> None:
        """Count what the engine will take as taken."""
        self.starting[key] = RunningEngine(key, start.layout.memory, starting=True)

    def settings_of(self, engine: EngineProcess) -> ModelSettings:
        """Those in force, or the ones that it was started with if its model is not served now."""
        served = self._settings.catalog.get(engine.model_id)
        return (served or engine.model).settings

    def is_pinned(self, engine: EngineProcess) -> bool:
        return self.pins.get(engine.model_id, self.settings_of(engine).pin)

    def world(self, model_id: str) -> World:
        """What is free and what runs, without the devices that the model leaves alone."""
        engines = [self.running(engine) for engine in self.engines.values() if engine.alive]
        engines += [engine for engine in self.starting.values() if engine is not None]
        avoided = self.failures.avoided(model_id)
        spaces = spaces_of(self.devices, engines, self.failures.missing, self._resident)
        return World([space for space in spaces if space.device not in avoided], engines)

    def running(self, engine: EngineProcess) -> RunningEngine:
        now = time.monotonic()
        return RunningEngine(
            engine.key,
            engine.memory_by_device,
            users=engine.users,
            places=engine.ready.max_sequences,
            pinned=self.is_pinned(engine),
            idle_seconds=0.0 if engine.users else now - engine.idle_since,
            interval=engine.interval,
            load_seconds=engine.load_seconds,
            age_seconds=now - engine.ready_at,
            replicas=len(self.replicas(engine.model_id)),
        )

    def _resident(self, starting: RunningEngine) -> int:
        process = self.loading.get(starting.key)
        return resident(process.pid) if process is not None and process.launched else 0
