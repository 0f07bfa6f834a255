"""How much memory a model takes, part by part and device by device, before it is loaded.

All of it follows from the header and from how llama.cpp divides a model: the weights and the cache
of a layer are on the layer's device, the output layer is on that of the last layer, and the token
embeddings stay in the machine's memory.  What the buffers for computing take is llama.cpp's to say
(`models.probe`); without that it is estimated.

Sliding-window layers count in full: the engine keeps all of their cells, so that a cached prefix
can be cut anywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import msgspec

from pinaivu_box.engine.messages import CPU, DeviceMemory, KvType, LoadModel, Probed, Split
from pinaivu_box.models.gguf import TENSOR_TYPES, Header

# The Python process of an engine with numpy and llama.cpp, before it has a model.
PROCESS_BYTES = 110 * 1024 * 1024
_SEQUENCE_IDS = 256  # of the engine's runner, where all sequences share one pool of cells
_UBATCH = 512  # tokens that the runner computes at once, at most
_PAD = 256  # cells: llama.cpp makes contexts that are a multiple of it
_HALF, _FLOAT = 2, 4  # bytes
_GGML_TYPES: dict[KvType, int] = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2,
    "iq4_nl": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Compute:
    """Bytes of the buffers for computing: of `layers` and of the `output` layer wherever these are
    (a device needs the larger one), of a step's `inputs`, and of the `results` of all sequences.
    The last two are in the machine's memory."""

    layers: int
    output: int
    inputs: int
    results: int


@dataclass(frozen=True)
class Need:
    """Bytes that an engine takes.

    `weights` and `cache` (KV cache and recurrent states) are those of each layer; `output` is the
    output layer, which counts as one layer more.  If it is `tied` to the token embeddings
    (`input`), only a GPU needs a copy of its own.  `process` is what an engine takes without a
    model.  `probed` are the buffers for computing by device as llama.cpp has told them for one way
    to divide the model.
    """

    weights: tuple[int, ...]
    cache: tuple[int, ...]
    input: int
    output: int
    tied: bool
    compute: Compute
    process: int = PROCESS_BYTES
    probed: Mapping[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers can be on a GPU, the output layer included."""
        return len(self.weights) + 1

    @property
    def on_cpu(self) -> int:
        """Bytes of the machine's memory if no layer is on a GPU."""
        return spread(self).host_total


@dataclass(frozen=True)
class Share:
    """What one device gets: how many layers (the output counts as one), and the bytes."""

    layers: int
    memory: DeviceMemory

    @property
    def total(self) -> int:
        return self.memory.total


@dataclass(frozen=True)
class Spread:
    """A model divided among devices.  `gpus` are the shares of the GPUs in their order, without
    those that get nothing; `host_total` is `host` with what the process takes itself."""

    gpus: tuple[Share, ...]
    host: Share
    process: int

    @property
    def host_total(self) -> int:
        return self.host.total + self.process

    @property
    def gpu_layers(self) -> int:
        return sum(share.layers for share in self.gpus)

    @property
    def by_device(self) -> dict[str, int]:
        """Bytes by the names of the devices."""
        return {share.memory.device: share.total for share in self.gpus} | {CPU: self.host_total}


def need(header: Header, load: LoadModel, probed: Probed | None = None) -> Need:
    """What an engine takes that is told to load the model so.  `probed` is llama.cpp's own answer
    for the same load, where there is one."""
    cache = _cache_bytes(header, load)
    if probed is not None and sum(cache) != probed.cache:
        cache = _scaled(cache, probed.cache)
    return Need(
        weights=header.layer_bytes,
        cache=cache,
        input=header.input_bytes,
        output=header.output_bytes + (header.embedding_bytes if header.tied_output else 0),
        tied=header.tied_output,
        compute=_compute_bytes(header, load),
        probed={} if probed is None else probed.compute,
    )


def spread(need: Need, layers: Sequence[tuple[str, float]] = (), split: Split = "layer") -> Spread:
    """Divide the model: each of these GPUs gets so many of the last layers, in this order, and the
    host the rest.  With the split "tensor" the numbers are the proportions in which every layer is
    divided."""
    if split == "tensor":
        return _by_tensors(need, layers)
    counts = [int(count) for _, count in layers]
    owners = [0] * max(0, need.layers - sum(counts))
    for number, count in enumerate(counts, 1):
        owners += [number] * count
    names = [CPU, *(name for name, _ in layers)]
    shares = [_share(need, name, owners, number) for number, name in enumerate(names)]
    gpus = [share for share in shares[1:] if share.layers]
    return _as_probed(need, Spread(tuple(gpus), shares[0], need.process))


def on_cpu(header: Header, context: int, kv_type: KvType = "f16") -> int:
    """Bytes of the machine's memory for an engine whose cache one sequence of so many tokens
    fills."""
    load = LoadModel("", 0, context, context, 1, _UBATCH, 0, kv_type=kv_type)
    return need(header, load).on_cpu


def divided(count: int, proportions: Sequence[float]) -> list[int]:
    """How many of `count` layers each device gets, as llama.cpp divides them in the proportions of
    `tensor_split`."""
    sums = list(accumulate(proportions, lambda a, b: _single(a + b), initial=0.0))[1:]
    bounds = [_single(value / sums[-1]) for value in sums]
    counts = [0] * len(bounds)
    for layer in range(count):
        owner = sum(bound <= _single(layer / count) for bound in bounds)
        counts[min(owner, len(bounds) - 1)] += 1
    return counts


def cells_of(load: LoadModel) -> int:
    """Cells of the KV cache that llama.cpp makes for it, over all sequences."""
    if is_pool(load):
        return _padded(load.kv_tokens)
    return _padded(load.context) * load.max_sequences


def is_pool(load: LoadModel) -> bool:
    """Whether all sequences share one pool of cells; see `engine.llama_runner`."""
    return load.max_sequences * load.context > load.kv_tokens


def _sequence_ids(header: Header, load: LoadModel) -> int:
    has_states = any(layer.state for layer in header.caches)
    return _SEQUENCE_IDS if is_pool(load) and not has_states else load.max_sequences


def _padded(cells: int) -> int:
    return -(-cells // _PAD) * _PAD


def _single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _share(need: Need, name: str, owners: Sequence[int], number: int) -> Share:
    mine = [layer for layer, owner in enumerate(owners) if owner == number]
    own, has_output = (
        [layer for layer in mine if layer < len(need.weights)],
        len(owners) - 1 in mine,
    )
    memory = DeviceMemory(
        name,
        sum(need.weights[layer] for layer in own) + (need.output if has_output else 0),
        sum(need.cache[layer] for layer in own if layer < len(need.cache)),
        max(need.compute.layers if own else 0, need.compute.output if has_output else 0),
    )
    return Share(len(mine), memory if number else _of_host(need, memory, has_output))


def _of_host(need: Need, memory: DeviceMemory, has_output: bool) -> DeviceMemory:
    """With what is in the machine's memory in any case."""
    copied = need.input if has_output and need.tied else 0  # the token embeddings are there already
    return DeviceMemory(
        memory.device,
        memory.weights - copied + need.input,
        memory.cache,
        max(memory.compute, need.compute.inputs) + need.compute.results,
    )


def _as_probed(need: Need, spread: Spread) -> Spread:
    """With the buffers that llama.cpp has told, if that was for the same devices."""
    shares = (*spread.gpus, spread.host)
    if {share.memory.device for share in shares} != set(need.probed):
        return spread
    known = [
        replace(
            share,
            memory=msgspec.structs.replace(share.memory, compute=need.probed[share.memory.device]),
        )
        for share in shares
    ]
    return Spread(tuple(known[:-1]), known[-1], spread.process)


def _by_tensors(need: Need, proportions: Sequence[tuple[str, float]]) -> Spread:
    whole = sum(part for _, part in proportions)
    copied = need.output if need.tied else 0  # token embeddings are not divided
    weights, cache = sum(need.weights) + need.output - copied, sum(need.cache)
    gpus = tuple(
        Share(
            need.layers,
            DeviceMemory(
                name,
                int(weights * part / whole) + copied,
                int(cache * part / whole),
                max(need.compute.layers, need.compute.output),
            ),
        )
        for name, part in proportions
    )
    host = _of_host(need, DeviceMemory(CPU), has_output=False)
    return _as_probed(need, Spread(gpus, Share(0, host), need.process))


def _cache_bytes(header: Header, load: LoadModel) -> tuple[int, ...]:
    cells, sequences = cells_of(load), _sequence_ids(header, load)
    block, size = TENSOR_TYPES[_GGML_TYPES[load.kv_type]]
    return tuple(
        (layer.keys + layer.values) * cells // block * size + layer.state * sequences * _FLOAT
        for layer in header.caches
    )


def _scaled(parts: Sequence[int], total: int) -> tuple[int, ...]:
    """The same proportions with that sum."""
    whole = sum(parts)
    if not whole:
        return tuple(total // max(1, len(parts)) for _ in parts)
    return tuple(part * total // whole for part in parts)


def _compute_bytes(header: Header, load: LoadModel) -> Compute:
    """As large as llama.cpp's are for models that are built as most are, with flash attention."""
    ubatch = min(max(load.token_budget, load.max_sequences), _UBATCH)
    stream = cells_of(load) if is_pool(load) else _padded(load.context)
    masks = 0 if not any(layer.keys for layer in header.caches) else 2 if header.has_windows else 1
    mask = ubatch * stream * _HALF * masks
    hidden = ubatch * header.embedding * _FLOAT
    width = header.feed_forward + header.embedding + header.experts_used * header.embedding // 3
    return Compute(
        layers=mask + 3 * ubatch * width * _FLOAT,
        output=ubatch * header.vocabulary * _FLOAT + 2 * hidden,
        inputs=mask + 2 * hidden,
        results=_sequence_ids(header, load) * header.vocabulary * _FLOAT,
    )
