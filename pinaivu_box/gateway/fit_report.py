"""Where a model would go: the plan that placement would follow, in figures."""

from __future__ import annotations

from collections.abc import Iterator

from pinaivu_box.config import EngineConfig
from pinaivu_box.gateway.layouts import Layout
from pinaivu_box.gateway.model_needs import load_of, placed
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.placement_plan import Start, WaitForEngines, World
from pinaivu_box.models import fit
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.model_fit import DeviceFit, ModelFit
from pinaivu_box.models.probe import Prober


async def fit_of(
    model: Model, placement: Placement, config: EngineConfig, prober: Prober
) -> ModelFit:
    """What would happen if the model were loaded now, beside the engines that run; with llama.cpp's
    own word on the buffers for computing."""
    decision, world = await placement.would_place(model)
    if isinstance(decision, Start):
        load = placed(load_of(model, config, decision.layout.sizes), decision.layout)
        probed = None if model.is_fake else await prober.probe(model, load)
        needs = fit.need(model.header, load), fit.need(model.header, load, probed)
        return _started(decision, world, *needs)
    if isinstance(decision, WaitForEngines):
        return ModelFit(False, decision.why)
    return ModelFit(False, f"it {decision.why}")


def _started(start: Start, world: World, planned: fit.Need, probed: fit.Need) -> ModelFit:
    layout = start.layout
    ended = [engine for engine in world.engines if engine.key in start.evict]
    free = {space.device: space.free for space in world.without(ended)}
    # Of what is not the model's own: the process, a projector.
    other = {name: layout.memory.get(name, 0) - size for name, size in _sizes(layout, planned)}
    division = layout.division
    spread = fit.spread(probed, division.layers, division.split)
    return ModelFit(
        fits=True,
        why=start.why,
        context=layout.sizes.context,
        kv_tokens=layout.sizes.kv_tokens,
        parallel=layout.sizes.sequences,
        instead_of=[key.model for key in start.evict],
        devices=[
            _of_share(
                share, max(0, other.get(share.memory.device, 0)), free.get(share.memory.device, 0)
            )
            for share in (*spread.gpus, spread.host)
        ],
    )


def _sizes(layout: Layout, need: fit.Need) -> Iterator[tuple[str, int]]:
    spread = fit.spread(need, layout.division.layers, layout.division.split)
    for share in (*spread.gpus, spread.host):
        yield share.memory.device, share.total


def _of_share(share: fit.Share, other: int, free: int) -> DeviceFit:
    memory, total = share.memory, share.total + other
    return DeviceFit(
        device=memory.device,
        layers=share.layers,
        weights=memory.weights,
        cache=memory.cache,
        compute=memory.compute,
        other=other,
        total=total,
        free=max(0, free),
        left=max(0, free - total),
    )
