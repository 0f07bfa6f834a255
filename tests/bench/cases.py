"""The workloads of the comparison with llama-server, and what is wanted of each."""

from __future__ import annotations

from typing import Any

import msgspec

from pinaivu_box.bench.run import RunPlan, Tenant
from pinaivu_box.bench.workload import Lengths, Workload

# The same chain on both sides: top-k 40, top-p 0.95, min-p 0.05, temperature.
USUAL: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Goal(msgspec.Struct, frozen=True):
    """A ratio ours / theirs of a figure (of `pinaivu_box.bench.compare.figures`).

    At least so much where more is better (tokens/s), at most so much otherwise (milliseconds).
    """

    figure: str
    cpu: float
    gpu: float
    gemma: float | None = None  # on a CPU, with its vocabulary of 262k

    @property
    def more_is_better(self) -> bool:
        return self.figure == "tokens_per_s"

    def wanted(self, *, gpu: bool, gemma: bool) -> float:
        return self.gpu if gpu else self.gemma if gemma and self.gemma is not None else self.cpu

    def reached(self, ratio: float, *, gpu: bool, gemma: bool) -> bool:
        goal = self.wanted(gpu=gpu, gemma=gemma)
        return ratio >= goal if self.more_is_better else ratio <= goal


class BenchCase(msgspec.Struct, frozen=True):
    """`context` is the total of both servers; `ours` and `theirs` are extra fields of the body."""

    name: str
    title: str
    plan: RunPlan
    sequences: int
    context: int
    goals: tuple[Goal, ...]
    ours: dict[str, Any]
    theirs: dict[str, Any]


def plan(prompt: int, output: int, clients: int, requests: int, **more: Any) -> RunPlan:
    fields = {name: more.pop(name) for name in ("shared_prefix", "repetitive") if name in more}
    workload = Workload(Lengths("fixed", prompt), Lengths("fixed", output), **fields)
    tenants = more.pop("tenants", (Tenant("", clients),))
    warmup = more.pop("warmup", min(clients, 4))
    return RunPlan(workload, tenants, requests=requests or None, warmup=warmup, **more)


def streams(count: int, requests: int, output: int, goals: tuple[Goal, ...]) -> BenchCase:
    return BenchCase(
        name=f"streams-{count}",
        title=f"{count} stream{'s' if count > 1 else ''}",
        plan=plan(64, output, count, requests),
        sequences=count,
        context=max(2048, 256 * count),
        goals=goals,
        # Ours takes llama.cpp's chain from its defaults; naming top_p would switch top-k off.
        ours={"temperature": USUAL["temperature"]},
        theirs=USUAL,
    )


# In the order in which they run.
CASES = (
    streams(1, 4, 128, (Goal("tokens_per_s", 1.0, 1.0),)),
    streams(16, 48, 64, (Goal("tokens_per_s", 1.0, 1.3, 1.05),)),
    streams(
        64,
        128,
        64,
        (Goal("tokens_per_s", 1.03, 2.0, 1.1), Goal("gap_ms.p99", 0.95, 0.6)),
    ),
    BenchCase(
        name="top-p",
        title="16 streams, top_p=0.9 without top-k",
        plan=plan(64, 64, 16, 48),
        sequences=16,
        context=4096,
        goals=(Goal("tokens_per_s", 1.2, 2.0),),
        ours={"temperature": 1.0, "top_p": 0.9},
        theirs={"temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.0},
    ),
    BenchCase(
        name="shared-prefix",
        title="16 clients share a 1,000-token system prompt, 20 own tokens",
        plan=plan(20, 32, 16, 16, shared_prefix=1000),
        sequences=16,
        context=16 * 1280,
        goals=(Goal("ttft_ms.p50", 0.25, 0.25),),
        ours=GREEDY,
        theirs=GREEDY,
    ),
    BenchCase(
        name="intruder",
        title="8 streams while a 2,000-token prompt arrives",
        plan=plan(32, 160, 8, 8, intruder=2000),
        sequences=9,
        context=9 * 2304,
        goals=(Goal("intruder.gap_ms.p99", 0.08, 0.1), Goal("intruder.ttft_ms", 1.2, 1.2)),
        ours=GREEDY,
        theirs=GREEDY,
    ),
    BenchCase(
        name="tenants",
        title="one light tenant beside a heavy one with 50 clients",
        plan=plan(64, 64, 51, 0, seconds=60.0, tenants=(Tenant("heavy", 50), Tenant("light", 1))),
        sequences=16,
        context=16 * 256,
        goals=(Goal("tenants.light.ttft_ms.p50", 0.2, 0.2),),
        ours=GREEDY,
        theirs=GREEDY,
    ),
    BenchCase(
        name="repetitive",
        title="repetitive text, 1 stream",
        plan=plan(400, 256, 1, 3, repetitive=True),
        sequences=1,
        context=2048,
        goals=(Goal("tokens_per_s", 1.5, 1.5),),
        ours=GREEDY,
        theirs=GREEDY,
    ),
)


def quick(case: BenchCase) -> BenchCase:
    """The same in seconds: shows that everything works, measures nothing."""
    small = case.plan
    workload = msgspec.structs.replace(
        small.workload,
        prompt=Lengths("fixed", min(40, small.workload.prompt.first)),
        output=Lengths("fixed", 24),
        shared_prefix=small.workload.shared_prefix // 10,
    )
    tenants = tuple(
        msgspec.structs.replace(tenant, clients=-(-tenant.clients // 10))
        for tenant in small.tenants
    )
    small = msgspec.structs.replace(
        small,
        workload=workload,
        tenants=tenants,
        requests=small.requests and sum(tenant.clients for tenant in tenants) * 2,
        seconds=small.seconds and 5.0,
        warmup=1,
        intruder=small.intruder // 10,
    )
    return msgspec.structs.replace(case, plan=small, sequences=-(-case.sequences // 8))
