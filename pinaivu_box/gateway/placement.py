"""Which engines run: started on demand, unloaded when idle, evicted when memory is short."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pinaivu_box import backoff
from pinaivu_box.config import EngineConfig, parse_duration
from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.gateway.engine_process import EngineProcess, StartFailed
from pinaivu_box.models import memory
from pinaivu_box.models.catalog import Model
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tasks import TaskSet

log = logging.getLogger("pinaivu.placement")

Digest = Callable[[Model], Awaitable[str]]
_RESERVE_BYTES = 256 * 1024 * 1024  # left to the rest of the machine
_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 1.0, 60.0
_MAX_WAIT_SECONDS = 5.0  # a request waits out a backoff of so long, and is refused for a longer one
_MIN_IDLE_SECONDS = 0.2  # in which a request that waited for the last one takes its place
_MIN_STABLE_SECONDS = 300.0  # an engine that ran so long had no part in the failures before it


@dataclass
class _LoadFailures:
    count: int = 0
    until: float = 0.0
    reason: str = ""


class Placement:
    """`acquire` and `release` bracket every use of an engine."""

    def __init__(self, settings: LiveSettings, digest: Digest) -> None:
        self._settings, self._digest = settings, digest
        self._engines: dict[str, EngineProcess] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._failures: dict[str, _LoadFailures] = {}
        self._starting: set[str] = set()
        self._tasks = TaskSet()
        self._stops = TaskSet()  # of engines whose memory is not free yet
        self.waiting: Callable[[str], int] = lambda _: 0  # requests for a model, by its id

    @property
    def _config(self) -> EngineConfig:
        return self._settings.config.engine

    @property
    def max_keep_alive(self) -> float:
        """Seconds for which a request may ask a model to stay loaded."""
        config = self._config
        return max(_duration(config.keep_alive), _duration(config.max_keep_alive))

    def reloaded(self) -> None:
        """Apply changed settings: idle times and shared prefixes to running engines, the others to
        engines that start from now on."""
        for engine in self.engines:
            engine.name_prefixes(self._settings.current.shared_prefixes)
            self._unload_later(engine)

    def forget_failures(self) -> None:
        """Try models that could not be started again at once: their files may have changed."""
        self._failures.clear()

    @property
    def engines(self) -> list[EngineProcess]:
        return list(self._engines.values())

    @property
    def loaded(self) -> set[str]:
        """Ids of the models that are loaded, or will be in a moment."""
        return {*self._engines, *self._starting}

    @property
    def starting(self) -> list[str]:
        """Ids of the models that are being loaded."""
        return sorted(self._starting)

    def failing(self, model: Model) -> str | None:
        """Why the model's engine could not be started lately, None if nothing is known."""
        failures = self._failures.get(model.id)
        return failures.reason if failures and failures.until > time.monotonic() else None

    async def digest_of(self, model: Model) -> str:
        """Of the file that the model's requests run: the one that its engine has loaded, even if it
        was replaced or deleted since, else the one on disk.  Raises NoNodesAvailable if that cannot
        be read."""
        engine = self._engines.get(model.id)
        if engine is not None and engine.alive:
            return engine.model_digest
        try:
            return await self._digest(model)
        except OSError as error:
            why = error.strerror or type(error).__name__  # without its path: peers are told, too
            raise NoNodesAvailable(
                f"The file of {model.id} cannot be read: {why}; restore it, or use another model.",
                retry_after=2,
            ) from error

    async def acquire(self, model: Model) -> EngineProcess:
        """A ready engine for the model, started if need be.  Raises NoNodesAvailable."""
        async with self._locks.setdefault(model.id, asyncio.Lock()):
            engine = self._engines.get(model.id)
            if engine is None or not engine.alive:
                engine = await self._start(model)
            engine.users += 1
            return engine

    def release(
        self, engine: EngineProcess, tenant: str = "", keep_alive: float | None = None
    ) -> None:
        """End a use.  `keep_alive` is for how many seconds from now the tenant wants the model to
        stay loaded, None for the configured time.  It replaces what this tenant wanted before; the
        model stays as long as any tenant wants it to."""
        engine.users -= 1
        engine.idle_since = time.monotonic()
        engine.uses[tenant] = engine.idle_since, keep_alive
        self._unload_later(engine)

    async def close(self) -> None:
        for engine in self.engines:
            if engine.unloading is not None:
                engine.unloading.cancel()
        await self._tasks.cancel()
        await asyncio.gather(*self._stops, *(engine.stop() for engine in self._engines.values()))

    # -- starting ------------------------------------------------------------------------------

    async def _start(self, model: Model) -> EngineProcess:
        failures = self._failures.setdefault(model.id, _LoadFailures())
        wait = failures.until - time.monotonic()
        if 0 < wait <= _MAX_WAIT_SECONDS:
            await asyncio.sleep(wait)
        elif wait > 0:
            raise NoNodesAvailable(
                f"The engine of {model.id} failed ({failures.reason}); it is tried again in "
                f"{math.ceil(wait)} s.",
                retry_after=math.ceil(wait),
            )
        self._starting.add(model.id)
        try:
            load = await self._fit(model)
            engine = EngineProcess(model.id, await self._digest(model), load)
            began = time.monotonic()
            await engine.start(self._config.start_seconds)
        except (StartFailed, OSError) as error:
            self._note_failure(model.id, str(error))
            raise NoNodesAvailable(
                f"The engine of {model.id} could not be started: {error}.",
                retry_after=max(1, math.ceil(failures.until - time.monotonic())),
            ) from error
        finally:
            self._starting.discard(model.id)
        if prefixes := self._settings.current.shared_prefixes:
            engine.name_prefixes(prefixes)
        log.info("engine of %s ready in %.1f s", model.id, time.monotonic() - began)
        self._engines[model.id] = engine
        self._tasks.spawn(self._watch(engine))
        return engine

    async def _fit(self, model: Model) -> LoadModel:
        """Make room for the model by unloading idle engines, the longest idle first."""
        config = self._config  # all of it, also if there is another meanwhile
        context = memory.context_of(model, config.context)
        kv_tokens = memory.kv_tokens_of(context, config.kv_tokens)
        while (free := memory.available()) is not None:
            room = free - _RESERVE_BYTES
            if memory.estimate(model, kv_tokens) <= room:
                break
            idle = [engine for engine in self.engines if engine.users == 0]
            if self._stops:
                await asyncio.wait(self._stops, return_when=asyncio.FIRST_COMPLETED)
            elif idle:
                await self._unload(min(idle, key=lambda engine: engine.idle_since))
            elif kv_tokens > context:
                kv_tokens = max(context, kv_tokens // 2)
            else:
                raise NoNodesAvailable(
                    f"{model.id} needs about {_gib(memory.estimate(model, kv_tokens))} of memory "
                    f"and {_gib(max(room, 0))} can be had: set a smaller context for it, or wait "
                    "until other models are idle.",
                    retry_after=10,
                )
        return LoadModel(
            path=str(model.path),
            offset=model.offset,
            context=context,
            kv_tokens=kv_tokens,
            max_sequences=config.max_sequences,
            token_budget=config.token_budget,
            threads=config.threads,
            drafting=config.drafting,
            context_shift=config.context_shift,
            parse_special=config.parse_special,
            parts=[str(path) for path, _ in model.parts],
            model=model.id,
        )

    # -- ending --------------------------------------------------------------------------------

    async def _watch(self, engine: EngineProcess) -> None:
        await engine.closed.wait()
        if self._engines.get(engine.model_id) is engine:  # else we stopped it ourselves
            del self._engines[engine.model_id]
            printed = "\n".join(engine.last_lines)
            log.error("the engine of %s died; it printed:\n%s", engine.model_id, printed)
            if time.monotonic() - engine.started_at > _MIN_STABLE_SECONDS:
                self._failures.pop(engine.model_id, None)
            self._note_failure(engine.model_id, "it died", first_free=True)

    def _note_failure(self, model_id: str, reason: str, *, first_free: bool = False) -> None:
        failures = self._failures.setdefault(model_id, _LoadFailures())
        failures.count += 1
        failures.reason = reason
        failures.until = time.monotonic()
        if counted := failures.count - first_free:
            failures.until += backoff.delay(counted, _MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)

    def _unload_later(self, engine: EngineProcess) -> None:
        """Once no tenant wants it to stay any more, unless it is used again."""
        if engine.unloading is not None:
            engine.unloading.cancel()
        if engine.users == 0 and (left := self._wanted(engine)) < math.inf:
            engine.unloading = asyncio.get_running_loop().call_later(
                max(left, _MIN_IDLE_SECONDS),
                lambda: self._tasks.spawn(self._unload_if_idle(engine)),
            )

    def _wanted(self, engine: EngineProcess) -> float:
        """For how many seconds somebody still wants it to stay."""
        now, left = time.monotonic(), 0.0
        usual, longest = _duration(self._config.keep_alive), self.max_keep_alive
        for tenant, (since, keep_alive) in list(engine.uses.items()):
            keep = usual if keep_alive is None else min(keep_alive, longest)
            if since + keep <= now:
                del engine.uses[tenant]
            left = max(left, since + keep - now)
        return left

    async def _unload_if_idle(self, engine: EngineProcess) -> None:
        async with self._locks[engine.model_id]:  # a new one is not loaded before this one is gone
            if not engine.alive or engine.users:
                return
            if self.waiting(engine.model_id) or self._wanted(engine):
                self._unload_later(engine)
                return
            idle = time.monotonic() - engine.idle_since
            log.info("unloading %s: idle for %.0f s", engine.model_id, idle)
            await self._unload(engine)

    async def _unload(self, engine: EngineProcess) -> None:
        if self._engines.get(engine.model_id) is engine:
            del self._engines[engine.model_id]
            stop = self._stops.spawn(engine.stop())
            await asyncio.shield(stop)  # it goes on if the request that needs the memory is gone


def _duration(text: str) -> float:
    """In seconds; a negative one has no end."""
    seconds = parse_duration(text)
    return math.inf if seconds < 0 else seconds


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
