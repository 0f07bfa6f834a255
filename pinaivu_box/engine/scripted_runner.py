"""A fake model with scripted answers, to test programs that call tools.

A model whose path is `fake:/FOLDER/SCRIPT.json` is served by it.  The script is a JSON list of
objects with `when` (a list of texts) and `say` (a text): an answer is the `say` of the first object
whose texts are all in the prompt, and then ends.  Tool calls are written as `chat_format.TAGS`.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from pinaivu_box.engine.fake_runner import END, SCHEME, UNLIKELY, FakeRunner
from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.engine.runner import Batch, Float32
from pinaivu_box.errors import BoxError

_TURN = b"<|im_start|>assistant\n"  # what the prompt of `own_templates.CHATML` ends with


class _ScriptLine(msgspec.Struct, frozen=True):
    when: list[str]
    say: str


class ScriptedRunner(FakeRunner):
    """Raises BoxError if the script cannot be read."""

    def __init__(self, load: LoadModel) -> None:
        super().__init__(msgspec.structs.replace(load, path=SCHEME))
        path = load.path.removeprefix(SCHEME)
        try:
            lines = msgspec.json.decode(Path(path).read_bytes(), type=list[_ScriptLine])
        except (OSError, msgspec.MsgspecError) as error:
            raise BoxError(f"The script {path} of a fake model cannot be read: {error}.") from error
        self._lines = [([text.encode() for text in line.when], line.say.encode()) for line in lines]
        self._written: dict[int, bytearray] = {}  # by sequence id

    def decode(self, batch: Batch) -> Float32:
        drawn = []
        arrays = (batch.tokens, batch.positions, batch.sequence_ids, batch.outputs)
        for token, position, sequence_id, output in zip(
            *(array.tolist() for array in arrays), strict=True
        ):
            written = self._written.setdefault(sequence_id, bytearray())
            written[position:] = self.piece(token) or b"\0"
            if output:
                drawn.append(self._next(written))
        logits = np.tile(UNLIKELY, (len(drawn), 1))
        logits[np.arange(len(drawn)), drawn] = 0.0
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        self._written[target] = self._written[source][:length]

    def _next(self, written: bytearray) -> int:
        prompt, _, answer = written.rpartition(_TURN)
        for when, say in self._lines:
            if all(text in prompt for text in when):
                return say[len(answer)] if len(answer) < len(say) else END
        return END
