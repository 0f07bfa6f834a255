"""The thread in which a projector looks at images, beside the steps.

An image takes from some milliseconds on a GPU to seconds on a CPU, and a projector cannot be
stopped in the middle of one.  So other sequences run on meanwhile; the one whose prompt comes to an
image that is not ready waits for it.  Tenants take turns, image by image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pinaivu_box.engine.images import ImageReader, PromptImage
from pinaivu_box.errors import BoxError
from pinaivu_box.fair_threads import FairThreads


@dataclass(frozen=True)
class ImageEncoded:
    """An image was looked at for the sequence of that id, unless it was dropped before; `error` is
    why nothing came of it."""

    id: str
    image: PromptImage
    error: BoxError | None = None


class ImageEncoder:
    """`report` hears of each image that was asked for, in the thread."""

    def __init__(self, reader: ImageReader, report: Callable[[ImageEncoded], None]) -> None:
        self._reader, self._report = reader, report
        self._threads = FairThreads(1, "images")

    def ask(self, image: PromptImage, *, request_id: str, tenant: str) -> None:
        """Never blocks."""
        image.asked = True
        self._threads.put(tenant, lambda: self._encode(image, request_id))

    def _encode(self, image: PromptImage, request_id: str) -> None:
        error = None
        try:
            # A preempted sequence may have asked twice.
            if not image.dropped and not image.pieces:
                image.pieces = self._reader.encode(image)
        except BoxError as why:
            error = why
        self._report(ImageEncoded(request_id, image, error))
