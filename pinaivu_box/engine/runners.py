"""The runners of an engine: its model's, and the one of a draft model that it is told to load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import asdict, replace

from pinaivu_box.engine.fake_runner import SCHEME, FakeRunner
from pinaivu_box.engine.messages import DeviceMemory, DraftFiles, LoadModel
from pinaivu_box.engine.runner import Runner
from pinaivu_box.engine.scripted_runner import ScriptedRunner
from pinaivu_box.engine.vocabulary import check_same
from pinaivu_box.errors import BoxError


class Runners(NamedTuple):
    model: Runner
    draft: Runner | None = None

    @property
    def memory(self) -> list[DeviceMemory]:
        """What both have taken on each device."""
        return _sums(runner.facts.memory for runner in self if runner is not None)


def load_runners(load: LoadModel) -> Runners:
    """Raises BoxError."""
    if load.draft is None:
        return Runners(_load(load))
    # The model last: its runner hears what llama.cpp logs from then on.
    draft = _load(_of_draft(load, load.draft))
    model = _load(load)
    name = load.draft.model
    if not model.facts.sharing:
        raise BoxError(
            f"this model is recurrent, so that drafts cannot be checked: remove the setting draft "
            f"({name})"
        )
    if not draft.facts.sharing:
        raise BoxError(
            f"{name} cannot draft, since it is recurrent: choose another model for the setting "
            "draft"
        )
    check_same(draft.vocabulary(), model.vocabulary(), name)
    return Runners(model, draft)


def _of_draft(load: LoadModel, draft: DraftFiles) -> LoadModel:
    """The same sizes and devices; on GPUs, all of its layers, since each of its steps delays one of
    the model."""
    return replace(
        load,
        **asdict(draft),
        draft=None,
        projector="",
        saved=None,
        exact=False,  # of drafts only what the model would draw is taken
        template="",
        gpu_layers=-1 if load.gpu_layers else 0,
    )


def _load(load: LoadModel) -> Runner:
    if load.path.startswith(SCHEME):
        return ScriptedRunner(load) if load.path.endswith(".json") else FakeRunner(load)
    from pinaivu_box.engine.llama_runner import LlamaRunner

    return LlamaRunner(load)


def _sums(memories: Iterable[Iterable[DeviceMemory]]) -> list[DeviceMemory]:
    sums: dict[str, DeviceMemory] = {}
    for memory in memories:
        for each in memory:
            known = sums.get(each.device, DeviceMemory(each.device))
            sums[each.device] = DeviceMemory(
                each.device,
                known.weights + each.weights,
                known.cache + each.cache,
                known.compute + each.compute,
            )
    return list(sums.values())
