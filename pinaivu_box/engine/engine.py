"""The token loop: arrivals, one step, what it gave.  No I/O: a worker moves the frames."""

from __future__ import annotations

import time

import numpy as np

from pinaivu_box.engine.chat_template import ChatTemplate
from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.messages import (
    Add,
    Admitted,
    Cancel,
    Delta,
    EngineLoad,
    Refused,
    StepFrame,
)
from pinaivu_box.engine.runner import Batch, Float32, NoSlot, Runner
from pinaivu_box.engine.sampling import draw
from pinaivu_box.engine.scheduler import Chunk, Scheduler
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import ApiError, ContextOverflow


class Engine:
    """Drives a runner.  `receive` takes messages, `step` computes once and reports."""

    def __init__(self, runner: Runner, *, token_budget: int) -> None:
        facts = runner.facts
        self._runner = runner
        self._facts = facts
        self._template = ChatTemplate(facts.chat_template, bos=facts.bos, eos=facts.eos)
        self.scheduler = Scheduler(
            kv_tokens=facts.kv_tokens,
            max_sequences=facts.max_sequences,
            token_budget=token_budget,
        )
        self._end_ids = sorted(facts.end_tokens)
        self._arrivals = 0
        self._steps = 0
        self._tokens_computed = 0
        self._admitted: list[Admitted] = []
        self._refused: list[Refused] = []
        self._deltas: list[Delta] = []

    @property
    def busy(self) -> bool:
        """Whether a call of `step` has something to do or to report."""
        return bool(self.scheduler or self._admitted or self._refused or self._deltas)

    def receive(self, message: Add | Cancel) -> None:
        if isinstance(message, Cancel):
            self._cancel(message.id)
            return
        try:
            self._add(message)
        except ApiError as error:
            self._refused.append(Refused(message.id, error.code, error.message))

    def step(self) -> StepFrame:
        """Compute one batch, if there is one, and return all that happened since the last."""
        if self.scheduler:
            chunks, logits = self._compute()
            self._sample(chunks, logits)
        frame = StepFrame(self._admitted, self._refused, self._deltas, self._load())
        self._admitted, self._refused, self._deltas = [], [], []
        return frame

    # -- arrivals ------------------------------------------------------------------------------

    def _add(self, add: Add) -> None:
        prompt = self._runner.tokenize(self._template.render(add.messages))
        context = self._facts.context
        if len(prompt) >= context:
            raise ContextOverflow(
                f"The prompt has {len(prompt)} tokens (n_prompt_tokens) and the model's context "
                f"here is {context} (n_ctx): shorten the messages."
            )
        room = context - len(prompt)
        detokenizer = Detokenizer(self._runner.piece, add.stop)
        for token in add.output:
            detokenizer.push(token)  # said by an earlier leg
        self._arrivals += 1
        self.scheduler.add(
            Sequence(
                id=add.id,
                tenant=add.tenant,
                tokens=prompt + add.output,
                prompt_length=len(prompt),
                max_length=len(prompt) + min(add.max_tokens or room, room),
                sampling=add.sampling,
                detokenizer=detokenizer,
                arrival=self._arrivals,
                arrived_at=time.monotonic(),
            )
        )
        self._admitted.append(Admitted(add.id, prompt))

    def _cancel(self, request_id: str) -> None:
        sequence = self.scheduler.find(request_id)
        if sequence is not None:  # else it ended while the message was on its way
            self._end(sequence)
            self._deltas.append(Delta(request_id, finish_reason="cancelled"))

    # -- a step --------------------------------------------------------------------------------

    def _compute(self) -> tuple[list[Chunk], Float32]:
        while self.scheduler:
            chunks, freed = self.scheduler.plan()
            for sequence_id in freed:
                self._runner.remove(sequence_id)
            _note_start(chunks)
            try:
                logits = self._runner.decode(_batch(chunks))
            except NoSlot:
                self._relieve(chunks)
                continue
            self.scheduler.commit(chunks)
            self._steps += 1
            self._tokens_computed += sum(chunk.count for chunk in chunks)
            return chunks, logits
        return [], np.empty((0, self._facts.n_vocab), np.float32)

    def _relieve(self, chunks: list[Chunk]) -> None:
        """The cache has fewer cells than it said (padding, a window): believe it, make room."""
        self.scheduler.shrink(sum(chunk.count for chunk in chunks))
        preempted = self.scheduler.preempt_youngest()
        if preempted is not None:
            self._runner.remove(preempted)
            return
        alone = chunks[0].sequence  # nothing else runs: this is all that it can have
        self._end(alone)
        if len(alone.tokens) > alone.prompt_length:
            self._deltas.append(Delta(alone.id, alone.detokenizer.flush(), [], "length"))
        else:
            error = ContextOverflow(
                f"The prompt's {alone.prompt_length} tokens (n_prompt_tokens) do not fit into the "
                f"{self.scheduler.kv_tokens} cells of the KV cache: shorten the messages."
            )
            self._refused.append(Refused(alone.id, error.code, error.message))

    def _sample(self, chunks: list[Chunk], logits: Float32) -> None:
        ready = [chunk.sequence for chunk in chunks if chunk.wants_logits]
        for sequence, row in zip(ready, logits, strict=True):
            if sequence.sampling.ignore_eos:
                row[self._end_ids] = -np.inf
            token = draw(row, sequence.sampling, len(sequence.tokens))
            self._take(sequence, token)

    def _take(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        finish_reason = None
        if token in self._facts.end_tokens:
            text, finish_reason = sequence.detokenizer.flush(), "stop"
        else:
            text = sequence.detokenizer.push(token)
            if sequence.detokenizer.stopped:
                finish_reason = "stop"
            elif len(sequence.tokens) >= sequence.max_length:
                text, finish_reason = text + sequence.detokenizer.flush(), "length"
        first = len(sequence.tokens) == sequence.prompt_length + 1
        self._deltas.append(
            Delta(sequence.id, text, [token], finish_reason, sequence.queue_ms if first else None)
        )
        if finish_reason:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence_id = self.scheduler.finish(sequence)
        if sequence_id >= 0:
            self._runner.remove(sequence_id)

    def _load(self) -> EngineLoad:
        return EngineLoad(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            kv_used=self.scheduler.kv_used,
            steps=self._steps,
            tokens_computed=self._tokens_computed,
            preemptions=self.scheduler.preemptions,
        )


def _note_start(chunks: list[Chunk]) -> None:
    now = time.monotonic()
    for sequence in (chunk.sequence for chunk in chunks):
        if sequence.queue_ms is None:
            sequence.queue_ms = (now - sequence.arrived_at) * 1000


def _batch(chunks: list[Chunk]) -> Batch:
    total = sum(chunk.count for chunk in chunks)
    tokens = np.empty(total, np.int32)
    positions = np.empty(total, np.int32)
    sequence_ids = np.empty(total, np.int32)
    outputs = np.zeros(total, np.int8)
    at = 0
    for chunk in chunks:
        end, stop = at + chunk.count, chunk.start + chunk.count
        tokens[at:end] = chunk.sequence.tokens[chunk.start : stop]
        positions[at:end] = np.arange(chunk.start, stop)
        sequence_ids[at:end] = chunk.sequence.sequence_id
        outputs[end - 1] = chunk.wants_logits
        at = end
    return Batch(tokens, positions, sequence_ids, outputs)
