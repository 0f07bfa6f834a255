"""Where an engine gives the same bits for the same request whatever else it computes.  Pure.

On a CPU that takes kernels, for the matrices of the weights and for attention, whose rows come out
the same in any number of rows: those that `build/llama.patch` makes.  What was not measured is not
promised (`docs/exact.md` has the figures).  How busy the machine is never decides, since the answer
would depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pinaivu_box.engine.messages import Exact

ROWS_ALIKE = 4  # the `fixed_split` from which on a row comes out the same beside any others
# Variants of the library for which that was measured (`tests/bench/results/*-exact-paths.md`).
_VARIANTS = frozenset(
    {
        "sse42", "haswell", "alderlake", "skylakex", "cannonlake", "cascadelake", "cooperlake",
        "icelake", "zen4",
    }
)  # fmt: skip
# Types of tensors, as ggml names them, whose products have the same bits in any number of rows.
_WEIGHTS = frozenset(
    {
        "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "mxfp4",
        "q4_K", "q5_K", "q6_K",
    }
)  # fmt: skip
_CACHES = frozenset({"f32", "f16", "bf16", "q8_0"})


@dataclass(frozen=True)
class Setup:
    """What a model runs on.

    `weights` are the types of its tensors; `variant` and `build` those of ggml's library for the
    CPU and of llama.cpp, `fixed_split` the version of the kernels of `build/llama.patch` (0: those
    that its makers have published).  It is `plain` if it computes on the CPU alone, by ggml's own
    kernels.  With `states` it is recurrent; `adapted` models have LoRA adapters.
    """

    weights: frozenset[str]
    variant: str
    build: str
    fixed_split: int = 0
    kv_type: str = "f16"
    plain: bool = True
    states: bool = False
    adapted: bool = False

    @property
    def hindrance(self) -> str:
        """Why the bits are not the same, or not known to be; "" if they are."""
        others = sorted(self.weights - _WEIGHTS)
        if not self.plain:
            return "it does not compute on the CPU alone"
        if self.fixed_split < ROWS_ALIKE:
            return "this llama.cpp is not the one that build/ makes"
        if self.variant not in _VARIANTS:
            return f"it was not measured for the CPU variant {self.variant}: set cpu_variant"
        if others or not self.weights:
            return f"it was not measured for weights of type {', '.join(others) or 'unknown'}"
        if self.kv_type not in _CACHES:
            return f"it was not measured for a cache of type {self.kv_type}"
        if self.states:
            return "the model is recurrent"
        return "the model has LoRA adapters" if self.adapted else ""


def of(wanted: Exact, setup: Setup) -> str:
    """The exactness of an engine: on which engines the same request gives the same bits, or "" if
    nothing is promised, since it is not wanted or does not hold there."""
    if wanted is False or setup.hindrance:
        return ""
    return f"bitwise:{setup.variant} {setup.build}+{setup.fixed_split} {setup.kv_type}"
