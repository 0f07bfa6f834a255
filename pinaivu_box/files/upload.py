"""Gives members the model files of this box's catalog, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from msgspec import Struct

from pinaivu_box.errors import LinkLost, ModelNotFound
from pinaivu_box.files import store as file_store
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.wire import (
    MAX_FILE_BYTES,
    PART_BYTES,
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
from pinaivu_box.transport.transport import Stream

MAX_CONVERSATIONS = 8  # of one peer at a time
MAX_READS = 4  # of the disk at a time
IDLE_SECONDS = 60.0  # without a question
_PIECE_SECONDS = 60.0  # that a piece may take under a limit; who asks for it waits twice as long

_now, _sleep = time.monotonic, asyncio.sleep

T = TypeVar("T")
log = logging.getLogger(__name__)


class _Refusal(Exception):
    """A sentence for who asked."""


class _UploadQueue:
    """`rate` bytes a second that all copies share, part by part in turns, and only so many pieces
    at a time as go out in `_PIECE_SECONDS`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        pieces = int(rate * _PIECE_SECONDS / partial_file.PIECE_BYTES)
        self.places = asyncio.Semaphore(max(1, pieces))
        self._free_at = 0.0

    async def wait(self, size: int) -> None:
        """Until so many bytes more may go out."""
        begin = max(_now(), self._free_at)
        self._free_at = begin + size / self.rate
        await _sleep(begin - _now())


class FileServer:
    """`shared` says what may be given to a peer now, or in a sentence why nothing is; `rate` how
    many bytes a second to all of them, 0 for no limit."""

    def __init__(
        self,
        shared: Callable[[str], Awaitable[Catalog | str]],
        database: Database,
        rate: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._shared, self._rate = shared, rate
        self._line: _UploadQueue | None = None
        self._database = database
        self._conversations: Counter[str] = Counter()
        self._reads = asyncio.Semaphore(MAX_READS)
        self._hashing = asyncio.Lock()
        self._found: dict[str, str] = {}  # digest -> the model to look at first

    async def serve(self, peer: str, stream: Stream) -> None:
        """One conversation.  Raises ProtocolError if the peer says what no box says."""
        self._conversations[peer] += 1
        try:
            if self._conversations[peer] > MAX_CONVERSATIONS:
                busy = "this box gives you as many files at a time as it gives anybody"
                await stream.send(wire.encode(FileRefused(busy)))
            else:
                await self._converse(peer, stream)
            await stream.finish()
        except (LinkLost, TimeoutError) as error:
            log.debug("a copy to %s has ended: %s", wire.short(peer), error)
            stream.abandon()
        except BaseException:
            stream.abandon()
            raise
        finally:
            self._conversations[peer] -= 1
            self._conversations += Counter()  # forgets who has none

    async def _converse(self, peer: str, stream: Stream) -> None:
        while (frame := await asyncio.wait_for(stream.receive(), IDLE_SECONDS)) is not None:
            question = file_wire.question(frame)
            try:
                if isinstance(catalog := await self._shared(peer), str):
                    raise _Refusal(catalog)
                await self._answer(stream, question, catalog)
            except _Refusal as refusal:
                await stream.send(wire.encode(FileRefused(str(refusal)[:500])))
            except OSError as error:
                log.warning("a model could not be given to a peer: %s", error)
                await stream.send(wire.encode(FileRefused("this box cannot read its file")))

    async def _answer(self, stream: Stream, question: file_wire.Question, catalog: Catalog) -> None:
        match question:
            case Find():
                digest, model = await _patiently(stream, self._find(catalog, question))
                parts = await _patiently(stream, self._parts(model))
                await _send(stream, ModelAvailable(question.model, digest, model.size, parts))
            case List():
                model = await _patiently(stream, self._file(catalog, question.digest))
                hashes = await _patiently(stream, self._hashes(model, question.digest))
                for begin in range(0, len(hashes), PART_BYTES):
                    await _send(stream, Hashes(hashes[begin : begin + PART_BYTES]))
            case GivePiece():
                model = await _patiently(stream, self._file(catalog, question.digest))
                await self._give(stream, model, question.number)

    async def _give(self, stream: Stream, model: Model, number: int) -> None:
        if number >= partial_file.count(model.size):
            raise _Refusal(f"the model has no piece {number}")
        begin = number * partial_file.PIECE_BYTES
        end = begin + partial_file.length(number, model.size)
        async with self._place(stream) as line:
            while begin < end:
                size = min(PART_BYTES, end - begin)
                async with self._reads:
                    data = await asyncio.to_thread(partial_file.read, model, begin, size)
                if line is not None:
                    await line.wait(size)
                await _send(stream, PieceData(data))
                begin += size

    @asynccontextmanager
    async def _place(self, stream: Stream) -> AsyncIterator[_UploadQueue | None]:
        """On the line, if there is a limit; who waits hears that it does."""
        if (self._line.rate if self._line else 0.0) != (rate := self._rate()):
            self._line = _UploadQueue(rate) if rate else None
        if (line := self._line) is None:
            yield None
            return
        taking = asyncio.create_task(line.places.acquire())
        try:
            await _patiently(stream, asyncio.shield(taking))
            yield line
        finally:
            if not taking.cancel():
                line.places.release()

    async def _find(self, catalog: Catalog, question: Find) -> tuple[str, Model]:
        """Digest and model.  Raises _Refusal."""
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
        """The files of a model that has several."""
        if not model.parts:
            return ()
        return tuple([File(await self._digest(file), file.size) for file in model.files])

    async def _by_digest(self, catalog: Catalog, beginning: str) -> Model:
        """The whole model.  Raises _Refusal."""
        return await self._first(self._ordered(catalog, beginning), beginning)

    async def _file(self, catalog: Catalog, digest: str) -> Model:
        """A file of a model, by its own digest.  Raises _Refusal."""
        ordered = self._ordered(catalog, digest)
        return await self._first([file for model in ordered for file in model.files], digest)

    def _ordered(self, catalog: Catalog, beginning: str) -> list[Model]:
        """First the model that had it before."""
        known = self._found.get(beginning)
        real = [model for model in catalog.models if not model.is_fake]
        return sorted(real, key=lambda model: model.id != known)

    async def _first(self, models: list[Model], beginning: str) -> Model:
        """Raises _Refusal."""
        for model in models:
            try:
                digest = await self._digest(model)
            except OSError:  # deleted since: others may be there
                continue
            if digest.startswith(beginning):
                self._found[digest] = model.id
                return model
        raise _Refusal(f"this box has no model with the digest {beginning[:12]}")

    async def _digest(self, model: Model) -> str:
        async with self._hashing:  # two who ask at once must not read a large file twice
            return await file_store.digest(self._database, model)

    async def _hashes(self, model: Model, digest: str) -> bytes:
        async with self._hashing:
            return await file_store.hashes(self._database, model, digest)


async def _send(stream: Stream, answer: Struct) -> None:
    await stream.send(wire.encode(answer))


async def _patiently(stream: Stream, work: Awaitable[T]) -> T:
    """Do it; who waits hears that it is being done."""
    doing = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({doing}, timeout=WORKING_SECONDS))[0]:
            await _send(stream, Working())
        return doing.result()
    finally:
        doing.cancel()
