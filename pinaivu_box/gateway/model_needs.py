"""What the placement has to know of a model: what it takes, what is set for it, and the frame that
loads it as was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as replaced
from functools import cache
from typing import TypeVar

from msgspec.structs import replace

from pinaivu_box.config import EngineConfig
from pinaivu_box.engine.messages import CPU, Adapter, DraftFiles, LoadModel, Probed
from pinaivu_box.gateway.layouts import Division, Layout, Rules, Sizes
from pinaivu_box.models import fit, memory
from pinaivu_box.models.catalog import Model

_T = TypeVar("_T")


class ModelNeeds:
    """See `layouts.Needs`; `probed` is llama.cpp's word on it, if it was asked."""

    def __init__(self, model: Model, load: LoadModel, probed: Probed | None = None) -> None:
        self._model, self._load, self._probed = model, load, probed
        self.layers = fit.need(model.header, load, probed).layers
        self.memory = cache(self._memory)  # a plan asks for the same many times

    def _memory(self, sizes: Sizes, division: Division) -> Mapping[str, int]:
        need = fit.need(self._model.header, self._sized(sizes), self._probed)
        taken = fit.spread(need, division.layers, division.split).by_device
        more = self._draft_memory(sizes, division)
        # They are where the layers are that they change: each device may get all of them.
        adapters = memory.adapters_bytes(self._model)
        taken = {device: taken[device] + more.get(device, 0) + adapters for device in taken}
        # Where the projector is, if there is one.
        main = division.layers[0][0] if division.layers else CPU
        return {**taken, main: taken.get(main, 0) + memory.projector_bytes(self._model)}

    def _draft_memory(self, sizes: Sizes, division: Division) -> Mapping[str, int]:
        """What the draft model takes: on the same GPUs as the model, with all of its layers."""
        draft = self._model.draft
        if draft is None:
            return {}
        need = replaced(fit.need(draft.header, self._sized(sizes)), process=0)
        places: list[tuple[str, float]] = [(name, count) for name, count in division.layers]
        if division.split != "tensor" and places:
            counts = fit.divided(need.layers, [proportion for _, proportion in places])
            places = [(name, count) for (name, _), count in zip(places, counts, strict=True)]
        return fit.spread(need, places, division.split).by_device

    def _sized(self, sizes: Sizes) -> LoadModel:
        return replace(
            self._load,
            kv_tokens=sizes.kv_tokens,
            context=sizes.context,
            max_sequences=sizes.sequences,
        )


def rules_of(model: Model, config: EngineConfig) -> Rules:
    """What is set for the model, or else for all."""
    own = model.settings
    layers = _first(own.gpu_layers, config.gpu_layers)
    context = memory.context_of(model, config.context)
    sizes = Sizes(
        context,
        memory.kv_tokens_of(context, config.kv_tokens),
        own.parallel or config.max_sequences,
    )
    return Rules(
        sizes,
        devices=(CPU,) if model.is_fake else _first(own.devices, config.devices),
        gpu_layers=None if layers == "auto" else layers,
        split=_first(own.split, config.split),
        tensor_split=_first(own.tensor_split, config.tensor_split),
        main_device=_first(own.main_device, config.main_device),
        fixed_context=bool(own.context or config.context),
        fixed_cache=bool(config.kv_tokens),
    )


def load_of(model: Model, config: EngineConfig, sizes: Sizes) -> LoadModel:
    """The frame that loads the model on the CPU; see `placed`."""
    return LoadModel(
        path=str(model.path),
        offset=model.offset,
        context=sizes.context,
        kv_tokens=sizes.kv_tokens,
        max_sequences=sizes.sequences,
        token_budget=config.token_budget,
        threads=config.threads,
        drafting=config.drafting,
        context_shift=config.context_shift,
        parse_special=config.parse_special,
        parts=[str(path) for path, _ in model.parts],
        model=model.id,
        template=model.template,
        devices=[CPU],
        gpu_layers=0,
        kv_type=_first(model.settings.kv_type, config.kv_type),
        exact=_first(model.settings.exact, config.exact),
        cpu_variant=config.cpu_variant,
        projector=str(model.projector.path) if model.projector is not None else "",
        adapters=_adapters_of(model),
        draft=_draft_files(model.draft) if model.draft is not None else None,
    )


def _adapters_of(model: Model) -> list[Adapter]:
    return [Adapter(str(adapter.path), adapter.scale) for adapter in model.adapters]


def _draft_files(draft: Model) -> DraftFiles:
    return DraftFiles(
        str(draft.path),
        draft.offset,
        [str(path) for path, _ in draft.parts],
        draft.id,
        _adapters_of(draft),
    )


def placed(load: LoadModel, layout: Layout) -> LoadModel:
    """The frame with the places and sizes of that layout."""
    division, sizes = layout.division, layout.sizes
    load = replace(
        load,
        context=sizes.context,
        kv_tokens=sizes.kv_tokens,
        max_sequences=sizes.sequences,
    )
    if not division.layers:
        return load
    counts = [float(count) for _, count in division.layers]
    return replace(
        load,
        devices=[device for device, _ in division.layers],
        gpu_layers=layout.layers if division.split == "tensor" else division.on_gpus,
        split=division.split,
        tensor_split=counts if len(counts) > 1 else [],
        main_device=division.layers[0][0],
    )


def _first(own: _T | None, general: _T) -> _T:
    return general if own is None else own
