"""Texts that wait for their vectors: one is read between two steps, so that streams go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pinaivu_box.engine.runner import Float32


@dataclass(eq=False)
class Embedding:
    """A request's texts as tokens, and the vectors of the first of them."""

    id: str
    inputs: list[list[int]]
    vectors: list[bytes] = field(default_factory=list)


class Embeddings:
    def __init__(self, embed: Callable[[list[int]], Float32]) -> None:
        self._embed = embed
        self._waiting: list[Embedding] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, embedding: Embedding) -> None:
        self._waiting.append(embedding)

    def end(self, request_id: str) -> Embedding | None:
        """Forget a request; None if it is not here."""
        found = next((one for one in self._waiting if one.id == request_id), None)
        if found is not None:
            self._waiting.remove(found)
        return found

    def step(self) -> Embedding | None:
        """Read one text, which may complete a request; requests take turns."""
        if not self._waiting:
            return None
        one = self._waiting.pop(0)
        vector = self._embed(one.inputs[len(one.vectors)])
        one.vectors.append(vector.astype("<f4").tobytes())
        if len(one.vectors) < len(one.inputs):
            self._waiting.append(one)
            return None
        return one
