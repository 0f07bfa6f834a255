"""Streams over two boxes of which one is lost, and what their receipts and a re-execution say."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pinaivu_box.engine.chat_template import ChatTemplate, TemplateSetup
from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import LoadModel, Sampling
from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.engine.runner import Batch
from pinaivu_box.engine.sampling import Draw, draw_rows
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support.process_box import Box, wait_until

MODEL = "m:1"
TEMPERATURE = 1.0
CONTEXT = 512  # tokens of a prompt and its answer, at most
SUBJECTS = (
    "the sea", "a clockmaker", "bread", "the first snow", "a lighthouse", "bees", "an old map",
    "the moon",
)  # fmt: skip


def messages(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Tell me a story about {SUBJECTS[number]}."}]


@dataclass
class Stream:
    """One client.  `error` is whatever it saw that is not a whole answer; `gap` the longest time in
    seconds between two of its chunks, the first token included."""

    number: int
    seed: int
    most: int
    text: str = ""
    pieces: list[bytes] = field(default_factory=list)  # of each token
    route: str = ""
    request_id: str = ""
    finish_reason: str = ""
    error: str | None = "it did not end"
    gap: float = 0.0

    def run(self, box: Box) -> None:
        body = {
            "model": MODEL, "messages": messages(self.number), "max_tokens": self.most,
            "seed": self.seed, "temperature": TEMPERATURE, "ignore_eos": True, "logprobs": True,
            "cache_prompt": False, "stream": True,
        }  # fmt: skip
        headers, last = {"Authorization": f"Bearer {box.key}"}, time.monotonic()
        try:
            with httpx.stream(
                "POST", f"{box.url}/v1/chat/completions", json=body, headers=headers, timeout=120,
                trust_env=False,
            ) as got:  # fmt: skip
                self.route = got.headers.get("x-pinaivu-route", "")
                if got.status_code != 200:
                    self.error = f"{got.status_code} {got.read().decode()}"
                    return
                for line in got.iter_lines():
                    self._take(line)
                    if line.startswith("data: "):
                        now = time.monotonic()
                        self.gap, last = max(self.gap, now - last), now
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.error = None if self.finish_reason == "length" else self.finish_reason
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.error = json.dumps(chunk["error"])
                return
            self.request_id = chunk["request_id"]
            for choice in chunk["choices"]:
                self.text += choice["delta"].get("content") or ""
                told = choice.get("logprobs") or {"content": []}
                self.pieces += [bytes(one["bytes"]) for one in told["content"]]
                self.finish_reason = choice["finish_reason"] or self.finish_reason


def begin(box: Box, seeds: list[int], most: int) -> tuple[list[Stream], list[threading.Thread]]:
    streams = [Stream(number, seed, most) for number, seed in enumerate(seeds)]
    threads = [threading.Thread(target=one.run, args=(box,), daemon=True) for one in streams]
    for thread in threads:
        thread.start()
    return streams, threads


def reached(stream: Stream, position: int, thread: threading.Thread) -> None:
    """Wait until so many of its tokens have come, or it has ended."""
    wait_until(
        lambda: len(stream.pieces) >= position or not thread.is_alive(), f"{position} tokens", 120
    )


# -- what the receipt says -------------------------------------------------------------------------


@dataclass(frozen=True)
class Leg:
    node_id: str
    tokens: int
    finish_reason: str
    witnessed: bool
    marked: bool
    sampling: dict[str, Any]


def check(box: Box, stream: Stream, tokens: list[int]) -> tuple[list[Leg], list[str]]:
    """The legs of its receipt, and what is wrong with it: nothing, if every leg is about the very
    tokens and the very text that the client got, and together they are all of it."""
    answer = box.http("GET", f"/v1/receipts/{stream.request_id}")
    if answer.status_code != 200:
        return [], [f"there is no receipt: {answer.status_code}"]
    checks = verify_receipt(answer.content, transcript=Transcript(answer=stream.text.encode()))
    wrong = [f"{one.name}: {one.meaning}" for one in checks if not one.ok]
    document = answer.json()
    receipt = json.loads(document["signed_receipt"])
    proofs = [json.loads(one["signed"]) for one in receipt["proofs"]]
    at, rest = 0, stream.text
    for proof, opened in zip(proofs, document["opening"]["legs"], strict=True):
        opening = commitment.Opening(**opened)
        part = tokens[at : at + proof["completion_tokens"]]
        at += proof["completion_tokens"]
        if commitment.tokens_sha256([max(0, one) for one in part]) != opening.tokens_sha256:
            wrong.append(f"leg {proof['leg']} is about other tokens than the client got")
        size = _begins(rest, opening, proof["output_commitment"])
        if size is None:
            wrong.append(f"leg {proof['leg']} is about another text than the client got")
        rest = rest[size or 0 :]
    if at != len(tokens) or rest:
        wrong.append(f"the legs are about {at} of {len(tokens)} tokens and leave {rest!r}")
    legs = [
        Leg(
            one["node_id"], one["completion_tokens"], one["finish_reason"],
            one["witness"] is not None, one["mark"] is not None, one["sampling"],
        )
        for one in proofs
    ]  # fmt: skip
    return legs, wrong


def _begins(text: str, opening: commitment.Opening, wanted: str) -> int | None:
    """How many characters of the text a leg's commitment is about."""
    sizes = range(len(text) + 1)
    return next((n for n in sizes if commitment.recompute(text[:n], opening) == wanted), None)


# -- re-execution ----------------------------------------------------------------------------------


class Auditor:
    """Draws again what was drawn: an engine of its own computes prompt and answer in one batch, so
    each position is drawn from the prompt and the tokens that the client got before it."""

    def __init__(self, path: Path) -> None:
        load = LoadModel(str(path), 0, CONTEXT, CONTEXT, 1, CONTEXT, 1)
        self._runner = LlamaRunner(load)
        facts = self._runner.facts
        self._ends = np.array(sorted(facts.end_tokens), np.intp)
        source = facts.chat_template or CHATML
        self._template = ChatTemplate(TemplateSetup(source, facts.bos, facts.eos))
        self._ids: dict[bytes, int] = {}
        for token in range(facts.n_vocab):
            self._ids.setdefault(self._runner.spelling(token), token)

    def tokens(self, pieces: list[bytes]) -> list[int]:
        """By their bytes, which is what clients see of them; -1 for what is none."""
        return [self._ids.get(piece, -1) for piece in pieces]

    def agrees(self, number: int, sampling: dict[str, Any], tokens: list[int]) -> str:
        """1 for each position that is drawn again, else 0."""
        prompt = self._runner.tokenize("".join(self._template.parts(messages(number), [], {})))
        known = [*prompt, *tokens[:-1]]
        size, wanted = len(known), len(tokens)
        outputs = np.zeros(size, np.int8)
        outputs[-wanted:] = 1
        self._runner.remove(0)
        logits = self._runner.decode(
            Batch(
                np.array(known, np.int32), np.arange(size, dtype=np.int32),
                np.zeros(size, np.int32), outputs,
            )
        )  # fmt: skip
        names = Sampling.__struct_fields__
        values = {name: value for name, value in sampling.items() if name in names}
        drawing = Sampling(**values | {"seed": int(sampling["seed"])})
        draws = [Draw(drawing, len(prompt) + n) for n in range(wanted)]
        again = draw_rows(logits, draws, self._ends)
        return "".join(str(int(a == b)) for a, b in zip(again, tokens, strict=True))
