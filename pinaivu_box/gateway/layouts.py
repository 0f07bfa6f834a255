"""Where the layers of one model can go in the memory that is free: pure.

A model is best on one GPU; else its layers are divided among several, by the memory that is free on
each; else some of them stay on the CPU, whose cores compute them.  A machine without a GPU has the
CPU only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pinaivu_box.engine.messages import CPU, Split

Tier = Literal["one", "several", "partly", "cpu"]
_MIN_TOKENS_A_SEQUENCE = 128  # of the KV cache; with less, sequences only preempt each other
_MIN_CONTEXT = 2048  # nobody has set one, and memory for more cannot be had


@dataclass(frozen=True)
class Space:
    """What can be had on a device, in bytes; `gpu` tells it from the CPU.  An `integrated` GPU has
    the machine's memory."""

    device: str
    free: int
    total: int
    gpu: bool = True
    integrated: bool = False


@dataclass(frozen=True)
class Sizes:
    """Tokens of one sequence, tokens of the KV cache, and sequences at the same time."""

    context: int
    kv_tokens: int
    sequences: int


@dataclass(frozen=True)
class Division:
    """How many layers each GPU has; the CPU has those that are left.  With the split "tensor" the
    numbers are the proportions in which each layer is divided."""

    layers: tuple[tuple[str, int], ...] = ()
    split: Split = "layer"

    @property
    def on_gpus(self) -> int:
        return sum(count for _, count in self.layers)


class Needs(Protocol):
    """What a model takes; the output counts as a layer."""

    @property
    def layers(self) -> int: ...

    def memory(self, sizes: Sizes, division: Division) -> Mapping[str, int]:
        """Bytes by device."""
        ...


@dataclass(frozen=True)
class Rules:
    """What is set for a model: `devices` (empty: any), `gpu_layers` (None: as many as fit),
    `split`, `tensor_split` by device in the order of `devices`, and the `main_device`.

    `fixed_context` and `fixed_cache` say that an operator has chosen that size of `sizes`.
    """

    sizes: Sizes
    devices: tuple[str, ...] = ()
    gpu_layers: int | None = None
    split: Split = "layer"
    tensor_split: tuple[float, ...] = ()
    main_device: str = ""
    fixed_context: bool = False
    fixed_cache: bool = False

    def allows(self, device: str) -> bool:
        return not self.devices or device in self.devices


@dataclass(frozen=True)
class Layout:
    """Where an engine goes and how large it is; `memory` is what it takes by device."""

    sizes: Sizes
    division: Division
    memory: Mapping[str, int]
    layers: int

    @property
    def devices(self) -> list[str]:
        """Those that compute its layers."""
        gpus = [device for device, _ in self.division.layers]
        whole = self.division.split == "tensor" or self.division.on_gpus == self.layers
        return gpus if gpus and whole else [*gpus, CPU]


def tiers(spaces: Sequence[Space], rules: Rules, layers: int) -> list[Tier]:
    """The kinds of layouts to try for a model of so many layers, the best first; none if there is
    none of its devices."""
    gpus = _gpus(spaces, rules)
    if rules.gpu_layers == 0:
        return ["cpu"]
    if not gpus:
        return ["cpu"] if rules.allows(CPU) else []
    if rules.gpu_layers is not None and rules.gpu_layers < layers:
        return ["partly"]
    kinds: list[Tier] = ["one"]
    if rules.tensor_split and len(gpus) > 1:
        kinds = ["several"]
    elif len(gpus) > 1 and rules.split != "none":
        kinds = ["several"] if rules.split == "tensor" else ["one", "several"]
    if rules.allows(CPU) and rules.gpu_layers is None:
        kinds += ["partly", "cpu"]
    return kinds


def smaller_caches(rules: Rules) -> Iterator[Sizes]:
    """The wanted sizes with less and less cache, down to what one sequence can fill."""
    sizes = rules.sizes
    while sizes.kv_tokens > sizes.context:
        sizes = _with_cache(sizes, max(sizes.context, sizes.kv_tokens // 2))
        yield sizes


def smaller_contexts(rules: Rules) -> Iterator[Sizes]:
    """Shorter contexts than the wanted one, if nobody has set it: rather that than nothing."""
    context = rules.sizes.context
    while not rules.fixed_context and context > _MIN_CONTEXT:
        context = max(_MIN_CONTEXT, context // 2)
        yield _with_cache(replace(rules.sizes, context=context), context)


def best(
    tier: Tier, needs: Needs, rules: Rules, sizes: Sizes, spaces: Sequence[Space]
) -> Layout | None:
    """The best layout of that kind which fits, if there is one."""
    gpus = _gpus(spaces, rules)
    match tier:
        case "one":
            found = _on_one(needs, rules, sizes, gpus, spaces)
        case "several":
            found = _on_several(needs, rules, sizes, gpus, spaces)
        case "partly":
            found = _partly(needs, rules, sizes, gpus, spaces)
        case "cpu":
            found = _fitting(needs, sizes, Division(), spaces)
    return found


def grown(layout: Layout, needs: Needs, rules: Rules, spaces: Sequence[Space]) -> Layout:
    """The layout with a larger KV cache: as large as all sequences could use, while the engine
    takes no more than half of what is free on any GPU."""
    sizes = layout.sizes
    if rules.fixed_cache or CPU in layout.devices:
        return layout
    free = {space.device: space.free for space in spaces if space.gpu}
    while 2 * sizes.kv_tokens <= sizes.sequences * sizes.context:
        sizes = replace(sizes, kv_tokens=2 * sizes.kv_tokens)
        memory = needs.memory(sizes, layout.division)
        if not _within(memory, spaces) or any(
            2 * memory[device] > free[device] for device, _ in layout.division.layers
        ):
            break
        layout = replace(layout, sizes=sizes, memory=memory)
    return layout


def _on_one(
    needs: Needs, rules: Rules, sizes: Sizes, gpus: Sequence[Space], spaces: Sequence[Space]
) -> Layout | None:
    main = [gpu for gpu in gpus if gpu.device == rules.main_device]
    only = main if main and rules.split == "none" else gpus
    # The most free memory first: engines spread, and what comes later finds room in one piece.
    for gpu in sorted(only, key=lambda gpu: (gpu not in main, -gpu.free)):
        division = Division(((gpu.device, needs.layers),), "none")
        if (layout := _fitting(needs, sizes, division, spaces)) is not None:
            return layout
    return None


def _on_several(
    needs: Needs, rules: Rules, sizes: Sizes, gpus: Sequence[Space], spaces: Sequence[Space]
) -> Layout | None:
    """On as few as possible, unless it is said how it is to be divided."""
    if rules.tensor_split:
        return _divided(needs, rules, sizes, gpus, needs.layers, spaces)
    ordered = sorted(gpus, key=lambda gpu: (gpu.device != rules.main_device, -gpu.free))
    for count in range(2, len(ordered) + 1):
        some = [gpu for gpu in gpus if gpu in ordered[:count]]
        if (layout := _divided(needs, rules, sizes, some, needs.layers, spaces)) is not None:
            return layout
    return None


def _partly(
    needs: Needs, rules: Rules, sizes: Sizes, gpus: Sequence[Space], spaces: Sequence[Space]
) -> Layout | None:
    """With as many layers on the GPUs as fit (or as are set)."""
    if rules.split == "none":
        main = [gpu for gpu in gpus if gpu.device == rules.main_device]
        gpus = main or [max(gpus, key=lambda gpu: gpu.free)]
    if rules.gpu_layers is not None:
        alone = [[gpu] for gpu in sorted(gpus, key=lambda gpu: -gpu.free)]
        choices = [gpus] if rules.tensor_split else [*alone, gpus]
        layouts = (
            _divided(needs, rules, sizes, some, rules.gpu_layers, spaces) for some in choices
        )
        return next(filter(None, layouts), None)
    low, found = 0, None
    high = needs.layers
    while low + 1 < high:  # `low` fit, or are none; `high` do not
        middle = (low + high) // 2
        layout = _divided(needs, rules, sizes, gpus, middle, spaces)
        low, high, found = (middle, high, layout) if layout else (low, middle, found)
    return found


def _divided(
    needs: Needs,
    rules: Rules,
    sizes: Sizes,
    gpus: Sequence[Space],
    count: int,
    spaces: Sequence[Space],
) -> Layout | None:
    """So many layers on these GPUs, in the set proportions or in those of the free memory."""
    split = rules.split if len(gpus) > 1 else "none"
    if rules.tensor_split:
        named = rules.devices or tuple(gpu.device for gpu in gpus)
        weights = dict(zip(named, rules.tensor_split, strict=False))
        shares = [weights.get(gpu.device, 0.0) for gpu in gpus]
        if sum(shares) <= 0:
            return None
        return _fitting(needs, sizes, _division(gpus, _parts(count, shares), split), spaces)
    counts = _parts(count, [float(max(0, gpu.free)) for gpu in gpus])
    for _ in range(count):
        layout = _fitting(needs, sizes, division := _division(gpus, counts, split), spaces)
        if layout is not None:
            return layout
        memory = needs.memory(sizes, division)
        left = [gpu.free - memory.get(gpu.device, 0) for gpu in gpus]
        fullest, emptiest = left.index(min(left)), left.index(max(left))
        if left[fullest] >= 0 or sum(left) < 0 or not counts[fullest]:
            return None  # the CPU is short, or all are
        counts[fullest] -= 1
        counts[emptiest] += 1
    return None


def _parts(count: int, shares: Sequence[float]) -> list[int]:
    """`count` in these proportions, the largest remainders rounded up."""
    whole = sum(shares) or 1.0
    exact = [count * share / whole for share in shares]
    parts = [int(each) for each in exact]
    remainders = sorted(range(len(parts)), key=lambda n: parts[n] - exact[n])
    for number in remainders[: count - sum(parts)]:
        parts[number] += 1
    return parts


def _division(gpus: Sequence[Space], counts: Sequence[int], split: Split) -> Division:
    pairs = zip(gpus, counts, strict=True)
    return Division(tuple((gpu.device, count) for gpu, count in pairs if count), split)


def _fitting(
    needs: Needs, sizes: Sizes, division: Division, spaces: Sequence[Space]
) -> Layout | None:
    memory = needs.memory(sizes, division)
    return Layout(sizes, division, memory, needs.layers) if _within(memory, spaces) else None


def _within(memory: Mapping[str, int], spaces: Sequence[Space]) -> bool:
    free = {space.device: space.free for space in spaces}
    return all(size <= free.get(device, 0) for device, size in memory.items())


def _gpus(spaces: Sequence[Space], rules: Rules) -> list[Space]:
    """As llama.cpp chooses: integrated ones only if they are named, or if there are no others."""
    allowed = [space for space in spaces if space.gpu and rules.allows(space.device)]
    others = [space for space in allowed if not space.integrated]
    return allowed if rules.devices else others or allowed


def _with_cache(sizes: Sizes, kv_tokens: int) -> Sizes:
    sequences = max(1, min(sizes.sequences, kv_tokens // _MIN_TOKENS_A_SEQUENCE))
    return replace(sizes, kv_tokens=kv_tokens, sequences=sequences)
