"""Engine processes without a box: started as a frame says, asked, and ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pinaivu_box.engine.messages import LoadModel, Ready
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.gateway.layouts import Division, Layout, Sizes
from pinaivu_box.gateway.placement_plan import Start
from pinaivu_box.models.catalog import Model

_SECONDS = 300.0


@asynccontextmanager
async def engine(load: LoadModel) -> AsyncIterator[EngineProcess]:
    """An engine that is ready.  Raises StartFailed."""
    layout = Layout(Sizes(load.context, load.kv_tokens, load.max_sequences), Division(), {}, 0)
    model = Model(load.model or "bare:latest", Path(load.path))
    process = EngineProcess(model, "", load, 0, Start(layout, "for a test"))
    await process.start(_SECONDS)
    try:
        yield process
    finally:
        await process.stop()


async def ready_of(load: LoadModel) -> Ready:
    """What the engine says when it is ready.  Raises StartFailed."""
    async with engine(load) as process:
        return process.ready
