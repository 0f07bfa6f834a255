"""Which engines run: started on demand, unloaded when idle, evicted when memory is short."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pinaivu_box.config import EngineConfig, parse_duration
from pinaivu_box.engine.messages import Load
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.gateway.engine_process import EngineProcess, StartFailed
from pinaivu_box.models import memory
from pinaivu_box.models.catalog import Model

log = logging.getLogger("pinaivu.placement")

Digest = Callable[[Model], Awaitable[str]]
_RESERVE_BYTES = 256 * 1024 * 1024  # left to the rest of the machine
_LONGEST_BACKOFF = 60.0
_WORTH_WAITING = 5.0  # seconds of backoff that a request waits out instead of being refused
_FORGIVEN_AFTER = 300.0  # seconds that an engine must have lived for its end to be no pattern


@dataclass
class _Failures:
    count: int = 0
    until: float = 0.0
    reason: str = ""


class Placement:
    """`acquire` and `release` bracket every use of an engine.  `named` are the beginnings of
    prompts that accounts share (see `scopes`)."""

    def __init__(self, config: EngineConfig, digest: Digest, named: Sequence[str] = ()) -> None:
        self._engines: dict[str, EngineProcess] = {}
        self.configure(config, named)
        self._digest = digest
        self._locks: dict[str, asyncio.Lock] = {}
        self._failures: dict[str, _Failures] = {}
        self._starting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def configure(self, config: EngineConfig, named: Sequence[str] = ()) -> None:
        """For engines that start from now on; idle time and `named` are for all."""
        self._config = config
        self._keep_alive = parse_duration(config.keep_alive)
        self.named = named
        for engine in self.engines:
            engine.name_prefixes(named)

    def forgive(self) -> None:
        """Try again at once what could not be started: its file may be another one now."""
        self._failures.clear()

    @property
    def engines(self) -> list[EngineProcess]:
        return list(self._engines.values())

    @property
    def starting(self) -> list[str]:
        """Ids of the models that are being loaded."""
        return sorted(self._starting)

    def failing(self, model: Model) -> str | None:
        """Why the model's engine could not be started lately, None if nothing is known."""
        failures = self._failures.get(model.id)
        return failures.reason if failures and failures.until > time.monotonic() else None

    async def acquire(self, model: Model) -> EngineProcess:
        """A ready engine for the model, started if need be.  Raises NoNodesAvailable."""
        async with self._locks.setdefault(model.id, asyncio.Lock()):
            engine = self._engines.get(model.id)
            if engine is None or not engine.alive:
                engine = await self._start(model)
            engine.users += 1
            return engine

    def release(self, engine: EngineProcess) -> None:
        engine.users -= 1
        engine.idle_since = time.monotonic()
        if engine.users == 0 and self._keep_alive >= 0:
            self._spawn(self._unload_when_idle(engine))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(engine.stop() for engine in self._engines.values()))

    # -- starting ------------------------------------------------------------------------------

    async def _start(self, model: Model) -> EngineProcess:
        failures = self._failures.setdefault(model.id, _Failures())
        wait = failures.until - time.monotonic()
        if 0 < wait <= _WORTH_WAITING:
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
        if self.named:
            engine.name_prefixes(self.named)
        log.info("engine of %s ready in %.1f s", model.id, time.monotonic() - began)
        self._engines[model.id] = engine
        self._spawn(self._watch(engine))
        return engine

    async def _fit(self, model: Model) -> Load:
        """Make room for the model by unloading idle engines, the longest idle first."""
        context = memory.context_of(model, self._config.context)
        kv_tokens = memory.kv_tokens_of(context, self._config.kv_tokens)
        while (free := memory.available()) is not None:
            room = free - _RESERVE_BYTES
            if memory.estimate(model, kv_tokens) <= room:
                break
            idle = [engine for engine in self.engines if engine.users == 0]
            if idle:
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
        return Load(
            path=str(model.path),
            offset=model.offset,
            context=context,
            kv_tokens=kv_tokens,
            max_sequences=self._config.max_sequences,
            token_budget=self._config.token_budget,
            threads=self._config.threads,
            drafting=self._config.drafting,
            context_shift=self._config.context_shift,
            parse_special=self._config.parse_special,
            parts=[str(path) for path, _ in model.parts],
            model=model.id,
        )

    # -- ending --------------------------------------------------------------------------------

    async def _watch(self, engine: EngineProcess) -> None:
        await engine.closed.wait()
        if self._engines.get(engine.model_id) is engine:  # else we stopped it ourselves
            del self._engines[engine.model_id]
            log.error("the engine of %s died; last words:\n%s", engine.model_id, engine.last_words)
            if time.monotonic() - engine.started_at > _FORGIVEN_AFTER:
                self._failures.pop(engine.model_id, None)
            self._note_failure(engine.model_id, "it died", first_free=True)

    def _note_failure(self, model_id: str, reason: str, *, first_free: bool = False) -> None:
        failures = self._failures.setdefault(model_id, _Failures())
        failures.count += 1
        failures.reason = reason
        exponent = failures.count - (2 if first_free else 1)
        delay = 0.0 if exponent < 0 else min(2.0**exponent, _LONGEST_BACKOFF)
        failures.until = time.monotonic() + delay

    async def _unload_when_idle(self, engine: EngineProcess) -> None:
        await asyncio.sleep(self._keep_alive)
        idle = time.monotonic() - engine.idle_since
        if engine.alive and engine.users == 0 and idle >= self._keep_alive:
            log.info("unloading %s: idle for %.0f s", engine.model_id, idle)
            await self._unload(engine)

    async def _unload(self, engine: EngineProcess) -> None:
        if self._engines.get(engine.model_id) is engine:
            del self._engines[engine.model_id]
            await engine.stop()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
