"""Sends members the model files of this box's catalog, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from pinaivu_box.errors import LinkLost, ModelNotFound
from pinaivu_box.files import store as file_store
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.wire import (
    MAX_DATA_BYTES,
    MAX_FILE_BYTES,
    WORKING_SECONDS,
    File,
    FileRefused,
    Find,
    GivePiece,
    Hashes,
    List,
    ModelAvailable,
    PieceData,
    Working,
)
from pinaivu_box.models import partial_file
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.store.database import Database
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream

MAX_CONVERSATIONS = 8  # of one peer at a time
MAX_DISK_READS = 4  # at a time
IDLE_SECONDS = 60.0  # without a question
_PIECE_SECONDS = 60.0  # that a piece may take under a rate limit; the peer waits twice as long
_MAX_REASON_CHARACTERS = 500
_NAMED_DIGITS = 12  # of a digest, in sentences

_now, _sleep = time.monotonic, asyncio.sleep

T = TypeVar("T")
Conversation = MessageStream[file_wire.Answer, file_wire.Question]
log = logging.getLogger(__name__)


class _Refusal(Exception):
    """A sentence for the peer's operator."""


class _RateLimit:
    """`rate` bytes a second for all uploads, which take turns frame by frame.  `pieces`: only so
    many are sent at a time as are done within `_PIECE_SECONDS`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        count = max(1, int(rate * _PIECE_SECONDS / partial_file.PIECE_BYTES))
        self.pieces = asyncio.Semaphore(count)
        self._free_at = 0.0

    async def wait(self, size: int) -> None:
        """Wait until so many more bytes may be sent."""
        begin = max(_now(), self._free_at)
        self._free_at = begin + size / self.rate
        await _sleep(begin - _now())


class FileServer:
    """Answers questions about model files, and sends their pieces."""

    def __init__(
        self,
        shared: Callable[[str], Awaitable[Catalog | str]],
        database: Database,
        rate: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`shared` returns what a peer may copy now, or in a sentence why nothing; `rate` how many
        bytes a second all peers get together, 0 for no limit."""
        self._shared, self._rate = shared, rate
        self._rate_limit: _RateLimit | None = None
        self._database = database
        self._conversations: Counter[str] = Counter()
        self._reads = asyncio.Semaphore(MAX_DISK_READS)
        self._hashing = asyncio.Lock()
        self._model_of: dict[str, str] = {}  # digest -> the model to look at first

    async def serve(self, peer: str, stream: Stream) -> None:
        """Serve one conversation.  Raises ProtocolError if the peer sends what no box sends."""
        self._conversations[peer] += 1
        conversation = Conversation(peer, stream, file_wire.questions, receive_seconds=IDLE_SECONDS)
        try:
            async with conversation:
                if self._conversations[peer] > MAX_CONVERSATIONS:
                    busy = "this box sends no peer more files at a time"
                    await conversation.send(FileRefused(busy))
                else:
                    await self._answer_all(conversation)
        except (LinkLost, TimeoutError) as error:
            log.debug("an upload to %s has ended: %s", wire.short(peer), error)
        finally:
            self._conversations[peer] -= 1
            self._conversations += Counter()  # drops those that are 0

    async def _answer_all(self, conversation: Conversation) -> None:
        while (question := await conversation.receive()) is not None:
            try:
                if isinstance(catalog := await self._shared(conversation.peer), str):
                    raise _Refusal(catalog)
                await self._answer(conversation, question, catalog)
            except _Refusal as refusal:
                await conversation.send(FileRefused(str(refusal)[:_MAX_REASON_CHARACTERS]))
            except OSError as error:
                log.warning("a model could not be sent to a peer: %s", error)
                await conversation.send(FileRefused("this box cannot read its file"))

    async def _answer(
        self, conversation: Conversation, question: file_wire.Question, catalog: Catalog
    ) -> None:
        match question:
            case Find():
                finding = self._find(catalog, question)
                digest, model = await _keep_informed(conversation, finding)
                parts = await _keep_informed(conversation, self._parts(model))
                answer = ModelAvailable(question.model, digest, model.size, parts)
                await conversation.send(answer)
            case List():
                model = await _keep_informed(conversation, self._file(catalog, question.digest))
                hashing = self._hashes(model, question.digest)
                hashes = await _keep_informed(conversation, hashing)
                for start in range(0, len(hashes), MAX_DATA_BYTES):
                    await conversation.send(Hashes(hashes[start : start + MAX_DATA_BYTES]))
            case GivePiece():
                model = await _keep_informed(conversation, self._file(catalog, question.digest))
                await self._send_piece(conversation, model, question.number)

    async def _send_piece(self, conversation: Conversation, model: Model, number: int) -> None:
        if number >= partial_file.count(model.size):
            raise _Refusal(f"the model has no piece {number}")
        start = number * partial_file.PIECE_BYTES
        end = start + partial_file.length(number, model.size)
        async with self._rate_limited(conversation) as limit:
            while start < end:
                size = min(MAX_DATA_BYTES, end - start)
                async with self._reads:
                    data = await asyncio.to_thread(partial_file.read, model, start, size)
                if limit is not None:
                    await limit.wait(size)
                await conversation.send(PieceData(data))
                start += size

    @asynccontextmanager
    async def _rate_limited(self, conversation: Conversation) -> AsyncIterator[_RateLimit | None]:
        """Wait, if there is a rate limit, until a piece may be sent."""
        if (self._rate_limit.rate if self._rate_limit else 0.0) != (rate := self._rate()):
            self._rate_limit = _RateLimit(rate) if rate else None
        if (limit := self._rate_limit) is None:
            yield None
            return
        acquiring = asyncio.create_task(limit.pieces.acquire())
        try:
            await _keep_informed(conversation, asyncio.shield(acquiring))
            yield limit
        finally:
            if not acquiring.cancel():
                limit.pieces.release()

    async def _find(self, catalog: Catalog, question: Find) -> tuple[str, Model]:
        """Return digest and model.  Raises _Refusal."""
        if question.digest:
            model = await self._by_digest(catalog, question.digest)
        else:
            try:
                model = catalog.find(question.model)
            except ModelNotFound as error:
                raise _Refusal(error.message) from None
            if model.is_fake:
                raise _Refusal(f"{model.id} is a model without a file")
        if model.parts and not question.parts:
            raise _Refusal(
                f"{model.id} is in {len(model.parts)} files, which your version of Pinaivu Box "
                "cannot copy: update it"
            )
        if any(file.size > MAX_FILE_BYTES for file in model.files):
            raise _Refusal(f"{model.id} is larger than a file that can be copied")
        return await self._digest(model), model

    async def _parts(self, model: Model) -> tuple[File, ...]:
        """Return the files of a model that has several."""
        if not model.parts:
            return ()
        return tuple([File(await self._digest(file), file.size) for file in model.files])

    async def _by_digest(self, catalog: Catalog, beginning: str) -> Model:
        """Return the model whose digest begins so.  Raises _Refusal."""
        return await self._first(self._ordered(catalog, beginning), beginning)

    async def _file(self, catalog: Catalog, digest: str) -> Model:
        """Return a file of a model, by its own digest.  Raises _Refusal."""
        ordered = self._ordered(catalog, digest)
        return await self._first([file for model in ordered for file in model.files], digest)

    def _ordered(self, catalog: Catalog, beginning: str) -> list[Model]:
        """Return the models, first the one that had the digest before."""
        known = self._model_of.get(beginning)
        models = [model for model in catalog.models if not model.is_fake]
        return sorted(models, key=lambda model: model.id != known)

    async def _first(self, models: list[Model], beginning: str) -> Model:
        """Return the first of the models whose digest begins so.  Raises _Refusal."""
        for model in models:
            try:
                digest = await self._digest(model)
            except OSError:  # deleted meanwhile; the others may not be
                continue
            if digest.startswith(beginning):
                self._model_of[digest] = model.id
                return model
        raise _Refusal(f"this box has no model with the digest {beginning[:_NAMED_DIGITS]}")

    async def _digest(self, model: Model) -> str:
        async with self._hashing:  # two questions at once must not read a large file twice
            return await file_store.digest(self._database, model)

    async def _hashes(self, model: Model, digest: str) -> bytes:
        async with self._hashing:
            return await file_store.hashes(self._database, model, digest)


async def _keep_informed(conversation: Conversation, work: Awaitable[T]) -> T:
    """Return the result of some work; the peer hears meanwhile that it takes time."""
    return await conversation.wait_for(work, Working(), WORKING_SECONDS)
