"""The requests of a run: lengths, prompts and arrivals.  The same seed gives the same requests."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Literal

import msgspec

from pinaivu_box.errors import UsageError

# Common words: for most tokenizers, each of them is one token, with its space.
_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or"
    " one had by word but not what all were we when your can said there use an each which she do"
    " how their if will up other about out many then them these so some her would make like him"
    " into time has look two more write go see number no way could people my than first water been"
    " call who oil its now find long down day did get come made may part"
)
WORDS = tuple(_WORDS.split())
_EDIT = "Correct the spelling and print the whole text again."
INTRUDER_OUTPUT = 8  # tokens of its answer, which is not measured


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of lengths: `128`, `uniform:64-256` or `lognormal:MEDIAN,SIGMA`."""

    kind: Literal["fixed", "uniform", "lognormal"]
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str = "A length") -> Lengths:
        kind, _, rest = text.rpartition(":")
        separator = {"": None, "uniform": "-", "lognormal": ","}.get(kind, "?")
        try:
            numbers = [float(number) for number in rest.split(separator)]
            if kind == "":
                lengths = cls("fixed", *numbers)
            else:
                lengths = cls("uniform" if kind == "uniform" else "lognormal", *numbers)
            lengths._check(len(numbers))
        except (ValueError, TypeError):
            raise UsageError(
                f"{option} cannot be '{text}': write 128, uniform:64-256 or lognormal:128,0.6."
            ) from None
        return lengths

    def _check(self, count: int) -> None:
        finite = math.isfinite(self.first) and math.isfinite(self.second)
        ordered = self.kind != "uniform" or self.first <= self.second
        if count != 1 + (self.kind != "fixed") or not finite or not ordered:
            raise ValueError
        if self.first < 1 or self.second < 0:
            raise ValueError

    def draw(self, random: random.Random) -> int:
        """Draw a length, at least 1."""
        if self.kind == "uniform":
            return random.randint(int(self.first), int(self.second))
        if self.kind == "lognormal":
            return max(1, round(random.lognormvariate(math.log(self.first), self.second)))
        return int(self.first)


class Scale(msgspec.Struct, frozen=True):
    """How a server counts tokens: tokens per word, and `overhead`, which its chat template adds."""

    tokens_per_word: float = 1.0
    overhead: float = 0.0

    def words(self, tokens: int, *, with_overhead: bool = True) -> int:
        """The number of words of a prompt with that many tokens; at least 1."""
        own = tokens - (self.overhead if with_overhead else 0.0)
        return max(1, round(own / self.tokens_per_word))


class WorkloadRequest(msgspec.Struct, frozen=True):
    messages: list[dict[str, str]]
    max_tokens: int


class Workload(msgspec.Struct, frozen=True):
    """Numbered requests; request n depends only on n and the fields.

    `shared_prefix` is the length in tokens of a system prompt that all requests have (0: none), in
    addition to their `prompt` tokens.
    """

    prompt: Lengths
    output: Lengths
    seed: str = "0"
    shared_prefix: int = 0
    repetitive: bool = False
    scale: Scale = Scale()

    def request(self, number: int) -> WorkloadRequest:
        rng = random.Random(f"{self.seed}/{number}")  # noqa: S311 - reproducible, not secret
        prompt, output = self.prompt.draw(rng), self.output.draw(rng)
        words = self.scale.words(prompt, with_overhead=not self.shared_prefix)
        messages = self.messages(words, rng)
        if self.shared_prefix:
            messages.insert(0, {"role": "system", "content": self._system()})
        return WorkloadRequest(messages, output)

    def intruder(self, tokens: int) -> WorkloadRequest:
        rng = random.Random(f"{self.seed}/intruder")  # noqa: S311
        return WorkloadRequest(self.messages(self.scale.words(tokens), rng), INTRUDER_OUTPUT)

    def messages(self, words: int, rng: random.Random) -> list[dict[str, str]]:
        """A prompt of random words or, if repetitive, of a text to be edited, after an example."""
        if not self.repetitive:
            return [{"role": "user", "content": " ".join(rng.choices(WORDS, k=words))}]
        example, text = _sentences(words // 10, rng), _sentences(words - 2 * (words // 10), rng)
        return [
            {"role": "user", "content": f"{_EDIT}\n\n{example}"},
            {"role": "assistant", "content": example},
            {"role": "user", "content": f"{_EDIT}\n\n{text}"},
        ]

    def _system(self) -> str:
        rng = random.Random(f"{self.seed}/system")  # noqa: S311
        return " ".join(rng.choices(WORDS, k=self.scale.words(self.shared_prefix)))


def _sentences(words: int, rng: random.Random) -> str:
    sentences = []
    while words > 0:
        size = min(words, rng.randint(6, 12))
        sentences.append(" ".join(rng.sample(WORDS, size)).capitalize() + ".")
        words -= size
    return " ".join(sentences)


def arrivals(rate: float, seed: str) -> Iterator[float]:
    """The times of a Poisson process with `rate` requests per second, in seconds."""
    rng = random.Random(f"{seed}/arrivals")  # noqa: S311
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now
