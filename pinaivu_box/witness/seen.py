"""The newest checkpoints that members have shown of logs which are not witnessed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.log import checkpoint
from pinaivu_box.log.note import Note

MAX_BOXES = 1024
MAX_LOGS_PER_BOX = 4  # a box can begin as many as it likes, and crowds out nobody else's


class SeenCheckpoints:
    """By origin; of each box those of a few logs, which were seen last."""

    def __init__(self) -> None:
        self._boxes: BoundedDict[str, BoundedDict[str, Note]] = BoundedDict(MAX_BOXES)

    def get(self, origin: str) -> Note | None:
        return self.of(checkpoint.node_of(origin)).get(origin)

    def of(self, node_id: str) -> Mapping[str, Note]:
        return self._boxes.get(node_id, {})

    def put(self, origin: str, signed: Note) -> None:
        node_id = checkpoint.node_of(origin)
        logs = self._boxes.get(node_id)
        if logs is None:
            logs = self._boxes[node_id] = BoundedDict(MAX_LOGS_PER_BOX)
        logs[origin] = signed

    def all(self) -> Iterator[tuple[str, Note]]:
        for logs in self._boxes.values():
            yield from logs.items()
