"""The engines of a box, and what they leave free: the world in which `placement_plan` plans."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence

from pinaivu_box.config import ModelSettings, parse_duration
from pinaivu_box.devices import Device
from pinaivu_box.engine.messages import CPU, OutOfMemory
from pinaivu_box.gateway.device_spaces import DeviceReader, spaces_of
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.gateway.load_failures import LoadFailures
from pinaivu_box.gateway.placement_plan import EngineKey, RunningEngine, Start, World, size_text
from pinaivu_box.gateway.prefix_affinity import Beginning, PrefixAffinity, ReplicaLoad, choose
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

    def chosen(
        self,
        model_id: str,
        claimed: Collection[EngineKey],
        affinity: PrefixAffinity[int],
        beginning: Beginning,
    ) -> EngineProcess | None:
        """The replica that will answer soonest, none that is to make way if there is another."""
        engines = self.replicas(model_id)
        engines = [e for e in engines if e.key not in claimed] or engines
        if len(engines) < 2:
            return engines[0] if engines else None
        loads = [
            ReplicaLoad(
                engine.users,
                engine.ready.max_sequences,
                affinity.matched(engine.number, beginning),
            )
            for engine in engines
        ]
        return engines[choose(loads, beginning)]

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

    def note_shortage(self, start: Start, shortage: OutOfMemory) -> str:
        """An engine found no memory that was planned; returns what was missing, as a clause."""
        device = shortage.device or CPU
        space = next((s for s in self.world("").spaces if s.device == device), None)
        planned = start.layout.memory.get(device, 0)
        free = space.free if space is not None else 0
        self.failures.note_memory(device, planned + max(0, free - planned), planned)
        wanted = (
            f"{size_text(shortage.wanted)} more of memory" if shortage.wanted else "enough memory"
        )
        return f"{device} did not have {wanted}, {size_text(planned)} were planned there"

    def have_left(self, keys: Iterable[EngineKey]) -> bool:
        """Whether all these engines may be ended now, or are gone."""
        if self.starting.keys() & set(keys):
            return False
        engines = [self.engines[key] for key in keys if key in self.engines]
        return all(self.running(engine).evictable for engine in engines)

    @property
    def max_keep_alive(self) -> float:
        """Seconds for which a request may ask a model to stay loaded."""
        config = self._settings.config.engine
        return max(_duration(config.keep_alive), _duration(config.max_keep_alive))

    def wanted_seconds(self, engine: EngineProcess) -> float:
        """For how many seconds somebody still wants it to stay."""
        if self.is_pinned(engine):
            return 0.0 if engine.to_unload else math.inf
        config = self._settings.config.engine
        usual = _duration(self.settings_of(engine).keep_alive or config.keep_alive)
        now, longest = time.monotonic(), max(self.max_keep_alive, usual)
        left = max(0.0, engine.ready_at + usual - now) if not engine.used else 0.0  # preloaded
        for tenant, (since, keep_alive) in list(engine.uses.items()):
            keep = usual if keep_alive is None else min(keep_alive, longest)
            if since + keep <= now:
                del engine.uses[tenant]
            left = max(left, since + keep - now)
        return left


def _duration(text: str) -> float:
    """In seconds; a negative one has no end."""
    seconds = parse_duration(text)
    return math.inf if seconds < 0 else seconds
