"""The token loop: one step after another.  It does no I/O and knows no text: see `request_preparer`
and `output`."""

from __future__ import annotations

import itertools
import time
from collections import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pinaivu_box.engine.batch_chunk import BatchChunk, batch_of
from pinaivu_box.engine.draft_model import DraftModel
from pinaivu_box.engine.embeddings import EmbeddingJob, EmbeddingScheduler
from pinaivu_box.engine.image_encoder import ImageEncoded, ImageEncoder
from pinaivu_box.engine.messages import (
    EngineLoad,
    PrefixesSaved,
    Refused,
    ReplayedToken,
    TokenLogprob,
)
from pinaivu_box.engine.output import NO_LOGITS, Logits, SequenceOutput, StepOutput
from pinaivu_box.engine.replay import Replay, ReplayedStep
from pinaivu_box.engine.runner import TEXT_BATCH, Float32, NoSlot, Runner
from pinaivu_box.engine.sampling import Draw, Sampler, redraw, token_logprob
from pinaivu_box.engine.scheduler import Scheduler
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.steady_steps import SteadySteps
from pinaivu_box.engine.step_cost import StepCostModel
from pinaivu_box.engine.stored_prefixes import StoredPrefixes
from pinaivu_box.errors import BadRequest, BoxError, ContextOverflow, NoNodesAvailable

if TYPE_CHECKING:
    from pinaivu_box.engine.grammar import Grammar
    from pinaivu_box.engine.prefix_store import PrefixStore  # libsodium is loaded if it is needed


class Engine:
    """Drives a runner: `add` and `end` sequences, `step` computes once and reports.

    `images` looks at images; whoever drives this calls `encoded` when it reports.  `draft` is the
    runner of a smaller model that proposes tokens, `store` keeps prefixes on disk.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        token_budget: int,
        images: ImageEncoder | None = None,
        draft: Runner | None = None,
        store: PrefixStore | None = None,
    ) -> None:
        facts = runner.facts
        self._runner = runner
        self._facts = facts
        self.step_cost = StepCostModel()
        self._end_tokens = np.array(sorted(facts.end_tokens), np.intp)
        draft_model = None
        if draft is not None:
            draft_model = DraftModel(
                draft,
                runner,
                batch_tokens=max(token_budget, facts.max_sequences),
                n_vocab=facts.n_vocab,
                end_tokens=self._end_tokens,
            )
        self.scheduler = Scheduler(
            runner,
            kv_tokens=facts.kv_tokens,
            max_sequences=facts.max_sequences,
            token_budget=token_budget,
            step_cost=self.step_cost,
            ids=facts.sequence_ids,
            sharing=facts.sharing,
            draft_model=draft_model,
        )
        self._stored = None if store is None else StoredPrefixes(store, runner, self.scheduler)
        self._arrivals = itertools.count(1)
        self._steps = 0
        self._tokens_computed = 0
        self._tokens_cached = 0
        self._tokens_drafted = 0
        self._tokens_accepted = 0
        self._steady: SteadySteps | None = None
        self._last_load = EngineLoad()
        self.embeddings = EmbeddingScheduler(runner)
        self._images = images
        self._encoding = 0  # images that were asked for and are not reported
        self._stalled = False  # nothing can be computed before one of them is
        self._outputs: list[SequenceOutput] = []
        self._refused: list[Refused] = []

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to report."""
        if self._steady is not None:
            return True
        computable = self.scheduler and not self._stalled
        return bool(computable or self.embeddings or self._outputs or self._refused)

    def add(self, sequence: Sequence | EmbeddingJob) -> None:
        if isinstance(sequence, EmbeddingJob):
            self.embeddings.add(sequence)
            return
        self.catch_up()
        self._stalled = False
        sequence.arrival = next(self._arrivals)
        if self._stored is not None:
            self._stored.restore(sequence)
        self.scheduler.add(sequence)
        if sequence.scored == 0:
            first = TokenLogprob(self._runner.spelling(sequence.tokens[0]), 0.0, [])
            self._outputs.append(SequenceOutput(sequence.id, [], prompt_logprobs=[first]))
            sequence.scored = 1

    def save_prefixes(self) -> PrefixesSaved:
        """See `StoredPrefixes.save`."""
        self.catch_up()
        return PrefixesSaved() if self._stored is None else self._stored.save()

    def end(self, request_id: str, finish_reason: str) -> None:
        """Stop a sequence (the client left, or a stop string came); free its cells."""
        self.catch_up()
        self._stalled = False
        sequence, embedding = self.scheduler.find(request_id), self.embeddings.end(request_id)
        queue_ms, cached_tokens = embedding.queue_ms if embedding else None, None
        if sequence is not None:
            self.scheduler.finish(sequence)
            if not sequence.reported:  # None unless its prompt has begun
                queue_ms, cached_tokens = sequence.queue_ms, sequence.cached_tokens
        # Also if it is not here: it has not come yet (see `preparation_queue`), or `output` has
        # ended it.
        self._outputs.append(
            SequenceOutput(request_id, [], finish_reason, False, queue_ms, cached_tokens)
        )

    def encoded(self, event: ImageEncoded) -> None:
        """An image was looked at."""
        self._encoding -= 1
        self._stalled = False
        sequence = None if event.error is None else self.scheduler.find(event.id)
        if sequence is not None and not event.image.dropped:
            self.catch_up()
            self.scheduler.finish(sequence)
            code = getattr(event.error, "code", NoNodesAvailable.code)
            self._refused.append(Refused(event.id, code, str(event.error), "messages"))

    def step(self) -> StepOutput:
        """Compute one batch, if there is one.  Returns all that happened since the last step."""
        if self._steady and self._steady.left and not self.embeddings:
            output = self._step_steadily(self._steady)
            if output is not None:
                return output
        self.catch_up()
        self._embed()
        seen = self._see()
        computed = bool(self.scheduler) and (self._compute(seen) or bool(seen))
        self._ask_for_images()
        if self.scheduler and not computed:
            self._stall()
        outputs, self._outputs = self._outputs, []
        refused, self._refused = self._refused, []
        self._last_load = self._load()
        return StepOutput(outputs, self._last_load, refused=refused)

    def _embed(self) -> None:
        """Compute texts, as many as the streams and prompts beside them leave time for."""
        if not self.embeddings:
            self.step_cost.observe_texts(0, 0.0)
            return
        streams, prompts = self.scheduler.streams, self.scheduler.has_prompts
        budget = self.step_cost.text_budget(streams, TEXT_BATCH, prompts=prompts)
        began = time.perf_counter()
        try:
            complete_jobs, tokens = self.embeddings.step(budget)
        except BoxError as error:
            for job in self.embeddings.jobs:
                self.embeddings.end(job.id)
                self._refused.append(Refused(job.id, NoNodesAvailable.code, error.message))
            return
        self.step_cost.observe_texts(tokens, time.perf_counter() - began)
        for job in complete_jobs:
            self._outputs.append(
                SequenceOutput(job.id, [], "stop", queue_ms=job.queue_ms, vectors=job.vectors)
            )

    def _ask_for_images(self) -> None:
        """Of the running sequences, those that come next: one is looked at while the sequence's
        text before it is computed."""
        for sequence in self.scheduler.running if self._images is not None else ():
            span = sequence.next_image
            if span is not None and not span.image.asked and self._images is not None:
                sequence.note_start()
                self._encoding += 1
                self._images.ask(span.image, request_id=sequence.id, tenant=sequence.tenant)

    def _see(self) -> int:
        """Compute a part of an image, if there is one.  Returns of how many tokens."""
        chunk = None if self._images is None else self.scheduler.plan_image()
        if chunk is None:
            return 0
        sequence, span = chunk.sequence, chunk.sequence.next_image
        if span is None or span.piece is None:
            raise AssertionError("an image was planned that is not there")
        begin = chunk.start - span.start
        part = span.piece.part(begin, begin + chunk.count)
        began = time.perf_counter()
        try:
            self._runner.decode_image(part, sequence.position(span.start), sequence.sequence_id)
        except NoSlot:
            self._reclaim([chunk])
            return 0
        self._observe([chunk], time.perf_counter() - began)
        self.scheduler.commit([chunk])
        if all(later.image is not span.image for later in sequence.images_ahead):
            span.image.forget()
        return chunk.count

    def _stall(self) -> None:
        """Nothing could be computed: wait for images, or make room for those that are ready."""
        if self._encoding:
            self._stalled = True
        elif any(sequence.images for sequence in self.scheduler.running):
            self.scheduler.reclaim()

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant is broken.  In steady steps the scheduler lags."""
        if self._steady is None or not self._steady.steps:
            self.scheduler.check_integrity()

    def catch_up(self) -> None:
        """Bring the scheduler up to date; the next step is planned."""
        if self._steady is not None:
            self.scheduler.catch_up(self._steady.sequences, self._steady.steps)
            self._steady = None

    # -- a step --------------------------------------------------------------------------------

    def _compute(self, spent: int) -> bool:
        """One batch, in a step in which so many prompt tokens were computed before.  Returns
        whether there was anything."""
        drafting = True
        while self.scheduler:
            chunks = self.scheduler.plan(drafting=drafting, spent=spent)
            if not chunks:
                return False
            if self._facts.streams:
                chunks.sort(key=lambda chunk: chunk.sequence.sequence_id)
            for chunk in chunks:
                chunk.sequence.note_start()
            began = time.perf_counter()
            try:
                logits = self._runner.decode(batch_of(chunks))
            except NoSlot:
                if drafting and any(chunk.draft for chunk in chunks):
                    drafting = False  # a draft is not worth another sequence's cells
                else:
                    self._reclaim(chunks)
                continue
            self._observe(chunks, time.perf_counter() - began)
            self.scheduler.commit(chunks)
            steady = self.scheduler.steady_steps(chunks)
            if any(chunk.sequence.scored is not None for chunk in chunks):
                logits = self._score(chunks, logits)
            self._sample([chunk for chunk in chunks if chunk.rows], logits)
            if steady > 1 and len(self.scheduler.running) == len(chunks):
                by_id = sorted(self.scheduler.running, key=lambda each: each.sequence_id)
                self._steady = SteadySteps(by_id, steady, self._end_tokens)
            break
        return True

    def _step_steadily(self, steady: SteadySteps) -> StepOutput | None:
        """A step without a plan; None if it has to be planned after all."""
        began = time.perf_counter()
        try:
            logits = self._runner.decode(steady.batch)
        except NoSlot:
            return None
        rows = len(steady.sequences)
        self._observe_step(rows, 0, time.perf_counter() - began)
        self._steps += 1
        self._tokens_computed += rows
        drawn, raw = steady.draw(logits)
        if self._facts.end_tokens.isdisjoint(drawn):
            if self.scheduler.wants_draft():
                steady.left = 0
            self._last_load = msgspec.structs.replace(
                self._last_load,
                kv_used=self._last_load.kv_used + rows,
                steps=self._steps,
                tokens_computed=self._tokens_computed,
            )
            return StepOutput([], self._last_load, (steady.ids, drawn, raw))
        self.catch_up()
        for number, (sequence, token) in enumerate(zip(steady.sequences, drawn, strict=True)):
            self._conclude(sequence, [token], raw[number : number + 1], first=False)
        return None

    def _observe(self, chunks: list[BatchChunk], seconds: float) -> None:
        rows = sum(chunk.rows for chunk in chunks if chunk.count == 1)
        tokens = sum(chunk.size for chunk in chunks)
        self._observe_step(rows, tokens - rows, seconds)
        self._steps += 1
        self._tokens_computed += tokens

    def _observe_step(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        self.step_cost.observe(rows, prompt_tokens, seconds)
        self.scheduler.drafting.observe(seconds)

    def _reclaim(self, chunks: list[BatchChunk]) -> None:
        """Make room: the cache has fewer cells than it reported (padding, a window)."""
        cells = self.scheduler.lower_capacity(sum(chunk.size for chunk in chunks))
        if self.scheduler.reclaim():
            return
        alone = chunks[0].sequence  # nothing else runs: this is all that it can have
        self.scheduler.finish(alone)
        if len(alone.tokens) > alone.prompt_length:
            self._outputs.append(SequenceOutput(alone.id, [], "length"))
            return
        message = ContextOverflow.of(alone.prompt_length, cells).message
        self._refused.append(Refused(alone.id, ContextOverflow.code, message))

    def _score(self, chunks: list[BatchChunk], logits: Float32) -> Float32:
        """Report log-probabilities of prompts' tokens.  Returns the rows that are drawn from."""
        row = 0
        drawn: list[int] = []
        spelling = self._runner.spelling
        for chunk in chunks:
            sequence, positions = chunk.sequence, chunk.scored
            scored = [
                token_logprob(
                    logits[row + n], sequence.tokens[at + 1], sequence.logprobs or 0, spelling
                )
                for n, at in enumerate(positions)
            ]
            row += len(scored)
            drawn += range(row, row + chunk.rows)
            row += chunk.rows
            if scored:
                self._outputs.append(SequenceOutput(sequence.id, [], prompt_logprobs=scored))
                sequence.scored = positions.stop + 1
        return logits[drawn]

    def _sample(self, chunks: list[BatchChunk], logits: Float32) -> None:
        ends = itertools.accumulate(chunk.rows for chunk in chunks)
        rows = [slice(end - chunk.rows, end) for chunk, end in zip(chunks, ends, strict=True)]
        # Log-probabilities are the model's own: of the logits before they are adjusted.
        unadjusted = [
            logits[here].copy() if chunk.sequence.compares else None
            for chunk, here in zip(chunks, rows, strict=True)
        ]
        draws = list(_draws(chunks))
        sampler = Sampler([each.sampling for each in draws], self._end_tokens)
        drawn = sampler.draw(
            logits, [each.position for each in draws], [each.window for each in draws]
        )
        for chunk, here, scored in zip(chunks, rows, unadjusted, strict=True):
            sequence, tokens = chunk.sequence, drawn[here]
            first, sequence.reported = not sequence.reported, True
            if first and sequence.wants_no_output:
                self._conclude(sequence, [], NO_LOGITS, first=True)
                continue
            if sequence.replay is not None and scored is not None:
                step = ReplayedStep(logits[here], scored, draws[here], tokens)
                self._compare(chunk, sequence.replay, step, first=first)
                continue
            if sequence.grammar is not None:
                tokens = self._follow(chunk, sequence.grammar, tokens, logits[here])
            # A drafted token is right exactly if it is the draw; the draw after it is right then.
            accepted = 0
            for drafted, token in zip(chunk.draft, tokens, strict=False):
                if drafted != token or token in self._facts.end_tokens:
                    break
                accepted += 1
            self._tokens_drafted += len(chunk.draft)
            self._tokens_accepted += accepted
            tokens = tokens[: accepted + 1]
            logprobs: list[TokenLogprob] = []
            if scored is not None:
                likeliest, piece = sequence.logprobs or 0, self._runner.piece
                of_tokens = zip(scored, tokens, strict=False)
                logprobs = [token_logprob(row, token, likeliest, piece) for row, token in of_tokens]
            raw = sampler.raw(logits, np.arange(here.start, here.start + len(tokens)), tokens)
            sequence.tokens += tokens
            self.scheduler.accept(chunk, accepted)
            self._conclude(sequence, tokens, raw, first=first, logprobs=logprobs)

    def _compare(
        self, chunk: BatchChunk, replay: Replay, step: ReplayedStep, *, first: bool
    ) -> None:
        """Go on with the recorded tokens, and report what was drawn in their places."""
        sequence = chunk.sequence
        compared = step.compare(replay, sequence.grammar, self._facts.end_tokens)
        tokens = [each.recorded for each in compared]
        raw = np.array([each.logit for each in compared], np.float32)
        sequence.tokens += tokens
        self.scheduler.accept(chunk, len(tokens) - 1)
        self._conclude(sequence, tokens, raw, first=first, replayed=compared)

    def _follow(
        self, chunk: BatchChunk, grammar: Grammar, drawn: list[int], logits: Float32
    ) -> list[int]:
        """The draws up to the first that shows the draft to be wrong, as the grammar has them."""
        sequence = chunk.sequence
        tokens: list[int] = []
        for number, token in enumerate(drawn):
            if grammar.broken:
                break
            if not grammar.allows(token):
                row = logits[number]
                grammar.mask(row)
                token = redraw(row, sequence.sampling, sequence.length + number)
            tokens.append(token)
            if token in self._facts.end_tokens:
                break
            grammar.take(token)
            if grammar.done or [*chunk.draft, -1][number] != token:
                break
        return tokens

    def _conclude(
        self,
        sequence: Sequence,
        tokens: list[int],
        raw: Logits,
        *,
        first: bool,
        logprobs: abc.Sequence[TokenLogprob] = (),
        replayed: abc.Sequence[ReplayedToken] = (),
    ) -> None:
        """Report its new tokens, if it wants any, and end it if they do."""
        if sequence.grammar is not None and sequence.grammar.broken:
            self.scheduler.finish(sequence)
            message = "The schema or grammar became too complex to follow: simplify it."
            self._refused.append(Refused(sequence.id, BadRequest.code, message))
            return
        end_token = bool(tokens) and tokens[-1] in self._facts.end_tokens
        complete = sequence.grammar is not None and sequence.grammar.done
        complete |= sequence.replay is not None and sequence.replay.forbidden
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
                logprobs,
                raw,
                replayed=replayed,
            )
        )
        if first:
            self._tokens_cached += sequence.cached_tokens
        if finish_reason:
            self.scheduler.finish(sequence)

    def _full(self, sequence: Sequence) -> bool:
        """Whether it may not go on.  Context shift, if it is on, makes room where the context is
        full: it forgets half of what comes after the beginning, and the rest is computed anew."""
        if sequence.wants_no_output:
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
            tokens_restored=self._stored.tokens_restored if self._stored is not None else 0,
            tokens_drafted=self._tokens_drafted,
            tokens_accepted=self._tokens_accepted,
        )


def _draws(chunks: list[BatchChunk]) -> Iterator[Draw]:
    """What decides each row's draw, in batch order."""
    for chunk in chunks:
        for number in range(chunk.rows):
            yield chunk.sequence.draw(list(chunk.draft[:number]))
