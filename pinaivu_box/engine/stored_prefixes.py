"""Prefixes on their way between the cache and the disk: saved before an engine is unloaded, read
when a sequence comes that begins so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pinaivu_box.engine.messages import PrefixesSaved
from pinaivu_box.engine.prefix_cache import PRIVATE
from pinaivu_box.engine.runner import Runner
from pinaivu_box.engine.scheduler import Scheduler
from pinaivu_box.engine.sequence import Sequence

if TYPE_CHECKING:
    from pinaivu_box.engine.prefix_store import PrefixStore  # libsodium is loaded if it is needed

_MAX_SAVE_SECONDS = 2.0  # another model may wait for the memory


class StoredPrefixes:
    """`tokens_restored` counts those that were read and not computed."""

    def __init__(self, store: PrefixStore, runner: Runner, scheduler: Scheduler) -> None:
        self._store, self._runner, self._scheduler = store, runner, scheduler
        self.tokens_restored = 0

    def save(self) -> PrefixesSaved:
        """Save what was used last, for as long as that may take."""
        saved = PrefixesSaved()
        until, prefixes = time.monotonic() + _MAX_SAVE_SECONDS, self._scheduler.prefixes
        for sequence_id in prefixes.newest():
            tokens, share = prefixes.tokens_of(sequence_id), prefixes.share_of(sequence_id)
            if time.monotonic() > until or not self._store.is_wanted(tokens, share):
                continue
            state = self._runner.state(sequence_id, self._store.max_bytes)
            if state is not None and self._store.save(tokens, share, state):
                saved = PrefixesSaved(
                    saved.prefixes + 1, saved.tokens + len(tokens), saved.size + len(state)
                )
        return saved

    def restore(self, sequence: Sequence) -> None:
        """Read what was saved of the sequence's beginning, if that is more than the cache has."""
        store, share = self._store, sequence.share
        if share.scope == PRIVATE:
            return
        tokens = sequence.tokens[: sequence.max_shared_tokens]
        known, _ = self._scheduler.prefixes.match(tokens, share)
        saved = store.find(tokens, share, known)
        if saved is None:
            return

        def fill(sequence_id: int) -> bool:
            state = store.read(saved)
            if state is None:
                return False
            if not self._runner.restore(sequence_id, state):
                store.forget(saved)  # this engine cannot use it
                return False
            return True

        if self._scheduler.adopt(saved.tokens, share, fill):
            self.tokens_restored += len(saved.tokens)
