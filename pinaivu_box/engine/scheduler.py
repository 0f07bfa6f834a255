"""The token scheduler: which tokens of which sequences are in the next step.

A step holds every running sequence's next token and, up to a budget, chunks of prompts still to be
computed (chunked prefill: Agrawal et al., "Sarathi-Serve", OSDI 2024), so that a long prompt does
not stop the running streams.  Waiting sequences start in the order that `FairQueue` gives.  A
sequence starts with the cells of the longest prefix that another one of its scope has computed
(`PrefixCache`); one whose prefix is being computed right now waits for it.  When the KV cache has
no room for the next tokens, cached sequences are evicted, then the youngest is preempted and later
recomputed from its tokens: position-keyed sampling makes it go on as if nothing had happened.
"""

from __future__ import annotations

from collections import abc
from heapq import heappop, heappush

from pinaivu_box.engine.batch_chunk import BatchChunk
from pinaivu_box.engine.draft_model import DraftModel
from pinaivu_box.engine.drafting import Drafting
from pinaivu_box.engine.fairness import FairQueue, State
from pinaivu_box.engine.prefix_cache import PRIVATE, PrefixCache, PrefixScope
from pinaivu_box.engine.runner import KVCells
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.step_cost import StepCostModel

_MAX_STEADY_STEPS = 64
MIN_AWAITED_TOKENS = 32  # of a prefix that another sequence is computing
# Positions of prompts that give logits in one step: of a vocabulary of 260,000 that is 130 MB.
MAX_SCORED_POSITIONS = 128


class Scheduler:
    """Sizes are in tokens.  `kv_tokens` cells are shared by at most `max_sequences` sequences.

    It copies and frees `cells` of the KV cache as sequences start and end.  The cache has `ids`
    sequence ids: those beyond `max_sequences` can keep finished sequences.  Without `sharing`, as
    for recurrent models, no cells are ever shared, kept or cut.  With a `draft_model`, that is told
    what happens to cells, and tells the model.
    """

    def __init__(
        self,
        cells: KVCells,
        *,
        kv_tokens: int,
        max_sequences: int,
        token_budget: int,
        step_cost: StepCostModel,
        ids: int = 0,
        sharing: bool = True,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.kv_tokens = kv_tokens
        self.max_sequences = max_sequences
        # Every running sequence must fit into one step with its next token.
        self.token_budget = max(token_budget, max_sequences)
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []  # in order of admission
        self.prefixes = PrefixCache()
        self.preemptions = 0
        self._cells: KVCells = cells if draft_model is None else draft_model
        self._step_cost = step_cost
        self.drafting = Drafting(step_cost, draft_model)
        self._sharing = sharing
        self._capacity = kv_tokens  # less while the cache has shown that it holds less
        # A heap: with streams, ids without gaps between them are computed together.
        self._free_ids = list(range(max(ids, max_sequences)))
        self._awaited: dict[Sequence, tuple[Sequence, int]] = {}

    @property
    def kv_used(self) -> int:
        """Cells of running sequences.  Others hold what finished ones left, until it is needed."""
        return self.prefixes.live_cells()

    @property
    def kv_cached(self) -> int:
        return self.prefixes.cells - self.kv_used

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def find(self, request_id: str) -> Sequence | None:
        sequences: tuple[Sequence, ...] = (*self.running, *self.waiting)
        return next((each for each in sequences if each.id == request_id), None)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence; its cells stay for others of its scope until they are needed."""
        self._capacity = self.kv_tokens
        self._awaited.pop(sequence, None)
        for span in sequence.images:
            span.image.dropped = True
        if sequence.state is not State.RUNNING:
            self.waiting.remove(sequence)
            return
        self._free(sequence, keep=True)
        self.waiting.stop(sequence)

    def adopt(self, tokens: list[int], share: PrefixScope, fill: abc.Callable[[int], bool]) -> bool:
        """Keep a prefix that was computed elsewhere: `fill` puts its cells into the sequence id
        that it is called with, and says whether it could.  Returns whether it is there now; older
        ones may be gone for it."""
        if self.prefixes.live_cells() + len(tokens) > self._capacity or not self._sharing:
            return False
        while not self._free_ids or self.prefixes.cells + len(tokens) > self._capacity:
            oldest = self.prefixes.oldest()
            if oldest is None:
                return False
            self._evict(oldest)
        sequence_id = heappop(self._free_ids)
        if not fill(sequence_id):
            self._cells.remove(sequence_id)
            heappush(self._free_ids, sequence_id)
            return False
        self.prefixes.open(sequence_id, share)
        self.prefixes.extend(sequence_id, tokens)
        for redundant in self.prefixes.keep(sequence_id):
            self._evict(redundant)
        return True

    def plan(self, *, drafting: bool = True, spent: int = 0) -> list[BatchChunk]:
        """Returns the next step, in which `spent` prompt tokens were computed before.  Nothing of
        it counts as computed before `commit`.  It is empty if all that runs waits for images."""
        self._yield_to_fair_share()
        self._make_room(len(self.running))
        decoding = [s for s in self.running if s.pending == 1]
        chunks = [BatchChunk(s, s.computed, 1) for s in decoding[: max(0, self._room())]]
        planned = len(chunks)
        budget = self._step_cost.prompt_budget(planned, self.token_budget - planned) - spent
        for sequence in self._prompts():
            count = self._add_chunk(chunks, sequence, planned, budget)
            planned, budget = planned + count, budget - count
        for sequence in self._startable(budget):
            self._start(sequence)
            count = self._add_chunk(chunks, sequence, planned, budget)
            planned, budget = planned + count, budget - count
        if drafting and all(chunk.wants_logits and chunk.count == 1 for chunk in chunks):
            chunks = self._with_drafts(chunks)
        return chunks

    def plan_image(self) -> BatchChunk | None:
        """The next part of an image that is ready, for a step of its own; it finds cells, and does
        not wait for a budget if it has to be computed whole."""
        for sequence in self._prompts():
            span = sequence.next_image
            piece = None if span is None or span.start > sequence.computed else span.piece
            if span is None or piece is None:
                continue
            count = span.end - sequence.computed
            if piece.causal:
                budget = self._step_cost.prompt_budget(self.streams, self.token_budget)
                count = min(count, budget)
            room = self._fit(self.streams, count)
            if room and (room == count or piece.causal):
                return BatchChunk(sequence, sequence.computed, room)
        return None

    def _prompts(self) -> list[Sequence]:
        """The running sequences whose prompts are not computed, in the order in which they are."""
        prompts = [s for s in self.running if s.pending > 1]
        prompts.sort(key=lambda s: (self.waiting.counter(s.tenant), s.arrival))
        return prompts

    def steady_steps(self, chunks: list[BatchChunk]) -> int:
        """How many steps may follow the one of these chunks without a plan, each with the next
        token of the same sequences.  `catch_up` has to be called before any other method."""
        plain = all(
            c.count == 1 and c.wants_logits and not c.draft and c.sequence.plain for c in chunks
        )
        if not plain or len(chunks) != len(self.running):
            return 0
        if self.waiting and len(self.running) < self.max_sequences:
            return 0  # one of those may soon start
        # Each gets one more token from this step, and none may reach its end in those that follow.
        left = min(min(s.max_length - s.shifted, s.context) - len(s.tokens) for s in self.running)
        return max(0, min(left - 2, self._room() // len(chunks), _MAX_STEADY_STEPS))

    def wants_draft(self) -> bool:
        """Whether it pays to check a draft in the next step, if all that runs decodes."""
        return self.drafting.wants_draft(self.running)

    def catch_up(self, sequences: list[Sequence], steps: int) -> None:
        """After so many steady steps: each sequence has computed one token in each."""
        for sequence in sequences:
            self._advance(sequence, sequence.computed - steps, sequence.computed)

    @property
    def streams(self) -> int:
        """Sequences of which each step computes the next token."""
        return sum(sequence.pending == 1 for sequence in self.running)

    @property
    def has_prompts(self) -> bool:
        """Whether there are prompts to be computed."""
        return bool(self.waiting) or any(sequence.pending > 1 for sequence in self.running)

    def commit(self, chunks: list[BatchChunk]) -> None:
        """Note that the step was computed: its known tokens are in the KV cache."""
        for chunk in chunks:
            self._advance(chunk.sequence, chunk.start, chunk.start + chunk.count)

    def accept(self, chunk: BatchChunk, count: int) -> None:
        """Note that the first `count` drafted tokens were right; they are in `tokens` by now."""
        sequence = chunk.sequence
        self.drafting.learn(sequence, len(chunk.draft), count)
        if count:
            self._advance(sequence, sequence.computed, sequence.computed + count)
        if count < len(chunk.draft):
            end = sequence.position(sequence.computed)
            self._cells.truncate(sequence.sequence_id, end)

    def _advance(self, sequence: Sequence, start: int, end: int) -> None:
        """Note that its tokens from `start` to before `end` are in the KV cache."""
        self.prefixes.extend(sequence.sequence_id, sequence.tokens[start:end])
        sequence.computed = end
        prompt = max(0, min(end, sequence.prompt_length) - start)
        self.waiting.charge(sequence.tenant, prompt, end - start - prompt)

    def lower_capacity(self, planned: int) -> int:
        """A step of `planned` tokens found no room: count on fewer cells until something ends.
        Returns on how many."""
        self._capacity = min(self._capacity, self.prefixes.cells + planned - 1)
        return self._capacity

    def restart(self, sequence: Sequence) -> None:
        """Compute a running sequence anew: its tokens are no longer those in its cells."""
        self._requeue(sequence, keep=False)

    def reclaim(self) -> bool:
        """Free cells: evict a kept prefix, or preempt the youngest sequence.  Returns False if
        only one runs."""
        if (oldest := self.prefixes.oldest()) is not None:
            self._evict(oldest)
            return True
        if len(self.running) < 2:
            return False
        self._preempt(max(self.running, key=lambda s: s.arrival), keep=False)
        return True

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant is broken.  For idle times and tests."""
        self.prefixes.check_integrity()
        live = {s.sequence_id: s for s in self.running}
        if len(live) != len(self.running) or len(self.running) > self.max_sequences:
            raise AssertionError("running sequences and their ids disagree")
        for sequence_id, sequence in live.items():
            if self.prefixes.length(sequence_id) != sequence.computed or (
                self.prefixes.is_cached(sequence_id)
            ):
                raise AssertionError(f"the cells of {sequence.id} are not what it has computed")
        if set(self._free_ids) & set(live) or any(i in self.prefixes for i in self._free_ids):
            raise AssertionError("a free id is in use")

    # -- what a step holds -----------------------------------------------------------------------

    def _add_chunk(
        self,
        chunks: list[BatchChunk],
        sequence: Sequence,
        planned: int,
        budget: int,
    ) -> int:
        if sequence.unscored:
            budget = min(budget, MAX_SCORED_POSITIONS - sum(len(chunk.scored) for chunk in chunks))
        count = self._fit(planned, min(sequence.text_pending, budget))
        if count:
            chunks.append(BatchChunk(sequence, sequence.computed, count))
        return count

    def _with_drafts(self, chunks: list[BatchChunk]) -> list[BatchChunk]:
        room = min(self.token_budget, self._room()) - len(chunks)
        drafts = self.drafting.drafts([chunk.sequence for chunk in chunks], max(0, room))
        return [
            BatchChunk(chunk.sequence, chunk.start, 1, drafts[chunk.sequence])
            if chunk.sequence in drafts
            else chunk
            for chunk in chunks
        ]

    # -- starting --------------------------------------------------------------------------------

    def _startable(self, budget: int) -> list[Sequence]:
        """Sequences that may start now, in order, up to the first that has no room."""
        if not self.waiting or budget <= 0 or len(self.running) >= self.max_sequences:
            return []
        free = self.max_sequences - len(self.running)
        # Admit only what can be computed whole beside what runs, with one more cell for each: else
        # two half-computed prompts could starve each other.
        cells = self.prefixes.live_cells() + sum(s.pending + 1 for s in self.running)
        starting: list[Sequence] = []
        for sequence in self.waiting.order():
            if len(starting) >= free or budget <= 0:
                break
            if self._waits_for_prefix(sequence, starting):
                continue
            known, source = self._match(sequence)
            need = self._cells_for(sequence, known, source)
            if (self.running or starting) and cells + need > self._capacity:
                break
            cells += need
            budget -= sequence.pending - known
            starting.append(sequence)
        return starting

    def _waits_for_prefix(self, sequence: Sequence, starting: list[Sequence]) -> bool:
        """Whether another sequence is computing a prefix of it that is worth waiting for."""
        if not self._sharing or sequence.max_shared_tokens < MIN_AWAITED_TOKENS:
            return False
        awaited = self._awaited.get(sequence)
        if awaited is None:
            have, _ = self.prefixes.match(sequence.tokens, sequence.share)
            best, source = have + MIN_AWAITED_TOKENS, None
            for other in (*self.running, *starting):
                if other.pending > 1:
                    common = sequence.share.in_common(other.share, sequence.tokens, other.tokens)
                    if common > max(best, other.computed):
                        best, source = common, other
            if source is None:
                return False
            awaited = self._awaited[sequence] = (source, best)
        source, length = awaited
        # Once it is computed, or its sequence has gone, the cache says what there is.
        running = source.sequence_id >= 0 or source in starting
        if running and source.computed < min(length, len(source.tokens)):
            return True
        del self._awaited[sequence]
        return False

    def _match(self, sequence: Sequence) -> tuple[int, int]:
        if not self._sharing or not sequence.max_shared_tokens:
            return 0, -1
        length, source = self.prefixes.match(sequence.tokens, sequence.share)
        length = sequence.whole_pieces(min(length, sequence.max_shared_tokens))
        return length, source if length else -1

    def _cells_for(self, sequence: Sequence, known: int, source: int, leaves: int = -1) -> int:
        """More live cells, with one for the next token.  The id `leaves` is about to be cached."""
        live = source not in (-1, leaves) and not self.prefixes.is_cached(source)
        return sequence.pending + 1 - (known if live else 0)

    def _start(self, sequence: Sequence) -> None:
        self.waiting.start(sequence)
        length, source = self._match(sequence)
        self._assign_id(sequence, length, source)
        sequence.computed = length
        if sequence.state is State.WAITING:
            sequence.cached_tokens = min(length, sequence.prompt_length)
        sequence.state = State.RUNNING
        self.running.append(sequence)

    def _assign_id(self, sequence: Sequence, length: int, source: int) -> None:
        """An id with the first `length` cells of `source`: `source` itself, if it is only kept and
        that loses little, else a free one."""
        if self._reuses(source, length):
            sequence.sequence_id = source
            self.prefixes.reopen(source, sequence.share, length)
            self._cells.truncate(source, sequence.position(length))
            return
        if not self._free_ids:
            oldest = self.prefixes.oldest(excluding=source)
            if oldest is None:
                raise AssertionError("more sequences run than there are ids")
            self._evict(oldest)
        sequence.sequence_id = heappop(self._free_ids)
        self.prefixes.open(sequence.sequence_id, sequence.share, source, length)
        if length:
            self._cells.copy(source, sequence.sequence_id, sequence.position(length))

    def _reuses(self, source: int, length: int) -> bool:
        if not self.prefixes.is_cached(source):
            return False
        whole = self.prefixes.length(source)
        if self._free_ids:
            return length == whole
        return 2 * length >= whole or self.prefixes.oldest(excluding=source) is None

    def _yield_to_fair_share(self) -> None:
        """If all places are taken, the tenant that has more than its share gives one to the
        sequence that is next.  The preempted one's cells are kept while there is room, so that it
        loses little."""
        if not self.waiting or len(self.running) < self.max_sequences:
            return
        first = next(self.waiting.order())
        holder = self.waiting.over_share(first.tenant)
        if holder is None or self._waits_for_prefix(first, []):
            return
        youngest = max((s for s in self.running if s.tenant == holder), key=lambda s: s.arrival)
        # Only if that helps: the one that is next has to find cells as well.
        leaves = youngest.sequence_id
        cells = self.prefixes.live_cells(excluding=leaves)
        cells += sum(s.pending + 1 for s in self.running if s is not youngest)
        cells += self._cells_for(first, *self._match(first), leaves)
        if cells <= self._capacity:
            self._preempt(youngest, keep=True)
            self._start(first)  # now: the preempted one may be the next in order

    # -- cells -----------------------------------------------------------------------------------

    def _room(self) -> int:
        """Cells for the next step.  A sequence that runs alone may try for all there are: no other
        can make room for it."""
        capacity = self._capacity if len(self.running) > 1 else self.kv_tokens
        return capacity - self.prefixes.cells

    def _fit(self, planned: int, tokens: int) -> int:
        """How many of so many tokens find cells beside `planned` ones; evicts kept prefixes."""
        while self._room() - planned < tokens:
            oldest = self.prefixes.oldest()
            if oldest is None:
                break
            self._evict(oldest)
        return max(0, min(tokens, self._room() - planned))

    def _make_room(self, needed: int) -> None:
        while self.prefixes.cells + needed > self._capacity:
            if not self.reclaim():
                return
            needed = len(self.running)

    def _evict(self, sequence_id: int) -> None:
        self.prefixes.release(sequence_id)
        self._cells.remove(sequence_id)
        heappush(self._free_ids, sequence_id)

    def _preempt(self, sequence: Sequence, *, keep: bool) -> None:
        self._requeue(sequence, keep=keep)
        self.preemptions += 1

    def _requeue(self, sequence: Sequence, *, keep: bool) -> None:
        """From running to waiting."""
        self._free(sequence, keep=keep)
        sequence.state = State.PREEMPTED
        self.waiting.push(sequence)  # before it stops: its tenant was not away
        self.waiting.stop(sequence)

    def _free(self, sequence: Sequence, *, keep: bool) -> None:
        self.running.remove(sequence)
        sequence_id, sequence.sequence_id = sequence.sequence_id, -1
        if keep and self._sharing and sequence.computed and sequence.share.scope != PRIVATE:
            for redundant in self.prefixes.keep(sequence_id):
                self._evict(redundant)
        else:
            self._evict(sequence_id)
        sequence.computed = 0
        for span in sequence.images:
            span.image.forget()
