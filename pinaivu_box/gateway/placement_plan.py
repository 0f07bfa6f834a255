"""What has to happen so that a model can be served: a pure function of models, devices, free memory
and demand.

In this order: a place in free memory; room made by ending engines that nobody needs soon; a smaller
KV cache; room made by any idle engine; waiting for engines that work; for what is left, a part on
the CPU, a shorter context, and last a refusal with the numbers.  An engine that works is never
ended, nor is one that is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from pinaivu_box.engine.messages import CPU
from pinaivu_box.gateway import layouts
from pinaivu_box.gateway.layouts import Layout, Needs, Rules, Sizes, Space, Tier

_GPU_TIERS: tuple[Tier, ...] = ("one", "several")
_WARM_SECONDS = 10.0  # an engine that was used since then is likely to be used again at once
_MAX_TURN_SECONDS = 5.0
_REPLICA_SHARE = 0.5  # of its places: with more in use, another replica is worth its memory


class EngineKey(NamedTuple):
    model: str
    replica: int = 0


@dataclass(frozen=True)
class RunningEngine:
    """An engine that is loaded or being loaded; `memory` by device is free once it has ended.

    `users` are requests that hold it.  `interval` is the mean time between its uses in seconds,
    `load_seconds` is how long loading it took, and `age_seconds` how long ago that was.  `replicas`
    counts those of its model.
    """

    key: EngineKey
    memory: Mapping[str, int]
    users: int = 0
    places: int = 1
    pinned: bool = False
    starting: bool = False
    idle_seconds: float = 0.0
    interval: float = math.inf
    load_seconds: float = 1.0
    age_seconds: float = math.inf
    replicas: int = 1

    @property
    def evictable(self) -> bool:
        return not (self.users or self.pinned or self.starting or self.has_its_turn)

    @property
    def turn_seconds(self) -> float:
        """For how long it stays if requests come for it: as long as it took to load, so that two
        models that alternate spend no more than half of the time on loading."""
        return min(self.load_seconds, _MAX_TURN_SECONDS)

    @property
    def has_its_turn(self) -> bool:
        return self.age_seconds < self.turn_seconds and self.interval < self.load_seconds

    @property
    def warm(self) -> bool:
        """Whether it was used so lately that ending it would likely mean to load it again at
        once."""
        return self.idle_seconds < max(_WARM_SECONDS, 2 * self.load_seconds)

    @property
    def cost(self) -> float:
        """Of ending it: the seconds of loading that each second from now is expected to bring.

        The next use is as far away as uses were apart, or as it has been idle if that is longer.
        Another replica would take its place."""
        expected = max(min(self.interval, 3600.0), self.idle_seconds, 0.1)
        return self.load_seconds / expected / (4 if self.replicas > 1 else 1)


@dataclass(frozen=True)
class Start:
    """End the engines in `evict` and start one so.  `short` says that with more free memory there
    would be a better place."""

    layout: Layout
    why: str
    evict: tuple[EngineKey, ...] = ()
    short: bool = False

    def in_place_of(self, models: Sequence[str]) -> Start:
        """The same, for which engines of these models have ended."""
        return replace(self, why=f"{self.why}, in place of {', '.join(models)}") if models else self


@dataclass(frozen=True)
class WaitForEngines:
    """There will be a place once these engines are not in use any more, or have been loaded."""

    engines: tuple[EngineKey, ...]
    why: str


@dataclass(frozen=True)
class Refuse:
    """`why`, as what follows the model's name, and what an operator can do."""

    why: str
    todo: str = "set a smaller context for it, or wait until other models are idle"


Decision = Start | WaitForEngines | Refuse
Found = tuple[Layout, tuple[RunningEngine, ...]]


@dataclass(frozen=True)
class World:
    spaces: Sequence[Space]
    engines: Sequence[RunningEngine] = ()

    def without(self, ended: Iterable[RunningEngine]) -> list[Space]:
        """The devices once those engines have ended."""
        freed: dict[str, int] = {}
        for engine in ended:
            for device, size in engine.memory.items():
                freed[device] = freed.get(device, 0) + size
        return [
            replace(space, free=min(space.total, space.free + freed.get(space.device, 0)))
            for space in self.spaces
        ]


def plan(
    needs: Needs, rules: Rules, world: World, *, patient: bool, evict: bool = True
) -> Decision:
    """What to do so that the model runs.  Unless `patient`, the best that can be had now is taken
    rather than waiting for engines that work."""
    kinds = layouts.tiers(world.spaces, rules, needs.layers)
    if not kinds:
        there = ", ".join(space.device for space in world.spaces)
        why = f"may use {', '.join(rules.devices)} only, and what can be used now is {there}"
        return Refuse(why, "add a device to its devices")
    search = _PlanSearch(needs, rules, world)
    idle = [engine for engine in world.engines if engine.evictable] if evict else []
    cold = [engine for engine in idle if not engine.warm]
    best_kinds = [kind for kind in kinds if kind in _GPU_TIERS] or kinds
    found = search.of_kinds(best_kinds, cold, idle)
    if found is not None:
        return search.start(*found)
    busy = [each for each in world.engines if not (each.evictable or each.pinned)]
    if patient and (engines := search.awaited(best_kinds, idle, busy)):
        names = ", ".join(engine.key.model for engine in engines)
        keys = tuple(engine.key for engine in engines)
        return WaitForEngines(keys, f"waits until {names} is not in use")
    if best_kinds != kinds:
        rest = [kind for kind in kinds if kind not in best_kinds]
        found = search.of_kinds(rest, cold, idle)
    if found is None:
        contexts = layouts.smaller_contexts(rules)
        found = next(filter(None, (search.at(sizes, kinds, idle) for sizes in contexts)), None)
    return Refuse(search.shortage(kinds, idle)) if found is None else search.start(*found)


def all_busy(world: World, model: str) -> bool:
    """Whether each engine of the model has so many requests that another one is worth it."""
    mine = [engine for engine in world.engines if engine.key.model == model]
    return bool(mine) and all(
        not engine.starting and engine.users > _REPLICA_SHARE * engine.places for engine in mine
    )


def another_replica(needs: Needs, rules: Rules, world: World, model: str) -> Start | None:
    """Another replica of a model whose engines are all busy, on a GPU of its own with free memory;
    None if that is not worth it or there is none."""
    if not all_busy(world, model):
        return None
    mine = [engine for engine in world.engines if engine.key.model == model]
    used = {device for engine in mine for device in engine.memory if device != CPU}
    spaces = [space for space in world.spaces if not space.gpu or space.device not in used]
    if "one" not in layouts.tiers(spaces, rules, needs.layers):
        return None
    layout = layouts.best("one", needs, rules, rules.sizes, spaces)
    if layout is None:
        return None
    users = sum(engine.users for engine in mine)
    layout = layouts.grown(layout, needs, rules, spaces)
    return Start(layout, f"another replica on {layout.devices[0]}: {users} requests use the model")


def pressed(world: World, reserve: int) -> tuple[EngineKey, ...]:
    """The idle engines to end because other programs need the memory of a GPU: so many that
    `reserve` bytes are free again."""
    ended: list[RunningEngine] = []
    for space in world.spaces:
        idle = [e for e in world.engines if e.evictable and e.memory.get(space.device)]
        idle = [engine for engine in idle if engine not in ended]
        free = space.free + sum(engine.memory.get(space.device, 0) for engine in ended)
        while space.gpu and free < reserve and idle:
            cheapest = min(idle, key=lambda engine: engine.cost)
            idle.remove(cheapest)
            ended.append(cheapest)
            free += cheapest.memory[space.device]
    return tuple(engine.key for engine in ended)


class _PlanSearch:
    """For layouts of one model in a world."""

    def __init__(self, needs: Needs, rules: Rules, world: World) -> None:
        self._needs, self._rules, self._world = needs, rules, world

    def of_kinds(
        self, kinds: Sequence[Tier], cold: Sequence[RunningEngine], idle: Sequence[RunningEngine]
    ) -> Found | None:
        """The first that fits: a cold engine is ended rather than making the cache smaller, and
        that is done rather than ending one that is warm."""
        full, smaller = [self._rules.sizes], list(layouts.smaller_caches(self._rules))
        steps = (
            (full, ()),
            (full, cold),
            (smaller, ()),
            (smaller, cold),
            ([*full, *smaller], idle),
        )
        tries = (self.at(sizes, kinds, choice) for caches, choice in steps for sizes in caches)
        return next(filter(None, tries), None)

    def at(
        self, sizes: Sizes, kinds: Sequence[Tier], idle: Sequence[RunningEngine]
    ) -> Found | None:
        """A layout of these sizes, of the first kind for which enough engines are idle."""
        for kind in kinds:
            if kind == "one" and idle:
                found = self._on_cheapest(sizes, idle)
            else:
                found = _fewest(idle, partial(self._best, kind, sizes, ()))
            if found is not None:
                return found
        return None

    def awaited(
        self,
        kinds: Sequence[Tier],
        idle: Sequence[RunningEngine],
        busy: Sequence[RunningEngine],
    ) -> tuple[RunningEngine, ...]:
        """The busy engines to wait for, empty if that would not help."""
        for sizes in (self._rules.sizes, *layouts.smaller_caches(self._rules)):
            for kind in kinds:
                found = _fewest(busy, partial(self._best, kind, sizes, tuple(idle)))
                if found is not None:
                    return found[1]
        return ()

    def start(self, layout: Layout, ended: tuple[RunningEngine, ...]) -> Start:
        spaces = self._world.without(ended)
        layout = layouts.grown(layout, self._needs, self._rules, spaces)
        kinds = layouts.tiers(self._world.spaces, self._rules, self._needs.layers)
        short = (
            bool(ended)
            or layout.sizes.kv_tokens < self._rules.sizes.kv_tokens
            or (CPU in layout.devices and kinds[0] in _GPU_TIERS)
        )
        evict = tuple(engine.key for engine in ended)
        start = Start(layout, self._why(layout, ended), evict, short)
        return start.in_place_of([engine.key.model for engine in ended])

    def shortage(self, kinds: Sequence[Tier], idle: Sequence[RunningEngine]) -> str:
        """What it needs at least, and what can be had, as a clause."""
        spaces = self._world.without(idle)
        smaller = [*layouts.smaller_caches(self._rules), *layouts.smaller_contexts(self._rules)]
        least = [self._rules.sizes, *smaller][-1]
        gpus = [s for s in spaces if s.gpu and self._rules.allows(s.device)]
        free = ", ".join(f"{size_text(max(0, s.free))} on {s.device}" for s in gpus)
        cpu = next((space for space in spaces if not space.gpu), None)
        total = sum(self._needs.memory(least, layouts.Division()).values())
        if cpu is not None and ({"cpu", "partly"} & set(kinds)):
            here = (
                f"{size_text(max(0, cpu.free))} of the machine's"
                if free
                else size_text(max(0, cpu.free))
            )
            free = f"{free} and {here}" if free else here
        return f"needs about {size_text(total)} of memory and {free} can be had"

    def _on_cheapest(self, sizes: Sizes, idle: Sequence[RunningEngine]) -> Found | None:
        """On the GPU where the least has to end."""
        choices: list[Found] = []
        for space in self._world.spaces:
            there = [engine for engine in idle if engine.memory.get(space.device)]
            if space.gpu and (found := _fewest(there, partial(self._alone, space, sizes))):
                choices.append(found)
        return min(choices, key=lambda found: (_cost(found[1]), len(found[1])), default=None)

    def _alone(self, gpu: Space, sizes: Sizes, ended: Sequence[RunningEngine]) -> Layout | None:
        spaces = [s for s in self._world.without(ended) if not s.gpu or s.device == gpu.device]
        return layouts.best("one", self._needs, self._rules, sizes, spaces)

    def _best(
        self,
        kind: Tier,
        sizes: Sizes,
        idle: Sequence[RunningEngine],
        ended: Sequence[RunningEngine],
    ) -> Layout | None:
        spaces = self._world.without((*idle, *ended))
        return layouts.best(kind, self._needs, self._rules, sizes, spaces)

    def _why(self, layout: Layout, ended: Sequence[RunningEngine]) -> str:
        parts = [self._where(layout, ended)]
        wanted = self._rules.sizes
        if layout.sizes.context < wanted.context:
            parts.append(f"with a context of {layout.sizes.context} tokens, for lack of memory")
        elif layout.sizes.kv_tokens < wanted.kv_tokens:
            parts.append(f"with a cache of {layout.sizes.kv_tokens} tokens, for lack of memory")
        return ", ".join(parts)

    def _where(self, layout: Layout, ended: Sequence[RunningEngine]) -> str:
        gpus, rules = [device for device, _ in layout.division.layers], self._rules
        size = size_text(sum(layout.memory.get(device, 0) for device in gpus or [CPU]))
        known = {space.device: space for space in self._world.without(ended)}
        free = ", ".join(f"{size_text(max(0, known[gpu].free))}" for gpu in gpus)
        if rules.gpu_layers == 0:
            return f"{size} on the CPU, as gpu_layers = 0 says"
        if not gpus and any(space.gpu for space in self._world.spaces):
            named = any(s.gpu and rules.allows(s.device) for s in self._world.spaces)
            reason = "no GPU has room for a layer" if named else "devices names no GPU"
            return f"{size} on the CPU: {reason}"
        if not gpus:
            return f"{size} on the CPU: there is no GPU"
        if CPU in layout.devices:
            reason = (
                "as gpu_layers says"
                if rules.gpu_layers is not None
                else "the GPUs have no more room"
            )
            on_gpus = f"{layout.division.on_gpus} of {layout.layers} layers on {', '.join(gpus)}"
            return f"{on_gpus}, the others on the CPU: {reason}"
        if len(gpus) == 1:
            return f"all on {gpus[0]}: {size} of {free} fit"
        reason = "as tensor_split says" if rules.tensor_split else "no single one has room"
        if rules.split == "tensor":
            reason = "each layer divided, as split says"
        return f"{size} divided among {', '.join(gpus)} (free: {free}): {reason}"


def _fewest(
    idle: Sequence[RunningEngine], fit: Callable[[tuple[RunningEngine, ...]], Layout | None]
) -> Found | None:
    """A layout that fits if the least is ended: by cost for the memory that it frees, and none that
    can stay."""
    if (layout := fit(())) is not None:
        return layout, ()
    if not idle or (layout := fit(tuple(idle))) is None:
        return None
    ended: list[RunningEngine] = []
    waiting = sorted(idle, key=lambda e: (e.cost / (sum(e.memory.values()) or 1), e.key))
    while len(ended) < len(idle) and (layout := fit(tuple(ended))) is None:
        ended.append(waiting.pop(0))
    layout = layout or fit(tuple(ended))
    if layout is None:
        return None
    for engine in sorted(ended, key=lambda engine: -engine.cost):
        fewer = [other for other in ended if other is not engine]
        if (smaller := fit(tuple(fewer))) is not None:
            ended, layout = fewer, smaller
    return layout, tuple(ended)


def _cost(engines: Iterable[RunningEngine]) -> float:
    return sum(engine.cost for engine in engines)


def size_text(size: int) -> str:
    """Bytes for a sentence."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
