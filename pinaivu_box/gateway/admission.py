"""May this request run now?  Checked before anything is spent on it."""

from __future__ import annotations

from collections.abc import Callable

from pinaivu_box.config import EngineConfig
from pinaivu_box.errors import InvalidBody, NoNodesAvailable
from pinaivu_box.models.catalog import WELL_FORMED, Catalog, Model


class Admission:
    def __init__(self, catalog: Catalog, config: EngineConfig) -> None:
        self._catalog = catalog
        self._most = config.max_sequences + config.max_queue
        self._max_queue = config.max_queue
        self.draining = False

    def check(self, model_id: str, in_flight: Callable[[str], int]) -> Model:
        """The model to serve with; `in_flight` counts a model's unfinished requests.

        Raises InvalidBody, ModelNotFound, NoNodesAvailable.
        """
        if self.draining:
            raise NoNodesAvailable("This box is shutting down: send it elsewhere.", retry_after=5)
        if not WELL_FORMED.fullmatch(model_id):
            raise InvalidBody(
                f"'{model_id}' is not a model id: write it as name:tag.", loc=("body", "model")
            )
        model = self._catalog.find(model_id)
        if in_flight(model.id) >= self._most:
            raise NoNodesAvailable(
                f"The queue of {model.id} is full ({self._max_queue} requests wait): try again "
                "later.",
                retry_after=2,
            )
        return model
