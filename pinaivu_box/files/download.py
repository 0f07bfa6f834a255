"""Downloads a model file from other boxes: from several at once, piece by piece, each verified.

Each source sends a list of the pieces' hashes.  A list is verified only by the digest of the whole
file at the end: so sources whose lists differ are never mixed, and the list that most of them send
is tried first.  If the file is not the one that was asked for, its sources are left out and the
next list is tried, with whatever pieces the two have in common.  Within one list a wrong piece is
detected at once, and its source is left out.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import UNSET

from pinaivu_box.errors import CopyFailed, PeeringError
from pinaivu_box.files import wire as file_wire
from pinaivu_box.models import partial_file
from pinaivu_box.models.partial_file import HASH_BYTES, CopyInProgress, NoRoom, PartialFile
from pinaivu_box.models.projectors import name_for
from pinaivu_box.models.regular_files import sha256
from pinaivu_box.models.splits import digest_of_parts, names
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
) -> tuple[dict[DownloadSource, file_wire.ModelAvailable], dict[DownloadSource, str]]:
    """Ask sources for a model; `digest` may be the beginning of one, or empty.

    Returns what those that have it offer, and why the others do not.  Raises CopyFailed if none has
    it, or if it is not the same file everywhere.
    """
    offers: dict[DownloadSource, file_wire.ModelAvailable] = {}
    without: dict[DownloadSource, str] = {}

    async def ask(source: DownloadSource) -> None:
        try:
            async with _conversation(open_stream, source) as conversation:
                async with asyncio.timeout(ANSWER_SECONDS):
                    question = file_wire.Find(model, digest, parts=True)
                    offer = await conversation.call(question, file_wire.ModelAvailable)
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


def _describe_files(offers: dict[DownloadSource, file_wire.ModelAvailable]) -> str:
    sizes, sources = dict[str, int](), defaultdict[str, list[DownloadSource]](list)
    for source, offer in offers.items():
        sizes[offer.digest] = offer.size
        sources[offer.digest].append(source)
    return "; ".join(
        f"{digest[:_NAMED_DIGITS]} ({size / 1e6:,.0f} MB) on {_names(sources[digest])}"
        for digest, size in sorted(sizes.items())
    )


def _parts_match(offer: file_wire.ModelAvailable) -> bool:
    """Whether its parts are those that its digest is computed of."""
    digests = [part.digest for part in offer.parts]
    return (
        len(set(digests)) == len(digests)
        and digest_of_parts(digests) == offer.digest
        and sum(part.size for part in offer.parts) == offer.size
    )


class Download:
    """The download of a model, whose files come one after the other.  They get their names when all
    of them are here, so the folder never has half a set.

    `sent` counts bytes by source, and `left_out` has the sources that cannot be used, and why.
    `files` are those that were downloaded: name, digest and hashes of the pieces; one of them is
    the `projector`, if there is one.  Once it is `finishing` it must not be cancelled.
    """

    def __init__(
        self,
        open_stream: Open,
        offers: dict[DownloadSource, file_wire.ModelAvailable],
        folder: Path,
        name: str,
    ) -> None:
        """`offers` is what `find` has returned, `name` that of the model in the folder, which may
        not exist yet."""
        offer = next(iter(offers.values()))
        file_names = names(name, max(1, len(offer.parts)))
        self.projector: Path | None = None
        self.digest, self.sources = offer.digest, list(offers)
        self.sent: Counter[DownloadSource] = Counter()
        self.left_out: dict[DownloadSource, str] = {}
        self.files: list[tuple[Path, str, bytes]] = []
        self.finishing = False
        self._folder = folder
        self._parts = [
            _FileDownload(
                open_stream,
                {source: offer.files[number] for source, offer in offers.items()},
                target,
                self.sent,
                self.left_out,
            )
            for number, target in enumerate(folder / each for each in file_names)
        ]
        projector = Counter(each.projector for each in offers.values()).most_common(1)[0][0]
        if projector is not UNSET:
            with_it = {
                source: projector for source, each in offers.items() if each.projector == projector
            }
            self.projector = folder / name_for(Path(file_names[0]))
            # It is there when the model is seen.
            self._parts.insert(
                0,
                _FileDownload(open_stream, with_it, self.projector, self.sent, self.left_out),
            )

    @property
    def size(self) -> int:
        return sum(part.size for part in self._parts)

    @property
    def bytes(self) -> int:
        """How many of them are here."""
        return sum(part.bytes for part in self._parts)

    @property
    def checking(self) -> bool:
        """Whether files are read that are here, and nothing is received."""
        return self.finishing or any(part.checking for part in self._parts)

    async def run(self) -> None:
        """Download it.  Raises CopyFailed; what has come is kept for another attempt."""
        try:
            with partial_file.claimed(self._folder, self.digest):
                missing = [part for part in self._parts if not await part.is_here()]
                sizes = [(part.digest, part.size) for part in missing]
                await asyncio.to_thread(partial_file.check_room, self._folder, sizes)
                for part in missing:
                    await part.run()
                    self.files.append((part.target, part.digest, part.hashes))
                self.finishing = True
                for target, digest, _ in self.files:
                    await asyncio.to_thread(partial_file.publish, self._folder, digest, target)
        except OSError as error:
            raise _disk_error(error, self._folder) from error


class _FileDownload:
    """The download of one file to `target`; `sent` and `left_out` are those of the whole."""

    def __init__(
        self,
        open_stream: Open,
        offers: dict[DownloadSource, file_wire.File],
        target: Path,
        sent: Counter[DownloadSource],
        left_out: dict[DownloadSource, str],
    ) -> None:
        # The digest is the same in all of them, and who is wrong about the size is left out.
        ((file, _),) = Counter(offers.values()).most_common(1)
        self.digest, self.size = file.digest, file.size
        self.target, self.sent, self.left_out = target, sent, left_out
        self.hashes = b""
        self.bytes = 0
        self.checking = False
        self._open, self._offers = open_stream, offers
        self._partial: PartialFile
        self._pending: asyncio.Queue[int]

    async def is_here(self) -> bool:
        """Whether the folder has it already.  Raises OSError; FileExistsError if another file has
        that name."""
        if not self.target.exists():
            return False
        self.checking = True
        if await asyncio.to_thread(sha256, self.target) != self.digest:
            raise FileExistsError(f"{self.target} exists already")
        self.bytes, self.checking = self.size, False
        return True

    async def run(self) -> None:
        """Download it; it has no name yet.  Raises CopyFailed, OSError."""
        groups = await self._sources_by_list()
        failure = CopyFailed(f"No source is left{_because(self.left_out)}.")
        for size, hashes, sources in groups:
            self.size, self.hashes = size, hashes
            try:
                verified = await self._download_from(sources)
            except CopyFailed as error:
                failure = error
                continue
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

        async def ask(source: DownloadSource, size: int) -> None:
            try:
                hashes = await self._request_hashes(source, size)
            except (PeeringError, TimeoutError, _SourceUnusable) as error:
                self.left_out[source] = _reason(error)
            else:
                lists.setdefault((size, hashes), []).append(source)

        # A source that is left out for one file is not asked for the others.
        asked = [source for source in self._offers if source not in self.left_out]
        await asyncio.gather(*(ask(source, self._offers[source].size) for source in asked))
        by_count = sorted(lists.items(), key=lambda item: -len(item[1]))
        return [(size, hashes, sources) for (size, hashes), sources in by_count]

    async def _request_hashes(self, source: DownloadSource, file_size: int) -> bytes:
        size = partial_file.count(file_size) * HASH_BYTES
        async with _conversation(self._open, source) as conversation:
            async with asyncio.timeout(ANSWER_SECONDS):
                hashes = await _receive(
                    conversation, file_wire.List(self.digest), file_wire.Hashes, size
                )
        if len(hashes) != size:
            raise _SourceUnusable("its list of pieces does not fit the size")
        return hashes

    async def _download_from(self, sources: list[DownloadSource]) -> bool:
        """Download from sources with the same list; returns whether the file is the one that was
        asked for.  Raises CopyFailed, OSError."""
        self._partial = await asyncio.to_thread(
            PartialFile, self.target.parent, self.digest, self.size, self.hashes
        )
        try:
            self.checking, self.bytes = True, 0
            missing = await asyncio.to_thread(self._partial.missing)
            lengths = (partial_file.length(number, self.size) for number in missing)
            self.bytes = self.size - sum(lengths)
            self.checking = False
            await self._fetch(sources, missing)
            self.checking = True
            verified = await asyncio.to_thread(self._partial.is_right)
            if verified:
                await asyncio.to_thread(self._partial.sync)
            return verified
        finally:
            self.checking = False
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
                size = partial_file.length(number, self.size)
                question = file_wire.GivePiece(self.digest, number)
                data = await _receive(conversation, question, file_wire.PieceData, size)
            if len(data) > size:
                raise _SourceUnusable(f"it sent more than piece {number}")
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


async def _receive(
    conversation: Conversation,
    question: file_wire.List | file_wire.GivePiece,
    kind: type[file_wire.Hashes | file_wire.PieceData],
    size: int,
) -> bytes:
    """Return what is answered, in one message or more, until it has that size."""
    data = bytearray((await conversation.call(question, kind)).data)
    while len(data) < size:
        data += (await conversation.expect(kind)).data
    return bytes(data)


def _disk_error(error: OSError, folder: Path) -> CopyFailed:
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
        rejection=file_wire.FileRefused,
        keepalive=file_wire.Working,
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
