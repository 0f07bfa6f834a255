"""Downloads a model file from other boxes: from several at once, piece by piece, each verified.

Each source sends a list of the pieces' hashes.  A list is verified only by the digest of the whole
file at the end: so sources whose lists differ are never mixed, and the list that most of them send
is tried first.  If the file is not the one that was asked for, its sources are left out and the
next list is tried, with whatever pieces the two have in common.  Within one list a wrong piece is
detected at once, and its source is left out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from pinaivu_box.errors import CopyFailed, PeeringError
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.wire import (
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
from pinaivu_box.models.partial_file import HASH_BYTES, CopyInProgress, NoRoom, PartialFile
from pinaivu_box.models.regular_files import sha256
from pinaivu_box.models.splits import PartName, digest_of_parts
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream, RequestRejected, UnexpectedMessage

MAX_SOURCES = 16
STREAMS_PER_SOURCE = 2  # while one waits for an answer, the other receives
STALL_SECONDS = 30.0  # without a frame
ANSWER_SECONDS = 600.0  # for a question whose answer is not a piece
PIECE_SECONDS = 120.0
MAX_FAILURES = 3  # in a row
_NAMED_DIGITS = 12  # of a digest, in sentences

Open = Callable[[str], Awaitable[Stream]]
Conversation = MessageStream[file_wire.Question, file_wire.Answer]


@dataclass(frozen=True)
class DownloadSource:
    """`peer` is its node id, `name` what this box calls it."""

    peer: str
    name: str


class WrongFile(CopyFailed):
    """All pieces have come, and they are not the file that was asked for."""


class _SourceUnusable(Exception):
    """The source cannot be used; says why."""


async def find(
    open_stream: Open, sources: Iterable[DownloadSource], model: str, digest: str
) -> tuple[dict[DownloadSource, ModelAvailable], dict[DownloadSource, str]]:
    """Ask sources for a model; `digest` may be the beginning of one, or empty.

    Returns what those that have it offer, and why the others do not.  Raises CopyFailed if none has
    it, or if it is not the same file everywhere.
    """
    offers: dict[DownloadSource, ModelAvailable] = {}
    without: dict[DownloadSource, str] = {}

    async def ask(source: DownloadSource) -> None:
        try:
            async with _conversation(open_stream, source) as conversation:
                async with asyncio.timeout(ANSWER_SECONDS):
                    question = Find(model, digest, parts=True)
                    offer = await conversation.call(question, ModelAvailable)
                if not offer.digest.startswith(digest):
                    raise _SourceUnusable("it offers another file than it was asked for")
                if offer.parts and not _parts_match(offer):
                    raise _SourceUnusable("the files that it offers are not those of the digest")
                offers[source] = offer
        except (PeeringError, TimeoutError, _SourceUnusable) as error:
            without[source] = _reason(error)

    await asyncio.gather(*(ask(source) for source in list(sources)[:MAX_SOURCES]))
    # The digest of a model in several files is of their digests: no single file has it.
    split = {offer.digest for offer in offers.values() if offer.parts}
    for source, offer in list(offers.items()):
        if offer.digest in split and not offer.parts:
            del offers[source]
            without[source] = "it describes another file than the digest says"
    if not offers:
        raise CopyFailed(f"No peer provides {model}{_because(without)}.")
    if len({offer.digest for offer in offers.values()}) > 1:
        raise CopyFailed(
            f"{model} is not the same file everywhere: choose one with --digest.  It is "
            f"{_describe_files(offers)}."
        )
    return offers, without


def _describe_files(offers: dict[DownloadSource, ModelAvailable]) -> str:
    by_digest = groupby(
        sorted(offers.items(), key=lambda item: item[1].digest), key=lambda item: item[1].digest
    )
    descriptions = []
    for digest, group in by_digest:
        items = list(group)
        megabytes, names = items[0][1].size / 1e6, _names(source for source, _ in items)
        descriptions.append(f"{digest[:_NAMED_DIGITS]} ({megabytes:,.0f} MB) on {names}")
    return "; ".join(descriptions)


def _parts_match(offer: ModelAvailable) -> bool:
    """Whether its parts are those that its digest is computed of."""
    digests = [part.digest for part in offer.parts]
    return (
        len(set(digests)) == len(digests)
        and digest_of_parts(digests) == offer.digest
        and sum(part.size for part in offer.parts) == offer.size
    )


class DownloadProgress(Protocol):
    """A download as its caller sees it: `bytes` of `size` are here, `sent` counts them by source,
    and `left_out` are the sources that cannot be used, and why.  Once it is `finishing` it must not
    be cancelled.  `files` are those that it has written: name, digest and hashes of the pieces."""

    digest: str
    left_out: dict[DownloadSource, str]

    @property
    def size(self) -> int: ...

    @property
    def checking(self) -> bool: ...

    @property
    def finishing(self) -> bool: ...

    @property
    def sent(self) -> Counter[DownloadSource]: ...

    @property
    def sources(self) -> list[DownloadSource]: ...

    @property
    def files(self) -> list[tuple[Path, str, bytes]]: ...

    @property
    def bytes(self) -> int: ...

    async def run(self) -> None:
        """Download it.  Raises CopyFailed; what has come is kept for another attempt."""


def copy_of(
    open_stream: Open, offers: dict[DownloadSource, ModelAvailable], folder: Path, name: str
) -> Download | MultiFileDownload:
    """Return the download of what `find` has returned, as the model `name` in a folder, which may
    not exist yet."""
    if next(iter(offers.values())).parts:
        return MultiFileDownload(open_stream, offers, folder, name)
    return Download(open_stream, offers, folder / f"{name}.gguf")


class Download:
    """The download of one file; see `DownloadProgress`."""

    def __init__(
        self,
        open_stream: Open,
        offers: dict[DownloadSource, ModelAvailable],
        target: Path,
        *,
        named_later: bool = False,
    ) -> None:
        """`target` is the file's path; its folder may not exist yet.  With `named_later` the file
        stays among the partial ones, until `models.partial_file.publish` gives it its name."""
        self._open = open_stream
        offer = next(iter(offers.values()))
        self.digest, self.size = offer.digest, offer.size
        self._offers = offers
        self._target = target
        self._named_later = named_later
        self.bytes = 0
        self.checking = self.finishing = False
        self.sent: Counter[DownloadSource] = Counter()
        self.left_out: dict[DownloadSource, str] = {}
        self.hashes = b""
        self._partial: PartialFile
        self._pending: asyncio.Queue[int]

    @property
    def sources(self) -> list[DownloadSource]:
        return list(self._offers)

    @property
    def files(self) -> list[tuple[Path, str, bytes]]:
        return [(self._target, self.digest, self.hashes)]

    async def run(self) -> None:
        """Download it.  Raises CopyFailed; what has come is kept for another attempt."""
        groups = await self._sources_by_list()
        failure = CopyFailed(f"No source is left{_because(self.left_out)}.")
        for size, hashes, sources in groups:
            self.size, self.hashes = size, hashes
            try:
                verified = await self._download_from(sources)
            except CopyFailed as error:
                failure = error
                continue
            except OSError as error:
                raise _disk_error(error, self._target) from error
            if verified:
                others = {source for _, _, group in groups for source in group} - set(sources)
                wrong = "it describes another file than the digest says"
                self.left_out.update(dict.fromkeys(others - set(self.left_out), wrong))
                return
            self.left_out.update(dict.fromkeys(sources, "what it sent is another file"))
            failure = WrongFile(
                f"What {_names(sources)} sent is another file than the digest "
                f"{self.digest[:_NAMED_DIGITS]} says: it was discarded."
            )
        if isinstance(failure, WrongFile):
            self._partial.discard()
        raise failure

    async def _sources_by_list(self) -> list[tuple[int, bytes, list[DownloadSource]]]:
        """Return each size and list of hashes with its sources, those of most sources first."""
        lists: dict[tuple[int, bytes], list[DownloadSource]] = {}

        async def ask(source: DownloadSource, offer: ModelAvailable) -> None:
            try:
                hashes = await self._request_hashes(source, offer)
            except (PeeringError, TimeoutError, _SourceUnusable) as error:
                self.left_out[source] = _reason(error)
            else:
                lists.setdefault((offer.size, hashes), []).append(source)

        await asyncio.gather(*(ask(*item) for item in self._offers.items()))
        by_count = sorted(lists.items(), key=lambda item: -len(item[1]))
        return [(size, hashes, sources) for (size, hashes), sources in by_count]

    async def _request_hashes(self, source: DownloadSource, offer: ModelAvailable) -> bytes:
        size = partial_file.count(offer.size) * HASH_BYTES
        hashes = bytearray()
        async with _conversation(self._open, source) as conversation:
            async with asyncio.timeout(ANSWER_SECONDS):
                hashes += (await conversation.call(List(offer.digest), Hashes)).data
                while len(hashes) < size:
                    hashes += (await conversation.expect(Hashes)).data
        if len(hashes) != size:
            raise _SourceUnusable("its list of pieces does not fit the size")
        return bytes(hashes)

    async def _download_from(self, sources: list[DownloadSource]) -> bool:
        """Download from sources with the same list; returns whether the file is the one that was
        asked for.  Raises CopyFailed, OSError."""
        self._partial = await asyncio.to_thread(
            PartialFile, self._target.parent, self.digest, self.size, self.hashes
        )
        try:
            self.checking, self.bytes = True, 0
            missing = await asyncio.to_thread(self._partial.missing)
            lengths = (partial_file.length(number, self.size) for number in missing)
            self.bytes = self.size - sum(lengths)
            self.checking = False
            await self._fetch(sources, missing)
            self.checking = True
            if not await asyncio.to_thread(self._partial.is_right):
                return False
            self.finishing = not self._named_later
            target = None if self._named_later else self._target
            await asyncio.to_thread(self._partial.finish, target)
            return True
        finally:
            self._partial.close()

    async def _fetch(self, sources: list[DownloadSource], missing: list[int]) -> None:
        self._pending = asyncio.Queue()
        for number in missing:
            self._pending.put_nowait(number)
        all_received = asyncio.create_task(self._pending.join())
        workers = [
            asyncio.create_task(self._fetch_from(source))
            for source in sources
            for _ in range(STREAMS_PER_SOURCE)
        ]
        no_source_left = asyncio.gather(*workers)
        outcomes: list[asyncio.Future[Any]] = [all_received, no_source_left]
        try:
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
            if not all_received.done():
                no_source_left.result()  # raises an error of the disk
                percent = 100 * self.bytes // self.size
                raise CopyFailed(
                    f"The copy stopped at {percent} %, no source is left{_because(self.left_out)}. "
                    "What has come is kept: pull again to go on."
                )
        finally:
            for task in (all_received, *workers):
                task.cancel()
            await asyncio.gather(*outcomes, *workers, return_exceptions=True)

    async def _fetch_from(self, source: DownloadSource) -> None:
        """Fetch pieces from a source until it is left out, or cancelled.  Raises OSError."""
        failures = 0
        while source not in self.left_out:
            before = self.sent[source]
            try:
                async with _conversation(self._open, source) as conversation:
                    while source not in self.left_out:
                        await self._fetch_piece(conversation, source)
            except (RequestRejected, UnexpectedMessage, _SourceUnusable) as error:
                self.left_out.setdefault(source, _reason(error))
            except (PeeringError, TimeoutError) as error:
                failures = 1 if self.sent[source] > before else failures + 1
                if failures == MAX_FAILURES:
                    self.left_out.setdefault(source, _reason(error))
                else:
                    await asyncio.sleep(failures)

    async def _fetch_piece(self, conversation: Conversation, source: DownloadSource) -> None:
        number = await self._pending.get()
        try:
            async with asyncio.timeout(PIECE_SECONDS):
                data = await self._receive_piece(conversation, number)
            if not await asyncio.to_thread(self._partial.put, number, data):
                raise _SourceUnusable(f"it sent a wrong piece {number}")
        except BaseException:
            self._pending.put_nowait(number)  # for another source
            raise
        else:
            self.bytes += len(data)
            self.sent[source] += len(data)
        finally:
            self._pending.task_done()

    async def _receive_piece(self, conversation: Conversation, number: int) -> bytes:
        size = partial_file.length(number, self.size)
        question = GivePiece(self.digest, number)
        data = bytearray((await conversation.call(question, PieceData)).data)
        while len(data) < size:
            data += (await conversation.expect(PieceData)).data
        if len(data) > size:
            raise _SourceUnusable(f"it sent more than piece {number}")
        return bytes(data)


class MultiFileDownload:
    """The download of a model in several files, one after the other; see `DownloadProgress`.  They
    get their names when all of them are here, so the folder never has half a set."""

    def __init__(
        self,
        open_stream: Open,
        offers: dict[DownloadSource, ModelAvailable],
        folder: Path,
        name: str,
    ) -> None:
        offer = next(iter(offers.values()))
        self.digest, self.size, self._parts = offer.digest, offer.size, offer.parts
        self._open, self._offers, self._folder = open_stream, offers, folder
        names = PartName(name, 1, len(offer.parts), ".gguf").all_parts
        self._targets = [folder / part for part in names]
        self.left_out: dict[DownloadSource, str] = {}
        self.files: list[tuple[Path, str, bytes]] = []
        self.finishing = False
        self._finished_bytes, self._sent = 0, Counter[DownloadSource]()
        self._current: Download | None = None

    @property
    def sources(self) -> list[DownloadSource]:
        return list(self._offers)

    @property
    def bytes(self) -> int:
        return self._finished_bytes + (self._current.bytes if self._current else 0)

    @property
    def sent(self) -> Counter[DownloadSource]:
        return self._sent + (self._current.sent if self._current else Counter())

    @property
    def checking(self) -> bool:
        return self._current is None or self._current.checking

    async def run(self) -> None:
        """Download it.  Raises CopyFailed; what has come is kept for another attempt."""
        try:
            with partial_file.claimed(self._folder, self.digest):
                await self._check_folder()
                for number in range(len(self._parts)):
                    if not self._targets[number].exists():
                        await self._download_part(number)
                self.finishing = True
                for part, target in zip(self._parts, self._targets, strict=True):
                    if not target.exists():
                        await asyncio.to_thread(
                            partial_file.publish, self._folder, part.digest, target
                        )
        except OSError as error:
            raise _disk_error(error, self._targets[0]) from error

    async def _check_folder(self) -> None:
        """Check before the download which files are there already, and that there is room for the
        others.  Raises OSError; FileExistsError if another file has such a name."""
        missing: list[tuple[str, int]] = []
        for part, target in zip(self._parts, self._targets, strict=True):
            if not target.exists():
                missing.append((part.digest, part.size))
            elif await asyncio.to_thread(sha256, target) != part.digest:
                raise FileExistsError(f"{target} exists already")
            else:
                self._finished_bytes += part.size
        await asyncio.to_thread(partial_file.check_room, self._folder, missing)

    async def _download_part(self, number: int) -> None:
        """Raises CopyFailed."""
        part, target = self._parts[number], self._targets[number]
        offers = {
            source: ModelAvailable(offer.model, part.digest, offer.parts[number].size)
            for source, offer in self._offers.items()
            if source not in self.left_out
        }
        if not offers:
            raise CopyFailed(f"No source is left{_because(self.left_out)}.")
        self._current = download = Download(self._open, offers, target, named_later=True)
        try:
            await download.run()
        finally:
            # A source that is left out for one file is not asked for the others.
            self.left_out |= download.left_out
            self._current = None
            self._sent += download.sent
            self._finished_bytes += download.bytes
        self.files.append((target, part.digest, download.hashes))


def _disk_error(error: OSError, target: Path) -> CopyFailed:
    folder = target.parent
    match error:
        case CopyInProgress():
            return CopyFailed("This model is being copied to this box already.")
        case NoRoom():
            return CopyFailed(f"The disk of {folder} has no room for the model: {error}.")
        case FileExistsError():
            return CopyFailed(f"{error}: choose another name (--as).")
    reason = error.strerror or error
    return CopyFailed(f"The model cannot be written to {folder}: {reason}.")


@asynccontextmanager
async def _conversation(open_stream: Open, source: DownloadSource) -> AsyncIterator[Conversation]:
    stream = await open_stream(source.peer)
    conversation = Conversation(
        source.peer,
        stream,
        file_wire.answers,
        receive_seconds=STALL_SECONDS,
        rejection=FileRefused,
        keepalive=Working,
    )
    async with conversation:
        yield conversation


def _reason(error: Exception) -> str:
    """Return why a source is not used, as the end of a sentence."""
    if isinstance(error, TimeoutError):
        return "it is silent or too slow"
    if isinstance(error, RequestRejected):
        return error.reason.rstrip(".")
    return str(error).rstrip(".")


def _names(sources: Iterable[DownloadSource]) -> str:
    return ", ".join(sorted(source.name for source in sources))


def _because(reasons: dict[DownloadSource, str]) -> str:
    """Return ` (anna: ...; ben: ...)`, or nothing if there are no reasons."""
    sentences = "; ".join(f"{source.name}: {why}" for source, why in reasons.items())
    return f" ({sentences})" if sentences else ""
