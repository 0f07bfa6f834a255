"""What llama.cpp itself says that a model would take, asked of a child and remembered."""

from __future__ import annotations

import logging

from msgspec.structs import replace

from pinaivu_box import engine_query
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.engine.messages import LoadModel, Probe, Probed, encode
from pinaivu_box.engine_query import QueryFailed
from pinaivu_box.models.catalog import Model

log = logging.getLogger("pinaivu.probe")

_SECONDS = 60.0  # it reads a header and reckons; on a busy machine that takes some seconds
_MAX_REMEMBERED = 256
_Key = tuple[str, int, int, bytes]


class Prober:
    """The answers are remembered while a model's files and the way to load it stay the same."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._known: BoundedDict[_Key, Probed] = BoundedDict(_MAX_REMEMBERED)

    async def probe(self, model: Model, load: LoadModel) -> Probed | None:
        """What the model would take if it were loaded so; None if llama.cpp cannot say."""
        question = Probe(replace(load, saved=None, template=""))
        key = _key(model, question)
        if (known := self._known.get(key)) is not None:
            return known
        try:
            answer = await engine_query.ask(question, Probed, self._seconds)
        except QueryFailed as error:
            log.info("%s could not be probed: %s", model.id, error.message)
            return None
        self._known[key] = answer
        return answer


def _key(model: Model, question: Probe) -> _Key:
    return str(model.path), model.size, model.created, encode(question)
