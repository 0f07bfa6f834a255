"""The plan of where an engine goes, in many generated worlds, and the cases that have names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.messages import CPU
from pinaivu_box.gateway import layouts
from pinaivu_box.gateway.layouts import Layout, Rules, Sizes, Space
from pinaivu_box.gateway.placement_plan import (
    EngineKey,
    Refuse,
    RunningEngine,
    Start,
    WaitForEngines,
    World,
    another_replica,
    plan,
    pressed,
)
from tests.support.layer_needs import MIB, LayerNeeds

SIZES = Sizes(context=4096, kv_tokens=16384, sequences=16)
RULES = Rules(SIZES, fixed_cache=True)


def gpus(*free: int, cpu: int = 4096) -> list[Space]:
    """GPUs with so many MiB free, and the CPU's."""
    spaces = [Space(f"CUDA{n}", size * MIB, 16384 * MIB) for n, size in enumerate(free)]
    return [*spaces, Space(CPU, cpu * MIB, 2 * cpu * MIB, gpu=False)]


def engine(model: str, memory: dict[str, int], **more: Any) -> RunningEngine:
    sizes = {device: size * MIB for device, size in memory.items()}
    return RunningEngine(EngineKey(model), sizes, **{"idle_seconds": 100.0, **more})


def model_of(mib: int, layers: int = 16) -> LayerNeeds:
    """A model of about so many MiB with its cache of 16,384 tokens."""
    cache = 64 * SIZES.kv_tokens
    return LayerNeeds(layers, (mib * MIB - 8 * MIB) // layers - cache)


def started(needs: LayerNeeds, spaces: list[Space], rules: Rules = RULES, **more: Any) -> Start:
    engines = more.pop("engines", ())
    decision = plan(needs, rules, World(spaces, engines), patient=more.pop("patient", True))
    assert isinstance(decision, Start), decision
    return decision


# -- generated worlds --------------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """1 to 8 devices of unequal memory, some of it taken by other programs, and engines on them."""
    totals = draw(st.lists(st.integers(64, 2048), min_size=0, max_size=7))
    devices = [(f"CUDA{n}", total, True) for n, total in enumerate(totals)]
    devices.append((CPU, draw(st.integers(64, 4096)), False))
    left = {name: total - draw(st.integers(0, total // 2)) for name, total, _ in devices}
    engines = []
    for number in range(draw(st.integers(0, 5))):
        memory = {}
        for name in draw(st.lists(st.sampled_from(sorted(left)), max_size=3, unique=True)):
            size = draw(st.integers(0, left[name]))
            left[name] -= size
            memory[name] = size
        engines.append(
            engine(
                f"other:{number}",
                memory,
                users=draw(st.sampled_from([0, 0, 1, 3])),
                pinned=draw(st.sampled_from([False, False, True])),
                starting=draw(st.sampled_from([False, False, False, True])),
                idle_seconds=draw(st.sampled_from([0.0, 5.0, 60.0, 3000.0])),
                interval=draw(st.sampled_from([1.0, 30.0, math.inf])),
                load_seconds=draw(st.sampled_from([0.5, 5.0, 60.0])),
            )
        )
    spaces = [Space(name, left[name] * MIB, total * MIB, gpu) for name, total, gpu in devices]
    return World(spaces, engines)


@st.composite
def models(draw: st.DrawFn) -> LayerNeeds:
    layers = draw(st.integers(2, 40))
    return LayerNeeds(layers, draw(st.integers(1, 60)) * MIB, draw(st.integers(0, 1024)))


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    context = draw(st.sampled_from([512, 4096, 8192]))
    named = draw(st.lists(st.sampled_from(["CUDA0", "CUDA1", "CUDA2", CPU]), unique=True))
    return Rules(
        Sizes(context, context * draw(st.sampled_from([1, 2, 5])), draw(st.integers(1, 64))),
        devices=tuple(named),
        gpu_layers=draw(st.sampled_from([None, None, None, 0, 3, 999])),
        split=draw(st.sampled_from(["layer", "layer", "tensor", "none"])),
        tensor_split=tuple(draw(st.sampled_from([[], [], [3.0, 1.0], [0.0]]))),
        main_device=draw(st.sampled_from(["", "", "CUDA1"])),
        fixed_context=draw(st.booleans()),
        fixed_cache=draw(st.booleans()),
    )


def check_layout(layout: Layout, needs: LayerNeeds, its: Rules, spaces: list[Space]) -> None:
    free = {space.device: space.free for space in spaces}
    assert layout.memory == needs.memory(layout.sizes, layout.division)
    assert all(size <= free[device] for device, size in layout.memory.items())
    gpus = [device for device, _ in layout.division.layers]
    assert len(set(gpus)) == len(gpus)
    assert all(count > 0 for _, count in layout.division.layers)
    assert CPU not in gpus and all(its.allows(device) for device in gpus)
    assert 0 <= layout.division.on_gpus <= needs.layers
    if its.gpu_layers is not None and gpus:
        assert layout.division.on_gpus == min(its.gpu_layers, needs.layers)
    if its.split == "none":
        assert len(gpus) <= 1 or its.tensor_split
    assert layout.sizes.context <= layout.sizes.kv_tokens
    assert 1 <= layout.sizes.sequences <= its.sizes.sequences
    if its.fixed_context:
        assert layout.sizes.context == its.sizes.context
    if its.fixed_cache:
        assert layout.sizes.kv_tokens <= its.sizes.kv_tokens


@settings(max_examples=300, deadline=None)
@given(worlds(), models(), rules(), st.booleans())
def test_a_plan_fits_and_ends_only_what_is_idle_and_needed(
    world: World, needs: LayerNeeds, its: Rules, patient: bool
) -> None:
    decision = plan(needs, its, world, patient=patient)
    engines = {each.key: each for each in world.engines}
    if isinstance(decision, Start):
        ended = [engines[key] for key in decision.evict]
        assert all(not e.users and not e.pinned and not e.starting for e in ended)
        check_layout(decision.layout, needs, its, world.without(ended))
        assert decision.why
        assert its.allows(CPU) or its.gpu_layers is not None or (CPU not in decision.layout.devices)
    elif isinstance(decision, WaitForEngines):
        assert patient
        awaited = [engines[key] for key in decision.engines]
        assert awaited
        assert all((e.users or e.starting) and not e.pinned for e in awaited)
    else:
        assert "iB of memory and" in decision.why or its.devices
    assert decision == plan(needs, its, world, patient=patient)


@settings(max_examples=100, deadline=None)
@given(worlds(), models(), rules())
def test_none_of_the_engines_that_are_ended_could_have_stayed(
    world: World, needs: LayerNeeds, its: Rules
) -> None:
    """The same model does not find a place of the same size while any one of them stays, for it."""
    decision = plan(needs, its, world, patient=False)
    if not isinstance(decision, Start) or not decision.evict:
        return
    ended = [each for each in world.engines if each.key in decision.evict]
    wanted = decision.layout
    for kept in ended:
        spaces = world.without(each for each in ended if each is not kept)
        fits = {space.device: space.free for space in spaces}
        sizes = min(wanted.sizes, its.sizes, key=lambda each: each.kv_tokens)
        memory = needs.memory(sizes, wanted.division)
        assert any(size > fits[device] for device, size in memory.items())


@settings(max_examples=100, deadline=None)
@given(worlds(), models(), rules(), st.integers(0, 2048))
def test_more_free_memory_on_every_device_never_turns_a_start_into_a_refusal(
    world: World, needs: LayerNeeds, its: Rules, more: int
) -> None:
    if isinstance(plan(needs, its, world, patient=False), Start):
        spaces = [
            replace(space, free=space.free + more * MIB, total=space.total + more * MIB)
            for space in world.spaces
        ]
        larger = plan(needs, its, World(spaces, world.engines), patient=False)
        assert isinstance(larger, Start)


@settings(max_examples=100, deadline=None)
@given(worlds(), models())
def test_what_fits_on_one_gpu_ends_nothing_and_is_not_divided(
    world: World, needs: LayerNeeds
) -> None:
    memory = needs.memory(SIZES, layouts.Division((("any", needs.layers),)))
    cpu = next(space for space in world.spaces if not space.gpu)
    fits = any(space.gpu and memory["any"] <= space.free for space in world.spaces)
    if fits and memory[CPU] <= cpu.free:
        decision = plan(needs, RULES, world, patient=True)
        assert isinstance(decision, Start)
        assert not decision.evict and len(decision.layout.division.layers) == 1
        assert decision.layout.division.on_gpus == needs.layers


@settings(max_examples=80, deadline=None)
@given(worlds(), models())
def test_without_permission_nothing_is_ended(world: World, needs: LayerNeeds) -> None:
    decision = plan(needs, RULES, world, patient=False, evict=False)
    assert not isinstance(decision, Start) or not decision.evict


@settings(max_examples=100, deadline=None)
@given(worlds(), models(), st.integers(0, 3))
def test_a_replica_is_on_a_gpu_of_its_own_in_memory_that_is_free(
    world: World, needs: LayerNeeds, users: int
) -> None:
    first = engine("wanted:1", {"CUDA0": 64}, users=users, places=2)
    found = another_replica(needs, RULES, World(world.spaces, [*world.engines, first]), "wanted:1")
    if found is not None:
        assert users > 1 and not found.evict
        (device,) = [device for device, _ in found.layout.division.layers]
        assert device != "CUDA0" and found.layout.division.on_gpus == needs.layers
        check_layout(found.layout, needs, RULES, list(world.spaces))


@settings(max_examples=80, deadline=None)
@given(worlds(), st.integers(1, 512))
def test_for_other_programs_only_idle_engines_on_that_gpu_are_ended(
    world: World, reserve: int
) -> None:
    engines = {each.key: each for each in world.engines}
    short = {s.device for s in world.spaces if s.gpu and s.free < reserve * MIB}
    for key in pressed(world, reserve * MIB):
        assert engines[key].evictable
        assert short & {device for device, size in engines[key].memory.items() if size}


# -- cases with names --------------------------------------------------------------------------


def test_of_two_gpus_with_room_the_one_with_more_free_memory_is_used() -> None:
    decision = started(model_of(400), gpus(500, 900))
    assert decision.layout.devices == ["CUDA1"]
    assert decision.why == "all on CUDA1: 400 MiB of 900 MiB fit"


def test_a_model_that_no_gpu_holds_is_divided_by_free_memory_among_as_few_as_possible() -> None:
    decision = started(model_of(1000, layers=20), gpus(300, 900, 450))
    assert [device for device, _ in decision.layout.division.layers] == ["CUDA1", "CUDA2"]
    counts = dict(decision.layout.division.layers)
    assert counts["CUDA1"] == pytest.approx(2 * counts["CUDA2"], abs=1)
    assert "divided among CUDA1, CUDA2" in decision.why and "no single one" in decision.why


def test_what_the_gpus_cannot_hold_goes_to_the_cpu_in_part() -> None:
    decision = started(model_of(1000, layers=20), gpus(300, 300))
    layout = decision.layout
    assert layout.devices == ["CUDA0", "CUDA1", CPU]
    assert 8 <= layout.division.on_gpus <= 11
    assert decision.why.endswith("the others on the CPU: the GPUs have no more room")


def test_without_the_cpu_among_the_devices_that_is_refused_with_the_numbers() -> None:
    its = replace(RULES, devices=("CUDA0", "CUDA1"), fixed_context=True)
    world = World(gpus(300, 300))
    decision = plan(model_of(1000, layers=20), its, world, patient=True)
    assert isinstance(decision, Refuse)
    assert decision.why.endswith("300 MiB on CUDA0, 300 MiB on CUDA1 can be had")


def test_a_model_whose_devices_are_not_there_is_refused() -> None:
    decision = plan(model_of(10), replace(RULES, devices=("CUDA7",)), World(gpus(99)), patient=True)
    assert isinstance(decision, Refuse)
    assert decision.why == "may use CUDA7 only, and what can be used now is CUDA0, CPU"


def test_a_box_without_a_gpu_uses_the_cpu_and_shrinks_the_cache_last() -> None:
    needs = LayerNeeds(10, 20 * MIB, cell=2048)  # 200 MiB, and 320 MiB of cache
    assert started(needs, gpus(cpu=700)).layout.sizes == SIZES
    cold = engine("cold:1", {CPU: 300})
    decision = started(needs, gpus(cpu=400), engines=[cold])
    assert decision.evict == (cold.key,) and decision.layout.sizes == SIZES
    smaller = started(needs, gpus(cpu=400))
    assert smaller.layout.sizes == Sizes(4096, 8192, 16)
    assert "a cache of 8192 tokens, for lack of memory" in smaller.why


def test_a_warm_engine_stays_if_a_smaller_cache_does() -> None:
    needs = LayerNeeds(10, 20 * MIB, cell=2048)
    warm = engine("warm:1", {CPU: 300}, idle_seconds=1.0)
    decision = started(needs, gpus(cpu=400), engines=[warm])
    assert not decision.evict and decision.layout.sizes.kv_tokens == 8192


def test_the_engine_that_is_cheap_to_load_and_little_used_is_ended_first() -> None:
    engines = [
        engine("slow:1", {"CUDA0": 500}, load_seconds=60.0),
        engine("often:1", {"CUDA1": 500}, interval=2.0, idle_seconds=30.0),
        engine("cheap:1", {"CUDA2": 500}),
    ]
    decision = started(model_of(400), gpus(0, 0, 0), engines=engines)
    assert decision.evict == (EngineKey("cheap:1"),)
    assert "in place of cheap:1" in decision.why


def test_a_pinned_engine_stays_and_the_model_goes_to_the_cpu() -> None:
    pinned = engine("pinned:1", {"CUDA0": 900}, pinned=True)
    decision = started(model_of(400), gpus(50), engines=[pinned])
    assert not decision.evict and decision.layout.devices[-1] == CPU


def test_for_an_engine_that_works_it_waits_before_it_takes_the_cpu() -> None:
    working = engine("working:1", {"CUDA0": 900}, users=1)
    world = World(gpus(4), [working])
    decision = plan(model_of(400), RULES, world, patient=True)
    assert decision == WaitForEngines((working.key,), "waits until working:1 is not in use")
    late = plan(model_of(400), RULES, world, patient=False)
    assert isinstance(late, Start) and late.layout.devices == [CPU]


def test_gpu_layers_split_and_tensor_split_are_followed() -> None:
    needs = model_of(400, layers=16)
    some = started(needs, gpus(900, 900), replace(RULES, gpu_layers=5))
    assert some.layout.division.on_gpus == 5 and len(some.layout.division.layers) == 1
    none = started(needs, gpus(900), replace(RULES, gpu_layers=0))
    assert none.layout.devices == [CPU] and "gpu_layers = 0" in none.why
    main = started(needs, gpus(900, 500), replace(RULES, split="none", main_device="CUDA1"))
    assert main.layout.devices == ["CUDA1"]
    tensor = started(needs, gpus(900, 900), replace(RULES, split="tensor"))
    assert tensor.layout.division.split == "tensor" and len(tensor.layout.devices) == 2
    parts = started(needs, gpus(900, 900), replace(RULES, tensor_split=(3.0, 1.0)))
    assert parts.layout.division.layers == (("CUDA0", 12), ("CUDA1", 4))
    assert parts.why.endswith("as tensor_split says")


def test_a_context_that_nobody_has_set_gets_shorter_before_a_model_is_refused() -> None:
    needs = LayerNeeds(10, 20 * MIB, cell=2048)  # 80 MiB of cache for 4,096 tokens
    decision = started(needs, gpus(cpu=300))
    assert decision.layout.sizes == Sizes(2048, 2048, 16)
    assert "a context of 2048 tokens, for lack of memory" in decision.why
    fixed = plan(needs, replace(RULES, fixed_context=True), World(gpus(cpu=300)), patient=True)
    assert fixed == Refuse("needs about 320 MiB of memory and 300 MiB can be had")


def test_a_large_gpu_gives_a_larger_cache_and_leaves_half_of_its_memory() -> None:
    its = replace(RULES, fixed_cache=False)
    needs = model_of(400)
    layout = started(needs, gpus(16000), its).layout
    assert layout.sizes.kv_tokens == 65536  # 16 sequences of 4,096 tokens
    large = LayerNeeds(16, 10 * MIB, cell=1024)  # 256 MiB of cache
    assert started(large, gpus(900), its).layout.sizes.kv_tokens == 16384


def test_three_replicas_of_a_small_model_spread_over_three_gpus() -> None:
    spaces = gpus(900, 900, 900)
    engines: list[RunningEngine] = []
    devices: list[str] = []
    for number in range(3):
        world = World(spaces, engines)
        found = another_replica(model_of(400), RULES, world, "small:1") if engines else None
        decision = found or started(model_of(400), spaces)
        devices += decision.layout.devices
        memory = {device: size // MIB for device, size in decision.layout.memory.items()}
        engines.append(
            replace(engine("small:1", memory, users=8), key=EngineKey("small:1", number))
        )
        taken = {device: size * MIB for device, size in memory.items()}
        spaces = [replace(s, free=s.free - taken.get(s.device, 0)) for s in spaces]
    assert sorted(devices) == ["CUDA0", "CUDA1", "CUDA2"]
    assert another_replica(model_of(400), RULES, World(spaces, engines), "small:1") is None


def test_an_idle_engine_makes_way_for_another_program() -> None:
    idle = engine("idle:1", {"CUDA0": 400})
    works = engine("works:1", {"CUDA0": 400}, users=1)
    assert pressed(World(gpus(100), [idle, works]), 50 * MIB) == ()
    assert pressed(World(gpus(10), [idle, works]), 50 * MIB) == (idle.key,)
