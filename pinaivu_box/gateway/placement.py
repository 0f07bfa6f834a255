"""Which engines run: started on demand where `placement_plan` says, unloaded when idle or when
another model needs their memory, and started again when they die.

An engine is a replica of a model.  A model has one, unless requests keep all that it has busy and
another GPU has room for one more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial

from msgspec.structs import replace

from pinaivu_box.changes import Changes
from pinaivu_box.config import EngineConfig
from pinaivu_box.engine.messages import CPU, OutOfMemory, SavedPrefixes
from pinaivu_box.errors import ApiError, NoNodesAvailable
from pinaivu_box.gateway.device_spaces import DeviceReader, gpu_reserve
from pinaivu_box.gateway.engine_process import EngineProcess, StartFailed
from pinaivu_box.gateway.engine_set import EngineSet
from pinaivu_box.gateway.model_needs import ModelNeeds, load_of, placed, rules_of
from pinaivu_box.gateway.placement_plan import (
    Decision,
    EngineKey,
    Refuse,
    Start,
    WaitForEngines,
    World,
    all_busy,
    another_replica,
    plan,
    pressed,
)
from pinaivu_box.gateway.prefix_affinity import Beginning, PrefixAffinity
from pinaivu_box.models.catalog import Model
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tasks import TaskSet

log = logging.getLogger("pinaivu.placement")

Digest = Callable[[Model], Awaitable[str]]
_MAX_BACKOFF_WAIT_SECONDS = 5.0  # a request waits out a backoff of so long, and no longer one
_PATIENCE_SECONDS = 30.0  # for engines that work on other requests
_LOOK_SECONDS = 0.25  # how often memory is looked at while a model waits for it
_MIN_LOOK_SECONDS = 0.01
_MIN_IDLE_SECONDS = 0.2  # in which a request that waited for the last one takes its place
_MIN_STABLE_SECONDS = 300.0  # an engine that ran so long had no part in the failures before it
_SETTLE_SECONDS = 1.0  # until a GPU's driver shows the memory of a process that has ended
_BUSY_SECONDS = 3.0  # for which all replicas are busy before there is one more
_REPLICA_PAUSE_SECONDS = 60.0  # after one that could not be started
_WATCH_SECONDS = 5.0
# What is printed by an engine that finds no memory in a step; -2 is llama_decode's for that.
_OUT_OF_MEMORY = re.compile(r"out of memory|llama_decode failed with -2", re.IGNORECASE)


class Placement:
    """`acquire` and `release` bracket every use of an engine."""

    def __init__(
        self, settings: LiveSettings, digest: Digest, devices: DeviceReader | None = None
    ) -> None:
        self._settings, self._digest = settings, digest
        self._set = EngineSet(settings, devices)
        self._locks: dict[str, asyncio.Lock] = {}
        self._failures = self._set.failures
        self._claims: dict[str, frozenset[EngineKey]] = {}  # what a model waits for, by its id
        self._changes = Changes()
        self._affinity: PrefixAffinity[int] = PrefixAffinity()
        self._busy_since: dict[str, float] = {}
        self._stopped_at = -_SETTLE_SECONDS
        self._tasks = TaskSet()
        self._stops = TaskSet()  # of engines whose memory is not free yet
        self.waiting: Callable[[str], int] = lambda _: 0  # requests for a model, by its id
        self.engine_died: Callable[[str], None] = lambda _: None  # called with the model's id
        # By the model's digest: where its engines keep prefixes while they are not loaded.
        self.saved_prefixes: Callable[[str], SavedPrefixes | None] = lambda _: None

    @property
    def _config(self) -> EngineConfig:
        return self._settings.config.engine

    @property
    def max_keep_alive(self) -> float:
        """Seconds for which a request may ask a model to stay loaded."""
        return self._set.max_keep_alive

    def start(self) -> None:
        """Load what is to be there from the beginning, and watch the memory of GPUs."""
        self._preload()
        if self._set.has_devices:
            self._tasks.spawn(self._watch_devices())

    def reloaded(self) -> None:
        """Apply changed settings: idle times and shared prefixes to running engines, the others to
        engines that start from now on."""
        for engine in self.engines:
            engine.name_prefixes(self._settings.current.shared_prefixes)
            self._unload_later(engine)
        self._preload()

    def forget_failures(self) -> None:
        """Try models that could not be started again at once: their files may have changed."""
        self._failures.clear()

    @property
    def engines(self) -> list[EngineProcess]:
        return list(self._set.engines.values())

    def replicas(self, model_id: str) -> list[EngineProcess]:
        """The engines of a model that are ready."""
        return self._set.replicas(model_id)

    def places(self, model_id: str) -> int:
        """How many sequences of the model can run at a time: in its engines, or in the one that
        would be started."""
        if engines := self.replicas(model_id):
            return sum(engine.ready.max_sequences for engine in engines)
        model = self._settings.catalog.get(model_id)
        return (model.settings.parallel if model else 0) or self._config.max_sequences

    @property
    def loaded(self) -> set[str]:
        """Ids of the models that are loaded, or will be in a moment."""
        return {key.model for key in (*self._set.engines, *self._set.starting)}

    @property
    def starting(self) -> list[str]:
        """Ids of the models that are being loaded, once for each engine."""
        return sorted(key.model for key in self._set.starting)

    def is_pinned(self, engine: EngineProcess) -> bool:
        """Whether it stays until it is asked to end."""
        return self._set.is_pinned(engine)

    def pin(self, model: Model, *, pinned: bool) -> None:
        """Pin the engines of a model, or let them go when they are idle, until this box ends; its
        configuration counts again then."""
        if pinned == model.settings.pin:
            self._set.pins.pop(model.id, None)
        else:
            self._set.pins[model.id] = pinned
        for engine in self.replicas(model.id):
            self._unload_later(engine)
        self._changes.notify()

    def pins(self, model: Model) -> bool:
        """Whether engines of the model are pinned, those of now or the next ones."""
        return self._set.pins.get(model.id, model.settings.pin)

    def failing(self, model: Model) -> str | None:
        """Why the model's engine could not be started lately, None if nothing is known."""
        return None if self.replicas(model.id) else self._failures.reason(model.id)

    async def digest_of(self, model: Model) -> str:
        """Of the file that the model's requests run: the one that its engine has loaded, even if it
        was replaced or deleted since, else the one on disk.  Raises NoNodesAvailable if that cannot
        be read."""
        for engine in self.replicas(model.id):
            return engine.model_digest
        try:
            return await self._digest(model)
        except OSError as error:
            why = error.strerror or type(error).__name__  # without its path: peers are told, too
            raise NoNodesAvailable(
                f"The file of {model.id} cannot be read: {why}; restore it, or use another model.",
                retry_after=2,
            ) from error

    async def acquire(self, model: Model, beginning: Beginning = ()) -> EngineProcess:
        """A ready engine for a request that begins so, started if need be.  Raises
        NoNodesAvailable."""
        while self._must_yield(model.id):
            await self._changes.wait(self._changes.count, _LOOK_SECONDS)
        async with self._locks.setdefault(model.id, asyncio.Lock()):
            claimed = self._claimed(model.id)
            engine = self._set.chosen(model.id, claimed, self._affinity, beginning)
            if engine is None:
                engine = await self._start(model, self._set.free_key(model.id))
            engine.use()
            self._affinity.note(engine.number, beginning)
        self._replicate(model, engine.model_digest)
        return engine

    def release(
        self, engine: EngineProcess, tenant: str = "", keep_alive: float | None = None
    ) -> None:
        """End a use.  `keep_alive` is for how many seconds from now the tenant wants the model to
        stay loaded, None for the configured time.  It replaces what this tenant wanted before; the
        model stays as long as any tenant wants it to."""
        engine.users -= 1
        engine.idle_since = time.monotonic()
        engine.uses[tenant] = engine.idle_since, 0 if engine.to_unload else keep_alive
        self._unload_later(engine)
        self._changes.notify()

    async def unload(self, model_id: str) -> int | None:
        """End the model's engines, however long tenants wanted them to stay.  Returns how many
        requests they still serve, None if it was not loaded.

        With 0 their memory is free.  Else those requests finish, and each engine ends after its
        last.  A request that comes meanwhile is served at once by an engine as it is, which is then
        kept for as long as that request wants."""
        if model_id not in self.loaded:
            return None
        async with self._locks.setdefault(model_id, asyncio.Lock()):  # not in the middle of a start
            while any(key.model == model_id for key in self._set.starting):  # another replica
                await self._changes.wait(self._changes.count, _LOOK_SECONDS)
            engines = self.replicas(model_id)
            if not engines:
                return None
            for engine in engines:
                engine.to_unload = bool(engine.users)
                engine.uses.clear()
            idle = [engine for engine in engines if not engine.users]
            if idle:
                log.info("unloading %s as asked", model_id)
            await self._unload(idle)
            return sum(engine.users for engine in engines)

    async def close(self) -> None:
        for engine in self.engines:
            if engine.unloading is not None:
                engine.unloading.cancel()
        await self._tasks.cancel()
        await asyncio.gather(
            *self._stops, *(engine.stop() for engine in self._set.engines.values())
        )

    # -- choosing ------------------------------------------------------------------------------

    def _must_yield(self, model_id: str) -> bool:
        """Whether another model waits for all engines of this one to end, and they have had their
        turn: then new requests let it go first."""
        claimed = self._claimed(model_id)
        mine = [self._set.running(engine) for engine in self.replicas(model_id)]
        return bool(mine) and all(
            engine.key in claimed and engine.age_seconds >= engine.turn_seconds for engine in mine
        )

    def _claimed(self, model_id: str) -> set[EngineKey]:
        """The engines for whose end other models wait."""
        return {key for other, keys in self._claims.items() if other != model_id for key in keys}

    def _replicate(self, model: Model, digest: str) -> None:
        """Start another replica if all have been busy for some time."""
        if len([device for device in self._set.devices if device.is_gpu]) < 2:
            return
        world = self._set.world(model.id)
        now = time.monotonic()
        if not all_busy(world, model.id):
            self._busy_since.pop(model.id, None)
            return
        if now - self._busy_since.setdefault(model.id, now) < _BUSY_SECONDS:
            return
        rules = rules_of(model, self._config)
        needs = ModelNeeds(model, load_of(model, self._config, rules.sizes))
        if (start := another_replica(needs, rules, world, model.id)) is not None:
            key = self._set.free_key(model.id)
            self._set.reserve(key, start)
            self._tasks.spawn(self._start_replica(model, digest, key, start))

    async def _start_replica(self, model: Model, digest: str, key: EngineKey, start: Start) -> None:
        try:
            if await self._digest(model) == digest:
                await self._run(model, digest, key, start)
            else:  # its file was replaced: that is another model, until all engines have it
                self._busy_since[model.id] = time.monotonic() + _REPLICA_PAUSE_SECONDS
        except (StartFailed, OSError) as error:
            self._busy_since[model.id] = time.monotonic() + _REPLICA_PAUSE_SECONDS
            log.warning("no further engine of %s could be started: %s", model.id, error)
        finally:
            self._set.starting.pop(key, None)
            self._changes.notify()

    # -- starting ------------------------------------------------------------------------------

    def _preload(self) -> None:
        for model in self._settings.catalog.models:
            if model.settings.preload and model.id not in self.loaded:
                self._tasks.spawn(self._preload_one(model))

    async def _preload_one(self, model: Model) -> None:
        """Without ending an engine for it."""
        try:
            async with self._locks.setdefault(model.id, asyncio.Lock()):
                if not self.replicas(model.id):
                    await self._start(model, self._set.free_key(model.id), evict=False)
        except ApiError as error:
            log.warning("%s was not loaded at the start: %s", model.id, error.message)

    async def _start(self, model: Model, key: EngineKey, *, evict: bool = True) -> EngineProcess:
        """Raises NoNodesAvailable."""
        wait = self._failures.seconds(model.id)
        if 0 < wait <= _MAX_BACKOFF_WAIT_SECONDS:
            await asyncio.sleep(wait)
        elif wait > 0:
            raise NoNodesAvailable(
                f"The engine of {model.id} failed ({self._failures.reason(model.id)}); it is tried "
                f"again in {math.ceil(wait)} s.",
                retry_after=math.ceil(wait),
            )
        self._set.starting[key] = None
        try:
            return await self._start_somewhere(model, key, evict)
        except (StartFailed, OSError) as error:
            self._failures.note(model.id, str(error))
            raise NoNodesAvailable(
                f"The engine of {model.id} could not be started: {error}.",
                retry_after=max(1, math.ceil(self._failures.seconds(model.id))),
            ) from error
        finally:
            self._set.starting.pop(key, None)
            self._changes.notify()

    async def _start_somewhere(self, model: Model, key: EngineKey, evict: bool) -> EngineProcess:
        """Where it was planned; if memory is short there after all, once more where or as large as
        that allows.  Raises StartFailed, OSError, NoNodesAvailable."""
        await self._digest(model)  # of a file that is new, that takes its time
        start = await self._place(model, key, evict)
        try:
            return await self._run(model, await self._digest(model), key, start)
        except StartFailed as error:
            if error.memory is None:
                raise
            self._set.starting[key] = None  # what it was to have is free
            first = self._set.note_shortage(start, error.memory)
            log.warning("%s: %s; trying again with less", model.id, first)
        try:
            smaller = await self._place(model, key, evict)
            return await self._run(model, await self._digest(model), key, smaller)
        except StartFailed as error:
            if error.memory is None:
                raise
            self._set.starting[key] = None
            second = self._set.note_shortage(smaller, error.memory)
            raise StartFailed(f"{first}; tried again with less: {second}", error.memory) from error

    async def _run(self, model: Model, digest: str, key: EngineKey, start: Start) -> EngineProcess:
        """Start the engine where it was planned.  Raises StartFailed."""
        load = placed(load_of(model, self._config, start.layout.sizes), start.layout)
        projector = ""
        if model.projector is not None:
            path, size = model.projector
            projector = await self._digest(Model(model.id, path, size=size))
        load = replace(load, projector_digest=projector, saved=self.saved_prefixes(digest))
        engine = EngineProcess(model, digest, load, key.replica, start)
        began = time.monotonic()
        self._set.loading[key] = engine
        try:
            await engine.start(self._config.start_seconds)
        finally:
            del self._set.loading[key]
        if prefixes := self._settings.current.shared_prefixes:
            engine.name_prefixes(prefixes)
        log.info("engine of %s ready in %.1f s: %s", model.id, time.monotonic() - began, start.why)
        self._set.engines[key] = engine
        self._tasks.spawn(self._watch(engine))
        self._unload_later(engine)
        return engine

    async def would_place(self, model: Model) -> tuple[Decision, World]:
        """What loading the model now would do, and what there is."""
        rules = rules_of(model, self._config)
        needs = ModelNeeds(model, load_of(model, self._config, rules.sizes))
        await self._set.read_devices(anew=self._settling)
        world = self._set.world(model.id)
        return plan(needs, rules, world, patient=False), world

    async def _place(self, model: Model, key: EngineKey, evict: bool) -> Start:
        """Where the engine goes; what has to end for it has ended, and its place is reserved.
        Raises NoNodesAvailable."""
        config = self._config  # all of it, also if there is another meanwhile
        rules = rules_of(model, config)
        needs = ModelNeeds(model, load_of(model, config, rules.sizes))
        patient_until, ended = time.monotonic() + _PATIENCE_SECONDS, list[str]()
        self._set.starting[key] = None
        try:
            while True:
                if not model.is_fake:
                    await self._set.read_devices(anew=self._settling)
                patient = evict and time.monotonic() < patient_until
                decision = plan(
                    needs, rules, self._set.world(model.id), patient=patient, evict=evict
                )
                if self._stops and not (isinstance(decision, Start) and not decision.short):
                    await asyncio.wait(self._stops, return_when=asyncio.FIRST_COMPLETED)
                    continue
                match decision:
                    case Start(evict=()):
                        start = decision.in_place_of(ended)
                        self._set.reserve(key, start)
                        return start
                    case Start() if self._settling and self._set.has_gpus:
                        await asyncio.sleep(_LOOK_SECONDS)
                    case Start():
                        ended += [evicted.model for evicted in decision.evict]
                        await self._end(decision.evict, f"to make room for {model.id}")
                    case WaitForEngines():
                        self._claims[model.id] = frozenset(decision.engines)
                        await asyncio.sleep(_MIN_LOOK_SECONDS)
                        ready = partial(self._set.have_left, decision.engines)
                        await self._changes.until(ready, _LOOK_SECONDS)
                    case Refuse():
                        raise NoNodesAvailable(
                            f"{model.id} {decision.why}: {decision.todo}.", retry_after=10
                        )
        finally:
            if self._claims.pop(model.id, None):
                self._changes.notify()

    @property
    def _settling(self) -> bool:
        """Whether a device may not show yet what an engine has left."""
        return time.monotonic() - self._stopped_at < _SETTLE_SECONDS

    async def _watch_devices(self) -> None:
        """End idle engines while other programs need the memory of a GPU."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if not any(device.measured for device in self._set.devices):
                continue  # none has been needed yet, or nobody can tell
            await self._set.read_devices(anew=self._settling)
            measured = [device.total for device in self._set.devices if device.measured]
            if measured and not self._set.starting:
                # `free` is what is left beside a reserve for others: they are in that by now.
                ended = pressed(self._set.world(""), -gpu_reserve(min(measured)) // 2)
                await self._end(ended, "for another program needs its memory")

    # -- ending --------------------------------------------------------------------------------

    async def _watch(self, engine: EngineProcess) -> None:
        await engine.closed.wait()
        key = engine.key
        if self._set.engines.get(key) is engine:  # else we stopped it ourselves
            del self._set.engines[key]
            printed = "\n".join(engine.last_lines)
            log.error("the engine of %s died; it printed:\n%s", engine.model_id, printed)
            self.engine_died(engine.model_id)
            if time.monotonic() - engine.ready_at > _MIN_STABLE_SECONDS:
                self._failures.forget(engine.model_id)
            gpus = [device for device in engine.plan.layout.devices if device != CPU]
            self._failures.note_death(engine.model_id, gpus)
            if _OUT_OF_MEMORY.search(printed):
                for device in gpus:
                    self._set.note_shortage(engine.plan, OutOfMemory(device))
            self._failures.note(engine.model_id, "it died", first_free=True)
            self._changes.notify()

    def _unload_later(self, engine: EngineProcess) -> None:
        """Once no tenant wants it to stay any more, unless it is used again."""
        if engine.unloading is not None:
            engine.unloading.cancel()
        if engine.users == 0 and (left := self._set.wanted_seconds(engine)) < math.inf:
            engine.unloading = asyncio.get_running_loop().call_later(
                max(left, _MIN_IDLE_SECONDS),
                lambda: self._tasks.spawn(self._unload_if_idle(engine)),
            )

    async def _unload_if_idle(self, engine: EngineProcess) -> None:
        async with self._locks[engine.model_id]:  # a new one is not loaded before this one is gone
            if not engine.alive or engine.users:
                return
            if self.waiting(engine.model_id) or self._set.wanted_seconds(engine):
                self._unload_later(engine)
                return
            idle = time.monotonic() - engine.idle_since
            log.info("unloading %s: idle for %.0f s", engine.model_id, idle)
            await self._unload([engine])

    async def _end(self, keys: Collection[EngineKey], why: str) -> None:
        """End those of the engines that are still idle."""
        engines = [self._set.engines[key] for key in keys if key in self._set.engines]
        engines = [engine for engine in engines if not engine.users]
        if engines:
            log.info("unloading %s %s", ", ".join(engine.model_id for engine in engines), why)
        await self._unload(engines)

    async def _unload(self, engines: Iterable[EngineProcess]) -> None:
        """Returns when their memory is free."""
        stops: list[asyncio.Task[None]] = []
        for engine in engines:
            key = engine.key
            if self._set.engines.get(key) is engine:
                del self._set.engines[key]
                stops.append(self._stops.spawn(self._stop(engine)))
        if stops:  # it goes on if the request that needs the memory is gone
            await asyncio.wait(stops)

    async def _stop(self, engine: EngineProcess) -> None:
        await engine.save_prefixes()
        await engine.stop()
        self._stopped_at = time.monotonic()
        self._changes.notify()
