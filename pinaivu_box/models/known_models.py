"""A short list of models that are known to work, for whoever does not know what to pull.

It changes with releases only: nothing is looked up.  Sizes are those of the files in Ollama's
registry in 2026; KV bytes follow from each model's published configuration (layers, KV heads, head
size, 16 bits).
"""

from __future__ import annotations

from msgspec import Struct

_OVERHEAD_BYTES = 400_000_000  # the engine itself, and compute buffers
_CONTEXT_TOKENS = 8192


class KnownModel(Struct, frozen=True):
    """`name` is what to pull; `size` is in bytes, `parameters` in billions."""

    name: str
    purpose: str
    parameters: float
    size: int
    kv_bytes_per_token: int
    license: str
    embeds: bool = False

    @property
    def memory(self) -> int:
        """Bytes that it takes with a context of 8,192 tokens."""
        kv_bytes = 0 if self.embeds else self.kv_bytes_per_token * _CONTEXT_TOKENS
        return self.size + kv_bytes + _OVERHEAD_BYTES


_LLAMA_32 = "Llama 3.2 Community License"

KNOWN_MODELS = (
    KnownModel("smollm2:135m", "tests, tiny machines", 0.135, 271_000_000, 23_040, "Apache-2.0"),
    KnownModel("smollm2:360m", "tiny machines", 0.36, 726_000_000, 40_960, "Apache-2.0"),
    KnownModel("qwen3:0.6b", "chat on old machines, thinks", 0.6, 523_000_000, 114_688,
               "Apache-2.0"),
    KnownModel("gemma3:1b", "chat on old machines", 1.0, 815_000_000, 26_624,
               "Gemma Terms of Use"),
    KnownModel("llama3.2:1b", "chat, summaries", 1.2, 1_300_000_000, 32_768, _LLAMA_32),
    KnownModel("qwen3:1.7b", "chat, tools, thinks", 1.7, 1_400_000_000, 114_688, "Apache-2.0"),
    KnownModel("llama3.2:3b", "chat, tools", 3.2, 2_000_000_000, 114_688, _LLAMA_32),
    KnownModel("phi4-mini:3.8b", "chat, mathematics", 3.8, 2_500_000_000, 131_072, "MIT"),
    KnownModel("qwen3:4b", "chat, tools, thinks", 4.0, 2_600_000_000, 147_456, "Apache-2.0"),
    KnownModel("mistral:7b", "chat, tools", 7.2, 4_400_000_000, 131_072, "Apache-2.0"),
    KnownModel("qwen2.5-coder:7b", "code", 7.6, 4_700_000_000, 57_344, "Apache-2.0"),
    KnownModel("llama3.1:8b", "chat, tools", 8.0, 4_900_000_000, 131_072,
               "Llama 3.1 Community License"),
    KnownModel("qwen3:8b", "chat, tools, thinks", 8.2, 5_200_000_000, 147_456, "Apache-2.0"),
    KnownModel("phi4:14b", "chat, reasoning", 14.7, 9_100_000_000, 204_800, "MIT"),
    KnownModel("qwen3:14b", "chat, tools, thinks", 14.8, 9_300_000_000, 163_840, "Apache-2.0"),
    KnownModel("qwen3:32b", "chat, tools, thinks", 32.8, 20_000_000_000, 262_144, "Apache-2.0"),
    KnownModel("llama3.3:70b", "chat, tools", 70.6, 43_000_000_000, 327_680,
               "Llama 3.3 Community License"),
    KnownModel("all-minilm:22m", "embeddings", 0.023, 46_000_000, 0, "Apache-2.0", embeds=True),
    KnownModel("nomic-embed-text:v1.5", "embeddings", 0.137, 274_000_000, 0, "Apache-2.0",
               embeds=True),
)  # fmt: skip


# What a first start offers, the best first.
_FIRST = ("llama3.2:3b", "llama3.2:1b", "qwen3:0.6b")
_FIRST_SHARE = 0.7  # of the memory that can be had, at most


def first(available: int | None) -> KnownModel:
    """Return the model for somebody who has none, with so many bytes of memory to be had."""
    offered = [model for name in _FIRST if (model := known(name)) is not None]
    fits = [m for m in offered if available is None or m.memory <= available * _FIRST_SHARE]
    return (fits or offered[-1:])[0]


def search(words: str) -> list[KnownModel]:
    """Return the models whose name, purpose or licence has each of the words, smallest first; all
    without words."""
    wanted = words.lower().split()
    return [
        model
        for model in sorted(KNOWN_MODELS, key=lambda model: model.size)
        if all(word in f"{model.name} {model.purpose} {model.license}".lower() for word in wanted)
    ]


def known(name: str) -> KnownModel | None:
    """Return the model of that name."""
    return next((model for model in KNOWN_MODELS if model.name == name), None)
