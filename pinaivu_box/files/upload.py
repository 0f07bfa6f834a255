"""Sends members the model files of this box's catalog, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from msgspec import UNSET, UnsetType

from pinaivu_box.errors import LinkLost, ModelNotFound
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.store import Digests
from pinaivu_box.models import partial_file
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream

MAX_CONVERSATIONS = 8  # of one peer at a time
MAX_DISK_READS = 4  # at a time
IDLE_SECONDS = 60.0  # without a question
_MAX_PIECES = 10_000  # that are sent at a time
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
        count = min(rate * _PIECE_SECONDS / partial_file.PIECE_BYTES, _MAX_PIECES)
        self.pieces = asyncio.Semaphore(max(1, int(count)))
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
        digests: Digests,
        rate: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`shared` returns what a peer may copy now, or in a sentence why nothing; `rate` how many
        bytes a second all peers get together, 0 for no limit."""
        self._shared, self._rate = shared, rate
        self._rate_limit = _RateLimit(math.inf)
        self._digests = digests
        self._conversations: Counter[str] = Counter()
        self._reads = asyncio.Semaphore(MAX_DISK_READS)

    async def serve(self, peer: str, stream: Stream) -> None:
        """Serve one conversation.  Raises ProtocolError if the peer sends what no box sends."""
        self._conversations[peer] += 1
        conversation = Conversation(peer, stream, file_wire.questions, receive_seconds=IDLE_SECONDS)
        try:
            async with conversation:
                if self._conversations[peer] > MAX_CONVERSATIONS:
                    busy = "this box sends no peer more files at a time"
                    await conversation.send(file_wire.FileRefused(busy))
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
                await conversation.send(
                    file_wire.FileRefused(str(refusal)[:_MAX_REASON_CHARACTERS])
                )
            except OSError as error:
                log.warning("a model could not be sent to a peer: %s", error)
                await conversation.send(file_wire.FileRefused("this box cannot read its file"))

    async def _answer(
        self, conversation: Conversation, question: file_wire.Question, catalog: Catalog
    ) -> None:
        match question:
            case file_wire.Find():
                finding = self._find(catalog, question)
                await conversation.send(await _keep_informed(conversation, finding))
            case file_wire.List():
                model = await _keep_informed(conversation, self._file(catalog, question.digest))
                hashing = self._digests.hashes(model, question.digest)
                hashes = await _keep_informed(conversation, hashing)
                for start in range(0, len(hashes), file_wire.MAX_DATA_BYTES):
                    await conversation.send(
                        file_wire.Hashes(hashes[start : start + file_wire.MAX_DATA_BYTES])
                    )
            case file_wire.GivePiece():
                model = await _keep_informed(conversation, self._file(catalog, question.digest))
                await self._send_piece(conversation, model, question.number)

    async def _send_piece(self, conversation: Conversation, model: Model, number: int) -> None:
        if number >= partial_file.count(model.size):
            raise _Refusal(f"the model has no piece {number}")
        start = number * partial_file.PIECE_BYTES
        end = start + partial_file.length(number, model.size)
        async with self._rate_limited(conversation) as limit:
            while start < end:
                size = min(file_wire.MAX_DATA_BYTES, end - start)
                async with self._reads:
                    data = await asyncio.to_thread(partial_file.read, model, start, size)
                await limit.wait(size)
                await conversation.send(file_wire.PieceData(data))
                start += size

    @asynccontextmanager
    async def _rate_limited(self, conversation: Conversation) -> AsyncIterator[_RateLimit]:
        """Wait until a piece may be sent."""
        rate = self._rate() or math.inf
        if rate != self._rate_limit.rate:
            self._rate_limit = _RateLimit(rate)
        limit = self._rate_limit
        acquiring = asyncio.create_task(limit.pieces.acquire())
        try:
            await _keep_informed(conversation, asyncio.shield(acquiring))
            yield limit
        finally:
            if not acquiring.cancel():
                limit.pieces.release()

    async def _find(self, catalog: Catalog, question: file_wire.Find) -> file_wire.ModelAvailable:
        """Raises _Refusal."""
        if question.digest:
            model = await self._with_digest(catalog.models, question.digest)
        else:
            try:
                model = catalog.find(question.model)
            except ModelNotFound as error:
                raise _Refusal(error.message) from None
            if model.is_fake:
                raise _Refusal(f"{model.id} is a model without a file")
        if model.adapters:
            raise _Refusal(
                f"{model.id} is a model with adapters, which cannot be copied as one: copy the "
                "model that it is made of, and ask its operator for the adapters"
            )
        if model.parts and not question.parts:
            raise _Refusal(
                f"{model.id} is in {len(model.parts)} files, which your version of Pinaivu Box "
                "cannot copy: update it"
            )
        if any(file.size > file_wire.MAX_FILE_BYTES for file in model.files):
            raise _Refusal(f"{model.id} is larger than a file that can be copied")
        digest = await self._digests.of(model)
        return file_wire.ModelAvailable(
            question.model,
            digest,
            model.size,
            await self._parts(model),
            await self._projector(model),
        )

    async def _projector(self, model: Model) -> file_wire.File | UnsetType:
        if (file := model.projector_file) is None or file.size > file_wire.MAX_FILE_BYTES:
            return UNSET
        with suppress(OSError):  # it is gone: the model is one without
            return file_wire.File(await self._digests.of(file), file.size)
        return UNSET

    async def _parts(self, model: Model) -> tuple[file_wire.File, ...]:
        """Return the files of a model that has several."""
        if not model.parts:
            return ()
        return tuple(
            [file_wire.File(await self._digests.of(file), file.size) for file in model.files]
        )

    async def _file(self, catalog: Catalog, digest: str) -> Model:
        """Return a file of a model, or its projector, by its own digest.  Raises _Refusal."""
        whole = [model for model in catalog.models if not model.adapters]
        files = [file for model in whole for file in model.files]
        projectors = [file for model in whole if (file := model.projector_file) is not None]
        return await self._with_digest([*files, *projectors], digest)

    async def _with_digest(self, models: list[Model], beginning: str) -> Model:
        """Return the first of the models whose digest begins so.  Raises _Refusal."""
        for model in models:
            if model.is_fake:
                continue
            with suppress(OSError):  # deleted meanwhile; the others may not be
                if (await self._digests.of(model)).startswith(beginning):
                    return model
        raise _Refusal(f"this box has no model with the digest {beginning[:_NAMED_DIGITS]}")


async def _keep_informed(conversation: Conversation, work: Awaitable[T]) -> T:
    """Return the result of some work; the peer hears meanwhile that it takes time."""
    return await conversation.wait_for(work, file_wire.Working(), file_wire.WORKING_SECONDS)
