"""One row's draw, without the batch around it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.sampling import Draw, draw_rows


def draw(logits: npt.NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The token at `position` given its logits, shape (n_vocab,), which stay as they are."""
    return draw_rows(logits[np.newaxis].copy(), [Draw(sampling, position)])[0]
