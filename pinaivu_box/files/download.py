"""Copies a model file from other boxes: from several at once, piece by piece, checked as it comes.

Each source says which hash each piece has.  That list is trusted as far as the digest of the whole
confirms it in the end: sources whose lists differ are never mixed, the list that most of them give
is tried first, and if the whole is not what was asked for, those who gave it are left out and the
next list's turn comes, with whatever pieces the two have in common.  Within one list a wrong piece
is seen at once, and its source is left out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from pinaivu_box.errors import CopyFailed, LinkLost, PeeringError
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
from pinaivu_box.models.splits import PartName, digest_of_parts
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import Stream

MAX_SOURCES = 16
STREAMS = 2  # to each source: while one waits for an answer, the other receives
STALL_SECONDS = 30.0  # without a frame
ANSWER_SECONDS = 600.0  # for what needs only an answer
PIECE_SECONDS = 120.0
ATTEMPTS = 3  # that fail one after the other

A = TypeVar("A", bound=Struct)
Open = Callable[[str], Awaitable[Stream]]


@dataclass(frozen=True)
class DownloadSource:
    """`peer` is its node_id, `name` what to call it."""

    peer: str
    name: str


class WrongFile(CopyFailed):
    """All pieces came, and they are not the file that was asked for."""


class _SourceUnusable(Exception):
    """The source is of no use; says why."""


async def find(
    open_stream: Open, sources: Iterable[DownloadSource], model: str, digest: str
) -> tuple[dict[DownloadSource, ModelAvailable], dict[DownloadSource, str]]:
    """Who has the model, and of the others why not.

    `digest` may be the beginning of one, or empty.  Raises CopyFailed if nobody has it, or if it
    is not the same file everywhere.
    """
    found: dict[DownloadSource, ModelAvailable] = {}
    without: dict[DownloadSource, str] = {}

    async def ask(source: DownloadSource) -> None:
        try:
            async with _conversation(open_stream, source) as stream:
                async with asyncio.timeout(ANSWER_SECONDS):
                    have = await _ask(stream, Find(model, digest, parts=True), ModelAvailable)
                if not have.digest.startswith(digest):
                    raise _SourceUnusable("it offers another file than it was asked for")
                if have.parts and not _fits(have):
                    raise _SourceUnusable("the files that it offers are not those of the digest")
                found[source] = have
        except (PeeringError, TimeoutError, _SourceUnusable) as error:
            without[source] = _why(error)

    asked = list(sources)[:MAX_SOURCES]
    await asyncio.gather(*(ask(source) for source in asked))
    # The digest of a model in several files says so itself: no file has it.
    split = {have.digest for have in found.values() if have.parts}
    for source in [one for one, have in found.items() if have.digest in split and not have.parts]:
        del found[source]
        without[source] = "it describes another file than the digest says"
    if not found:
        raise CopyFailed(f"Nobody gives {model}{_because(without)}.")
    if len({have.digest for have in found.values()}) > 1:
        files = sorted(found.items(), key=lambda item: item[1].digest)
        told = "; ".join(
            f"{key[:12]} ({one[0][1].size / 1e6:,.0f} MB) on {_names(s for s, _ in one)}"
            for key, same in groupby(files, key=lambda item: item[1].digest)
            for one in [list(same)]
        )
        raise CopyFailed(
            f"{model} is not the same file everywhere: choose one with --digest.  It is {told}."
        )
    return found, without


def _fits(have: ModelAvailable) -> bool:
    """Whether its parts are those that its digest is made of."""
    digests = [part.digest for part in have.parts]
    return (
        len(set(digests)) == len(digests)
        and digest_of_parts(digests) == have.digest
        and sum(part.size for part in have.parts) == have.size
    )


class DownloadProgress(Protocol):
    """A copy, as who waits for it sees it: `bytes` of `size` are here, `sent` says from whom they
    came, and `left_out` which sources turned out to be of no use.  Once it is `finishing` it is not
    to be cancelled.  `files` are those that it has made: name, digest and hashes of the pieces."""

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
        """Raises CopyFailed; what is here then stays for another try."""


def copy_of(
    open_stream: Open, found: dict[DownloadSource, ModelAvailable], folder: Path, name: str
) -> Download | MultiFileDownload:
    """A copy of what `find` has found, as the model `name` in that folder, which may not be there
    yet."""
    have = next(iter(found.values()))
    if have.parts:
        return MultiFileDownload(open_stream, found, folder, name)
    return Download(open_stream, found, folder / f"{name}.gguf")


class Download:
    """One file on its way here; see `DownloadProgress`."""

    def __init__(
        self,
        open_stream: Open,
        found: dict[DownloadSource, ModelAvailable],
        target: Path,
        *,
        named_later: bool = False,
    ) -> None:
        """`target` is what the file will be called; its folder may not be there yet.  With
        `named_later` it stays where copies grow: `models.partial_file.settle` gives it its name."""
        self._open = open_stream
        have = next(iter(found.values()))
        self.digest, self.size = have.digest, have.size
        self._found = found
        self._target = target
        self._named_later = named_later
        self.bytes = 0
        self.checking = self.finishing = False
        self.sent: Counter[DownloadSource] = Counter()
        self.left_out: dict[DownloadSource, str] = {}
        self.hashes = b""
        self._partial: PartialFile
        self._todo: asyncio.Queue[int]

    @property
    def sources(self) -> list[DownloadSource]:
        return list(self._found)

    @property
    def files(self) -> list[tuple[Path, str, bytes]]:
        return [(self._target, self.digest, self.hashes)]

    async def run(self) -> None:
        """Raises CopyFailed; what is here then stays for another try."""
        groups = await self._agreeing()
        failed = CopyFailed(f"No source is left{_because(self.left_out)}.")
        for size, hashes, sources in groups:
            self.size, self.hashes = size, hashes
            try:
                right = await self._from(sources)
            except CopyFailed as error:
                failed = error
                continue
            except OSError as error:
                raise _of_disk(error, self._target) from error
            if right:
                others = {source for _, _, group in groups for source in group} - set(sources)
                wrong = "it describes another file than the digest says"
                self.left_out.update(dict.fromkeys(others - set(self.left_out), wrong))
                return
            self.left_out.update(dict.fromkeys(sources, "what it sent is another file"))
            failed = WrongFile(
                f"What {_names(sources)} sent is another file than the digest {self.digest[:12]} "
                "says: it was thrown away."
            )
        if isinstance(failed, WrongFile):
            self._partial.discard()
        raise failed

    async def _agreeing(self) -> list[tuple[int, bytes, list[DownloadSource]]]:
        """Size, list of hashes and who gives it; what most say first."""
        lists: dict[tuple[int, bytes], list[DownloadSource]] = {}

        async def ask(source: DownloadSource, have: ModelAvailable) -> None:
            try:
                hashes = await self._list(source, have)
            except (PeeringError, TimeoutError, _SourceUnusable) as error:
                self.left_out[source] = _why(error)
            else:
                lists.setdefault((have.size, hashes), []).append(source)

        await asyncio.gather(*(ask(*item) for item in self._found.items()))
        agreeing = sorted(lists.items(), key=lambda item: -len(item[1]))
        return [(size, hashes, sources) for (size, hashes), sources in agreeing]

    async def _list(self, source: DownloadSource, have: ModelAvailable) -> bytes:
        wanted = partial_file.count(have.size) * HASH_BYTES
        made = bytearray()
        async with _conversation(self._open, source) as stream:
            async with asyncio.timeout(ANSWER_SECONDS):
                made += (await _ask(stream, List(have.digest), Hashes)).data
                while len(made) < wanted:
                    made += (await _receive(stream, Hashes)).data
        if len(made) != wanted:
            raise _SourceUnusable("its list of pieces does not fit the size")
        return bytes(made)

    async def _from(self, sources: list[DownloadSource]) -> bool:
        """Whether what those who agree have given is what was asked for.  CopyFailed, OSError."""
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
            name = None if self._named_later else self._target
            await asyncio.to_thread(self._partial.finish, name)
            return True
        finally:
            self._partial.close()

    async def _fetch(self, sources: list[DownloadSource], missing: list[int]) -> None:
        self._todo = asyncio.Queue()
        for number in missing:
            self._todo.put_nowait(number)
        all_here = asyncio.create_task(self._todo.join())
        workers = [
            asyncio.create_task(self._work(source)) for source in sources for _ in range(STREAMS)
        ]
        nobody_left = asyncio.gather(*workers)
        ends: list[asyncio.Future[Any]] = [all_here, nobody_left]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not all_here.done():
                nobody_left.result()  # an error of the disk
                share = 100 * self.bytes // self.size
                raise CopyFailed(
                    f"The copy stopped at {share} %, no source is left{_because(self.left_out)}. "
                    "What is here is kept: pull again to go on."
                )
        finally:
            for task in (all_here, *workers):
                task.cancel()
            await asyncio.gather(*ends, *workers, return_exceptions=True)

    async def _work(self, source: DownloadSource) -> None:
        """Fetch pieces from one source until it is left out, or cancelled.  Raises OSError."""
        failures = 0
        while source not in self.left_out:
            before = self.sent[source]
            try:
                async with _conversation(self._open, source) as stream:
                    while source not in self.left_out:
                        await self._piece(stream, source)
            except _SourceUnusable as error:
                self.left_out.setdefault(source, _why(error))
            except (PeeringError, TimeoutError) as error:
                failures = 1 if self.sent[source] > before else failures + 1
                if failures == ATTEMPTS:
                    self.left_out.setdefault(source, _why(error))
                else:
                    await asyncio.sleep(failures)

    async def _piece(self, stream: Stream, source: DownloadSource) -> None:
        number = await self._todo.get()
        try:
            async with asyncio.timeout(PIECE_SECONDS):
                data = await self._receive(stream, number)
            if not await asyncio.to_thread(self._partial.put, number, data):
                raise _SourceUnusable(f"it sent a wrong piece {number}")
        except BaseException:
            self._todo.put_nowait(number)  # for another
            raise
        else:
            self.bytes += len(data)
            self.sent[source] += len(data)
        finally:
            self._todo.task_done()

    async def _receive(self, stream: Stream, number: int) -> bytes:
        wanted = partial_file.length(number, self.size)
        data = bytearray((await _ask(stream, GivePiece(self.digest, number), PieceData)).data)
        while len(data) < wanted:
            data += (await _receive(stream, PieceData)).data
        if len(data) > wanted:
            raise _SourceUnusable(f"it sent more than piece {number}")
        return bytes(data)


class MultiFileDownload:
    """A model in several files on its way here, one file after the other; see `DownloadProgress`.
    They get their names when all of them are here, so the folder never holds half a set."""

    def __init__(
        self,
        open_stream: Open,
        found: dict[DownloadSource, ModelAvailable],
        folder: Path,
        name: str,
    ) -> None:
        have = next(iter(found.values()))
        self.digest, self.size, self._parts = have.digest, have.size, have.parts
        self._open, self._found, self._folder = open_stream, found, folder
        count = len(have.parts)
        self._targets = [
            folder / PartName(name, number, count, ".gguf").sibling(number)
            for number in range(1, count + 1)
        ]
        self.left_out: dict[DownloadSource, str] = {}
        self.files: list[tuple[Path, str, bytes]] = []
        self.finishing = False
        self._done, self._sent = 0, Counter[DownloadSource]()
        self._copy: Download | None = None

    @property
    def sources(self) -> list[DownloadSource]:
        return list(self._found)

    @property
    def bytes(self) -> int:
        return self._done + (self._copy.bytes if self._copy else 0)

    @property
    def sent(self) -> Counter[DownloadSource]:
        return self._sent + (self._copy.sent if self._copy else Counter())

    @property
    def checking(self) -> bool:
        return self._copy is None or self._copy.checking

    async def run(self) -> None:
        """Raises CopyFailed; what is here then stays for another try."""
        try:
            with partial_file.claimed(self._folder, self.digest):
                await self._check()
                for number in range(len(self._parts)):
                    if not self._targets[number].exists():
                        await self._one(number)
                self.finishing = True
                for part, target in zip(self._parts, self._targets, strict=True):
                    if not target.exists():
                        await asyncio.to_thread(
                            partial_file.settle, self._folder, part.digest, target
                        )
        except OSError as error:
            raise _of_disk(error, self._targets[0]) from error

    async def _check(self) -> None:
        """Before anything is asked: what is there already, and whether the rest has room.  Raises
        OSError; FileExistsError if a file is there that is another one."""
        lacking: list[tuple[str, int]] = []
        for part, target in zip(self._parts, self._targets, strict=True):
            if not target.exists():
                lacking.append((part.digest, part.size))
            elif await asyncio.to_thread(partial_file.digest, target) != part.digest:
                raise FileExistsError(f"{target} is there already")
            else:
                self._done += part.size
        await asyncio.to_thread(partial_file.check_room, self._folder, lacking)

    async def _one(self, number: int) -> None:
        """Raises CopyFailed."""
        part, target = self._parts[number], self._targets[number]
        found = {
            source: ModelAvailable(have.model, part.digest, have.parts[number].size)
            for source, have in self._found.items()
            if source not in self.left_out
        }
        if not found:
            raise CopyFailed(f"No source is left{_because(self.left_out)}.")
        self._copy = copy = Download(self._open, found, target, named_later=True)
        try:
            await copy.run()
        finally:
            # Who was of no use for one file is asked for no other.
            self.left_out |= copy.left_out
            self._copy = None
            self._sent += copy.sent
            self._done += copy.bytes
        self.files.append((target, part.digest, copy.hashes))


def _of_disk(error: OSError, target: Path) -> CopyFailed:
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
async def _conversation(open_stream: Open, source: DownloadSource) -> AsyncIterator[Stream]:
    stream = await open_stream(source.peer)
    try:
        yield stream
        await stream.finish()
    except BaseException:
        stream.abandon()
        raise


async def _ask(stream: Stream, question: Struct, kind: type[A]) -> A:
    await stream.send(wire.encode(question))
    return await _receive(stream, kind)


async def _receive(stream: Stream, kind: type[A]) -> A:
    """The next answer.  PeeringError, TimeoutError, _LeftOut."""
    while True:
        frame = await asyncio.wait_for(stream.receive(), STALL_SECONDS)
        if frame is None:
            raise LinkLost("It ended the conversation.")
        answer = file_wire.answer(frame)
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, FileRefused):
            # It ends up on a terminal.
            raise _SourceUnusable(wire.printable(answer.message))
        if not isinstance(answer, Working):
            raise _SourceUnusable("it answers what it was not asked")


def _why(error: Exception) -> str:
    """As the end of a sentence."""
    if isinstance(error, TimeoutError):
        return "it is silent or too slow"
    return str(error).rstrip(".")


def _names(sources: Iterable[DownloadSource]) -> str:
    return ", ".join(sorted(source.name for source in sources))


def _because(reasons: dict[DownloadSource, str]) -> str:
    """` (anna: ...; ben: ...)`, or nothing."""
    told = "; ".join(f"{source.name}: {why}" for source, why in reasons.items())
    return f" ({told})" if told else ""
