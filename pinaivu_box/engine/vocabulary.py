"""Whether two models have the same vocabulary, so that one can draft for the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pinaivu_box.errors import BoxError

# As llama.cpp's own speculative decoding has it: models of one family may differ in these.
_FIRST_COMPARED = 5
_MAX_SIZE_DIFFERENCE = 128
_MAX_SHOWN_BYTES = 20


@dataclass(frozen=True)
class Vocabulary:
    """`kind` is that of the tokenizer; `bos` and `eos` are the tokens that it puts around a prompt,
    None if it puts none there; `texts` are those of all tokens."""

    kind: int
    bos: int | None
    eos: int | None
    texts: Sequence[bytes]


def check_same(draft: Vocabulary, model: Vocabulary, draft_name: str) -> None:
    """Raises BoxError if the first may not draft for the second."""
    if difference := _difference(draft, model):
        raise BoxError(
            f"{draft_name} cannot draft for this model, since its vocabulary is another one "
            f"({difference}): choose a smaller model of the same family, or remove the setting "
            "draft"
        )


def _difference(draft: Vocabulary, model: Vocabulary) -> str:
    """In words; empty if there is none that matters."""
    if draft.kind != model.kind:
        return "their tokenizers are of different kinds"
    if draft.bos != model.bos:
        return "their prompts begin with different tokens"
    if draft.eos != model.eos:
        return "their prompts end with different tokens"
    sizes = len(draft.texts), len(model.texts)
    if abs(sizes[0] - sizes[1]) > _MAX_SIZE_DIFFERENCE:
        return f"it has {sizes[0]} tokens, and the model {sizes[1]}"
    for token in range(_FIRST_COMPARED, min(sizes)):
        if draft.texts[token] != model.texts[token]:
            texts = _shown(draft.texts[token]), _shown(model.texts[token])
            return f"its token {token} is {texts[0]}, and the model's {texts[1]}"
    return ""


def _shown(text: bytes) -> str:
    return repr(text[:_MAX_SHOWN_BYTES].decode(errors="replace"))
