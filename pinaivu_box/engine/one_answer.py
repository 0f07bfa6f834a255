"""What an engine child does that was started for one question."""

from __future__ import annotations

import os
import threading
from typing import BinaryIO

from pinaivu_box.engine import backends
from pinaivu_box.engine.messages import (
    Devices,
    FromEngine,
    GgmlBackend,
    ListDevices,
    LoadFailed,
    Probe,
    encode,
)
from pinaivu_box.engine.out_of_memory import EngineOutOfMemory
from pinaivu_box.errors import BoxError


def answer_one(question: ListDevices | Probe, frames_in: BinaryIO, frames_out: BinaryIO) -> None:
    """Write the answer, and end."""
    threading.Thread(target=_end_with, args=(frames_in,), daemon=True).start()
    data = memoryview(encode(_answer(question)))
    while data:
        data = data[frames_out.write(data) :]
    os._exit(0)  # the thread that reads would hold up a usual exit


def load_failed(error: BoxError) -> LoadFailed:
    """The frame for the error."""
    shortage = error.shortage if isinstance(error, EngineOutOfMemory) else None
    return LoadFailed(error.message, shortage)


def _answer(question: ListDevices | Probe) -> FromEngine:
    try:
        if isinstance(question, ListDevices):
            from pinaivu_box.engine import llama_devices

            found = llama_devices.load_backends()
            return Devices(llama_devices.listed(), [_backend(each) for each in found])
        from pinaivu_box.engine.llama_probe import probe

        return probe(question.load)
    except BoxError as error:
        return load_failed(error)


def _backend(found: backends.BackendLibrary) -> GgmlBackend:
    return GgmlBackend(
        found.name, found.devices, found.problem, found.missing, list(found.stand_ins)
    )


def _end_with(stream: BinaryIO) -> None:
    """End this process at the end of the stream, whatever it does then."""
    while stream.read(65536):
        pass
    os._exit(0)
