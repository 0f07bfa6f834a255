"""A model for the placement: layers of one size, a cache and buffers, without a file."""

from __future__ import annotations

from dataclasses import dataclass

from pinaivu_box.engine.messages import CPU
from pinaivu_box.gateway.layouts import Division, Sizes

MIB = 2**20


@dataclass(frozen=True)
class LayerNeeds:
    """`layers` of `layer` bytes, `cell` bytes of each token's cache in each layer, `buffers` on
    each device that computes, and `host` bytes that are never on a GPU."""

    layers: int
    layer: int
    cell: int = 64
    buffers: int = 8 * MIB
    host: int = 32 * MIB

    def memory(self, sizes: Sizes, division: Division) -> dict[str, int]:
        one = self.layer + self.cell * sizes.kv_tokens
        counts = dict(division.layers)
        if division.split == "tensor":
            whole = sum(counts.values())
            memory = {
                device: one * self.layers * count // whole + self.buffers
                for device, count in counts.items()
            }
            return memory | {CPU: self.host}
        memory = {device: one * count + self.buffers for device, count in counts.items()}
        left = self.layers - sum(counts.values())
        return memory | {CPU: self.host + one * left + (self.buffers if left else 0)}
