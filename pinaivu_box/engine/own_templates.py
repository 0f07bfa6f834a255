"""Chat templates for model files that have none, by family.

A family is recognised by tokens that only its vocabularies have, and where others have them too by
the architecture.  The formats are those of the model cards.  None of the templates knows tools: see
`message_forms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """`template` is the name of its file.  The vocabulary has all `tokens`; the architecture begins
    with one of `architectures`, if there are any."""

    template: str
    tokens: tuple[str, ...]
    architectures: tuple[str, ...] = ()


# The first that fits counts.
_FAMILIES = (
    Family("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    Family("phi4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    Family("qwen3", ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), ("qwen3",)),
    Family("chatml", ("<|im_start|>", "<|im_end|>")),
    Family("gemma", ("<start_of_turn>", "<end_of_turn>"), ("gemma",)),
    Family("mistral-system", ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")),
    Family("mistral", ("[INST]", "[/INST]", "▁the")),
    Family("mistral-tekken", ("[INST]", "[/INST]")),
    Family("phi3", ("<|user|>", "<|assistant|>", "<|end|>"), ("phi3",)),
    Family("deepseek", ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")),  # wide bars
    Family("command-r", ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"), ("command-r", "cohere")),
    Family("granite", ("<|start_of_role|>", "<|end_of_role|>"), ("granite",)),
    Family("glm4", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), ("glm", "chatglm")),
)


def source(name: str) -> str:
    """The template of that name, as Jinja."""
    return (_FOLDER / f"{name}.jinja").read_text("utf-8").rstrip("\n")


def find(architecture: str, has_token: Callable[[str], bool]) -> str | None:
    """The template of a model with that architecture, or None; `has_token` is whether its
    vocabulary has a token with that text."""
    for family in _FAMILIES:
        fits = not family.architectures or architecture.startswith(family.architectures)
        if fits and all(map(has_token, family.tokens)):
            return source(family.template)
    return None


CHATML = source("chatml")
