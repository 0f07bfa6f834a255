"""Where an engine gives the same bits for the same request whatever else it computes, and where
that is the default.  Pure.

What decides are the kernels for the matrices of the weights and for attention, which on a CPU
depend on the number of rows and nothing else (`exact_path`), and on a GPU on more.  What is not
known to hold is not said to.  `auto` is on where it costs at most 5 % (`docs/exact.md` has the
figures); how busy the machine is never decides, since the answer would depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pinaivu_box.engine.messages import Exact

# Variants of the library, and types of tensors as ggml names them, whose products have the same
# bits in any number of rows, as was measured: with the library as published, and with the fixed
# split, which settles that for more.  A single row of F16 or BF16 has a kernel of its own; that of
# several costs it 16 % (`tests/bench/results/*-exact-paths.md`).
_PUBLISHED_VARIANTS = frozenset({"haswell", "sse42"})
_SETTLED_VARIANTS = _PUBLISHED_VARIANTS | {
    "skylakex", "cannonlake", "cascadelake", "cooperlake", "icelake", "zen4",
}  # fmt: skip
_PUBLISHED = frozenset({"f32", "q8_0", "q4_0"})
_SETTLED = _PUBLISHED | {
    "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "mxfp4", "q4_K", "q5_K", "q6_K",
}  # fmt: skip
# Types of the cache: those with the ways that `exact_path` describes, and with the fixed split
# others too, which have one way only.
_CACHES = frozenset({"f32", "f16"})
_SETTLED_CACHES = _CACHES | {"bf16", "q8_0"}


@dataclass(frozen=True)
class Setup:
    """What a model runs on.

    `weights` are the types of its tensors; `variant` and `build` those of ggml's library for the
    CPU and of llama.cpp.  It is `plain` if it computes on the CPU alone, by ggml's own kernels.  In
    a `pool` all sequences share one range of cells (see `llama_runner`); with `windows` some layers
    see only the last tokens; with `states` it is recurrent; of `experts` each computes the rows of
    a batch that chose it; `adapted` models have LoRA adapters.
    `fixed_split` is the library's: from 1 on it splits the attention of one row as that of several,
    from 2 on it takes the cells of a sequence in the order of their positions wherever they are,
    and products have the same bits in any number of rows.
    """

    weights: frozenset[str]
    variant: str
    build: str
    kv_type: str = "f16"
    plain: bool = True
    pool: bool = False
    windows: bool = False
    states: bool = False
    experts: bool = False
    adapted: bool = False
    fixed_split: int = 0

    @property
    def holds(self) -> bool:
        """Whether the bits are the same, if tokens are computed as `exact_path` says."""
        is_settled = self.fixed_split > 1
        weights, caches = (_SETTLED, _SETTLED_CACHES) if is_settled else (_PUBLISHED, _CACHES)
        return (
            self.plain
            and self.variant in (_SETTLED_VARIANTS if is_settled else _PUBLISHED_VARIANTS)
            and bool(self.weights)
            and self.weights <= weights
            and self.kv_type in caches
            and (is_settled or not (self.pool or self.experts or self.windows))
            and not (self.states or self.adapted)
        )

    @property
    def is_cheap(self) -> bool:
        """Whether that costs next to nothing: else one row needs a second one beside it."""
        return self.fixed_split > 0


def of(wanted: Exact, setup: Setup) -> str:
    """The exactness of an engine: on which engines the same request gives the same bits, or "" if
    nothing is promised, since it is not wanted or does not hold there."""
    if wanted is False or not setup.holds or (wanted == "auto" and not setup.is_cheap):
        return ""
    return f"bitwise:{setup.variant} {setup.build} {setup.kv_type}"
