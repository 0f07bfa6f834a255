"""The token loop: one step after another.  It does no I/O and knows no text: see `request_preparer`
and `output`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pinaivu_box.engine.batches import batch_of
from pinaivu_box.engine.embeddings import EmbeddingJob, EmbeddingScheduler
from pinaivu_box.engine.logprobs import probe
from pinaivu_box.engine.messages import EngineLoad, Refused, TokenLogprob
from pinaivu_box.engine.output import SequenceOutput, StepOutput
from pinaivu_box.engine.runner import TEXT_BATCH, Float32, NoSlot, Runner
from pinaivu_box.engine.sampling import (
    NO_PAST,
    Draw,
    PenaltyWindow,
    draw_again,
    draw_rows,
)
from pinaivu_box.engine.scheduler import BatchChunk, CopyCells, Move, RemoveCells, Scheduler
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.steady_steps import SteadySteps
from pinaivu_box.engine.step_cost import StepCostModel
from pinaivu_box.errors import BadRequest, BoxError, ContextOverflow, NoNodesAvailable

if TYPE_CHECKING:
    from pinaivu_box.engine.grammar import Grammar


class Engine:
    """Drives a runner: `add` and `end` sequences, `step` computes once and reports."""

    def __init__(self, runner: Runner, *, token_budget: int) -> None:
        facts = runner.facts
        self._runner = runner
        self._facts = facts
        self.pace = StepCostModel()
        self.scheduler = Scheduler(
            kv_tokens=facts.kv_tokens,
            max_sequences=facts.max_sequences,
            token_budget=token_budget,
            policy=self.pace,
            ids=facts.sequence_ids,
            sharing=facts.sharing,
        )
        self._end_tokens = np.array(sorted(facts.end_tokens), np.intp)
        self._arrivals = 0
        self._steps = 0
        self._tokens_computed = 0
        self._tokens_cached = 0
        self._steady: SteadySteps | None = None
        self._plain: tuple[list[str], list[int]] = ([], [])
        self._last_load = EngineLoad()
        self.embeddings = EmbeddingScheduler(runner)
        self._outputs: list[SequenceOutput] = []
        self._refused: list[Refused] = []

    @property
    def busy(self) -> bool:
        """Whether a call of `step` has something to do or to report."""
        return bool(self.scheduler or self.embeddings or self._outputs or self._refused)

    def add(self, sequence: Sequence | EmbeddingJob) -> None:
        if isinstance(sequence, EmbeddingJob):
            self.embeddings.add(sequence)
            return
        self.settle()
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.scheduler.add(sequence)
        if sequence.scored == 0:
            alone = TokenLogprob(self._runner.spelled(sequence.tokens[0]), 0.0, [])
            self._outputs.append(SequenceOutput(sequence.id, [], prompt_logprobs=[alone]))
            sequence.scored = 1

    def end(self, request_id: str, finish_reason: str) -> None:
        """Stop a sequence (the client left, or a stop string came); free its cells."""
        self.settle()
        sequence, embedding = self.scheduler.find(request_id), self.embeddings.end(request_id)
        queue_ms, cached_tokens = embedding.queue_ms if embedding else None, None
        if sequence is not None:
            self.scheduler.finish(sequence)
            if not sequence.spoken:  # None unless its prompt has begun
                queue_ms, cached_tokens = sequence.queue_ms, sequence.cached_tokens
        # Also if it is not here: it has not come yet (see `preparation_queue`), or `output` has
        # ended it.
        self._outputs.append(
            SequenceOutput(request_id, [], finish_reason, False, queue_ms, cached_tokens)
        )

    def step(self) -> StepOutput:
        """Compute one batch, if there is one, and return all that happened since the last."""
        if self._steady and self._steady.left and not self.embeddings and self._step_steadily():
            return StepOutput([], self._last_load, self._plain)
        self.settle()
        self._embed()
        if self.scheduler:
            self._compute()
        outputs, self._outputs = self._outputs, []
        refused, self._refused = self._refused, []
        self._last_load = self._load()
        return StepOutput(outputs, self._last_load, refused=refused)

    def _embed(self) -> None:
        """Texts, as many as the streams and prompts beside them leave time for."""
        if not self.embeddings:
            self.pace.observe_texts(0, 0.0)
            return
        streams, reading = self.scheduler.streams, self.scheduler.reading
        most = self.pace.text_budget(streams, TEXT_BATCH, prompts=reading)
        began = time.perf_counter()
        try:
            done, tokens = self.embeddings.step(most)
        except BoxError as error:
            for one in self.embeddings.every:
                self.embeddings.end(one.id)
                self._refused.append(Refused(one.id, NoNodesAvailable.code, error.message))
            return
        self.pace.observe_texts(tokens, time.perf_counter() - began)
        for one in done:
            self._outputs.append(
                SequenceOutput(one.id, [], "stop", queue_ms=one.queue_ms, vectors=one.vectors)
            )

    def check_integrity(self) -> None:
        """Raises AssertionError if the books do not agree; between steady steps they lag behind."""
        if self._steady is None or not self._steady.steps:
            self.scheduler.check_integrity()

    def settle(self) -> None:
        """Bring the scheduler's books up to date; the next step is planned."""
        if self._steady is not None:
            self.scheduler.settle(self._steady.sequences, self._steady.steps)
            self._steady = None

    # -- a step --------------------------------------------------------------------------------

    def _compute(self) -> None:
        drafting = True
        while self.scheduler:
            plan = self.scheduler.plan(drafting=drafting)
            if self._facts.streams:
                plan.chunks.sort(key=lambda chunk: chunk.sequence.sequence_id)
            for move in plan.moves:
                self._move(move)
            _note_start(plan.chunks)
            began = time.perf_counter()
            try:
                logits = self._runner.decode(batch_of(plan.chunks))
            except NoSlot:
                if drafting and any(chunk.draft for chunk in plan.chunks):
                    drafting = False  # the draft was not worth anybody's cells
                else:
                    self._relieve(plan.chunks)
                continue
            self._observe(plan.chunks, time.perf_counter() - began)
            self.scheduler.commit(plan.chunks)
            steady = self.scheduler.steady_steps(plan.chunks)
            if any(chunk.sequence.scored is not None for chunk in plan.chunks):
                logits = self._score(plan.chunks, logits)
            self._sample([chunk for chunk in plan.chunks if chunk.rows], logits)
            if steady > 1 and len(self.scheduler.running) == len(plan.chunks):
                by_id = sorted(self.scheduler.running, key=lambda one: one.sequence_id)
                self._steady = SteadySteps(by_id, steady, self._end_tokens)
            return

    def _step_steadily(self) -> bool:
        """A step without a plan; False if it has to be planned after all."""
        steady = self._steady
        if steady is None:
            return False
        began = time.perf_counter()
        try:
            logits = self._runner.decode(steady.batch())
        except NoSlot:
            return False
        rows = len(steady.sequences)
        self.pace.observe(rows, 0, time.perf_counter() - began)
        self._steps += 1
        self._tokens_computed += rows
        drawn = steady.draw(logits)
        if self._facts.end_tokens.isdisjoint(drawn):
            if self.scheduler.wants_draft():
                steady.left = 0
            self._plain = (steady.ids, drawn)
            before = self._last_load
            self._last_load = msgspec.structs.replace(
                before,
                kv_used=before.kv_used + rows,
                steps=self._steps,
                tokens_computed=self._tokens_computed,
            )
            return True
        self.settle()
        for sequence, token in zip(steady.sequences, drawn, strict=True):
            self._conclude(sequence, [token], first=False)
        return False

    def _move(self, move: Move) -> None:
        if isinstance(move, RemoveCells):
            self._runner.remove(move.sequence_id)
        elif isinstance(move, CopyCells):
            self._runner.copy(move.source, move.target, move.length)
        else:
            self._runner.truncate(move.sequence_id, move.length)

    def _observe(self, chunks: list[BatchChunk], seconds: float) -> None:
        rows = sum(chunk.rows for chunk in chunks if chunk.count == 1)
        tokens = sum(chunk.count + len(chunk.draft) for chunk in chunks)
        self.pace.observe(rows, tokens - rows, seconds)
        self._steps += 1
        self._tokens_computed += tokens

    def _relieve(self, chunks: list[BatchChunk]) -> None:
        """The cache has fewer cells than it said (padding, a window): believe it, make room."""
        cells = self.scheduler.shrink(sum(chunk.count + len(chunk.draft) for chunk in chunks))
        if self.scheduler.relieve():
            return
        alone = chunks[0].sequence  # nothing else runs: this is all that it can have
        self.scheduler.finish(alone)
        if len(alone.tokens) > alone.prompt_length:
            self._outputs.append(SequenceOutput(alone.id, [], "length"))
            return
        self._refused.append(
            Refused(
                alone.id,
                ContextOverflow.code,
                ContextOverflow.of(alone.prompt_length, cells).message,
            )
        )

    def _score(self, chunks: list[BatchChunk], logits: Float32) -> Float32:
        """Says the log-probabilities of prompts' tokens; returns the rows that are drawn from."""
        row = 0
        drawn: list[int] = []
        spelled = self._runner.spelled
        for chunk in chunks:
            sequence, positions = chunk.sequence, chunk.scored
            said = [
                probe(logits[row + n], sequence.tokens[at + 1], sequence.logprobs or 0, spelled)
                for n, at in enumerate(positions)
            ]
            row += len(said)
            drawn += range(row, row + chunk.rows)
            row += chunk.rows
            if said:
                self._outputs.append(SequenceOutput(sequence.id, [], prompt_logprobs=said))
                sequence.scored = positions.stop + 1
        return logits[drawn]

    def _sample(self, chunks: list[BatchChunk], logits: Float32) -> None:
        draws = list(_draws(chunks))
        # Log-probabilities are the model's own: of the logits before they are adjusted.
        raw = {row: logits[row].copy() for row in _probed(chunks)}
        drawn = draw_rows(logits, draws, self._end_tokens)
        row = 0
        for chunk in chunks:
            here = slice(row, row + chunk.rows)
            tokens = drawn[here]
            if not chunk.sequence.spoken and chunk.sequence.silent:
                row = here.stop
                self._conclude(chunk.sequence, [], first=True)
                continue
            if chunk.sequence.grammar is not None:
                tokens = self._follow(chunk, chunk.sequence.grammar, tokens, logits[here])
            # A drafted token is right exactly if it is the draw; the draw after it is right then.
            accepted = 0
            for drafted, token in zip(chunk.draft, tokens, strict=False):
                if drafted != token or token in self._facts.end_tokens:
                    break
                accepted += 1
            tokens = tokens[: accepted + 1]
            probed = []
            if chunk.sequence.logprobs is not None:
                probed = [
                    probe(
                        raw[here.start + number],
                        token,
                        chunk.sequence.logprobs,
                        self._runner.piece,
                    )
                    for number, token in enumerate(tokens)
                ]
            row = here.stop  # before its tokens are appended: then the chunk wants no logits
            self._take(chunk, tokens, accepted, probed)

    def _follow(
        self, chunk: BatchChunk, grammar: Grammar, drawn: list[int], logits: Float32
    ) -> list[int]:
        """The draws up to the first that shows the draft to be wrong, as the grammar has them."""
        tokens: list[int] = []
        for number, token in enumerate(drawn):
            if grammar.broken:
                break
            if not grammar.allows(token):
                row = logits[number]
                grammar.mask(row)
                token = draw_again(row, chunk.sequence.sampling, _position(chunk, number))
            tokens.append(token)
            if token in self._facts.end_tokens:
                break
            grammar.take(token)
            if grammar.done or [*chunk.draft, -1][number] != token:
                break
        return tokens

    def _take(
        self, chunk: BatchChunk, tokens: list[int], accepted: int, probed: list[TokenLogprob]
    ) -> None:
        sequence = chunk.sequence
        first, sequence.spoken = not sequence.spoken, True
        sequence.tokens += tokens
        self.scheduler.accept(chunk, accepted)
        self._conclude(sequence, tokens, first=first, probed=probed)

    def _conclude(
        self,
        sequence: Sequence,
        tokens: list[int],
        *,
        first: bool,
        probed: Sequences[TokenLogprob] = (),
    ) -> None:
        """Say its new tokens (none, if it is silent), and end it if they do."""
        if sequence.grammar is not None and sequence.grammar.broken:
            self.scheduler.finish(sequence)
            why = "The schema or grammar became too complex to follow: simplify it."
            self._refused.append(Refused(sequence.id, BadRequest.code, why))
            return
        end_token = bool(tokens) and tokens[-1] in self._facts.end_tokens
        complete = sequence.grammar is not None and sequence.grammar.done
        finish_reason = "stop" if end_token or complete else None
        if finish_reason is None and self._full(sequence):
            finish_reason = "length"
        self._outputs.append(
            SequenceOutput(
                sequence.id,
                tokens,
                finish_reason,
                end_token,
                sequence.queue_ms if first else None,
                sequence.cached_tokens if first else None,
                sequence.shifted,
                probed,
            )
        )
        if first:
            self._tokens_cached += sequence.cached_tokens
        if finish_reason:
            self.scheduler.finish(sequence)

    def _full(self, sequence: Sequence) -> bool:
        """Whether it may not go on.  Context shift, if it is on, makes room where the context is
        full: it forgets half of what comes after the beginning, and the rest is computed anew."""
        if sequence.silent:
            return True
        if len(sequence.tokens) < sequence.context:
            return False
        sequence.shift()
        self.scheduler.restart(sequence)
        return False

    def _load(self) -> EngineLoad:
        return EngineLoad(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            kv_used=self.scheduler.kv_used,
            kv_cached=self.scheduler.kv_cached,
            steps=self._steps,
            tokens_computed=self._tokens_computed,
            tokens_cached=self._tokens_cached,
            preemptions=self.scheduler.preemptions,
        )


def _note_start(chunks: list[BatchChunk]) -> None:
    now = time.monotonic()
    for sequence in (chunk.sequence for chunk in chunks):
        if sequence.queue_ms is None:
            sequence.queue_ms = (now - sequence.arrived_at) * 1000


def _draws(chunks: list[BatchChunk]) -> Iterator[Draw]:
    """What decides each row's draw, in batch order."""
    for chunk in chunks:
        sequence = chunk.sequence
        for number in range(chunk.rows):
            past = NO_PAST
            if sequence.sampling.looks_back:
                past = PenaltyWindow(
                    [*sequence.tokens, *chunk.draft[:number]], sequence.prompt_length
                )
            sampling, position = sequence.sampling, _position(chunk, number)
            if position < sequence.min_length:
                sampling = msgspec.structs.replace(sampling, ignore_eos=True)
            yield Draw(sampling, position, past)


def _position(chunk: BatchChunk, number: int) -> int:
    """Of the token that the chunk's row of that number gives."""
    return chunk.sequence.length + number


def _probed(chunks: list[BatchChunk]) -> Iterator[int]:
    """Rows whose log-probabilities are wanted."""
    row = 0
    for chunk in chunks:
        if chunk.sequence.logprobs is not None:
            yield from range(row, row + chunk.rows)
        row += chunk.rows
