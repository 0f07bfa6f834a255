"""Downloads the files of a model from a registry: in several connections, resumable, verified.

A file grows piece by piece (`models.partial_file`) at `.partial/DIGEST`, so that a later attempt
asks only for what is missing.  When all has come, the whole is compared with its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter, deque
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import httpx
from msgspec.structs import replace

from pinaivu_box import backoff
from pinaivu_box.errors import PullFailed, quoted
from pinaivu_box.files.download import DownloadSource
from pinaivu_box.models import partial_file, projectors, record, splits
from pinaivu_box.models.partial_file import PIECE_BYTES, CopyInProgress, NoRoom
from pinaivu_box.models.regular_files import sha256
from pinaivu_box.registry.client import HttpStatus, RegistryClient, unreachable
from pinaivu_box.registry.manifest import Listing, RemoteFile
from pinaivu_box.registry.reference import host_of
from pinaivu_box.registry.unhashed_file import UnhashedFile
from pinaivu_box.text import megabytes
from pinaivu_box.text import number as number_of

CONNECTIONS = 4
_RUN_PIECES = 16  # 64 MiB: what one request asks for
_MAX_FAILURES = 6  # in a row, of one connection
_FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 15.0
_MAX_FILE_BYTES = 2**50
# Statuses of a server that is busy, and of the storage behind a registry when the URL of a redirect
# has expired.
_RETRIED = {401, 403, 404, 408, 410, 429, 500, 502, 503, 504}
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class _NoRanges(PullFailed):
    """The server sends whole files only."""


class _Stopped(Exception):
    """The server ended an answer early, or sent another range than was asked for."""


class Transfer:
    """The download of a listing into a models folder, where it gets its name when all is here.

    `bytes` of `size` are here.  `checking` while nothing is received: files are compared with their
    digests.  Once it is `finishing` it must not be cancelled.  `files` are those that were
    downloaded: name, digest and hashes of the pieces; `projector` is the one that is no model.
    """

    def __init__(self, client: RegistryClient, listing: Listing, folder: Path) -> None:
        self.record = listing.record
        self.finishing = False
        self.sources = [DownloadSource("", host_of(listing.files[0].url))]
        self.left_out: dict[DownloadSource, str] = {}
        self.files: list[tuple[Path, str, bytes]] = []
        self.projector: Path | None = None
        self._folder = folder
        self._models = [_FileTransfer(client, file, folder) for file in listing.files]
        self._projector: _FileTransfer | None = None
        if listing.projector is not None:
            self._projector = _FileTransfer(client, listing.projector, folder)

    @property
    def _transfers(self) -> list[_FileTransfer]:
        return [*self._models, *([self._projector] if self._projector is not None else [])]

    @property
    def digest(self) -> str:
        """Of the model; empty while it is not known."""
        digests = [transfer.digest for transfer in self._models]
        if not all(digests):
            return ""
        return digests[0] if len(digests) == 1 else splits.digest_of_parts(digests)

    @property
    def model_size(self) -> int:
        """Of the model's own files, as far as it is known."""
        return sum(transfer.size for transfer in self._models)

    @property
    def size(self) -> int:
        """Of all files together, as far as it is known."""
        return sum(transfer.size for transfer in self._transfers)

    @property
    def bytes(self) -> int:
        return sum(transfer.received for transfer in self._transfers)

    @property
    def sent(self) -> Counter[DownloadSource]:
        """The bytes that came in this attempt, by source."""
        sent = sum(transfer.sent for transfer in self._transfers)
        return Counter({self.sources[0]: sent})

    @property
    def checking(self) -> bool:
        return self.finishing or any(transfer.checking for transfer in self._transfers)

    async def run(self) -> None:
        """Download all files.  Raises PullFailed; what has come is kept for another attempt, unless
        it is wrong."""
        model_id, transfers = self.record.id, self._transfers
        try:
            for transfer in transfers:
                await transfer.ask_size()
            wanted = [(transfer.key, transfer.size) for transfer in transfers]
            await asyncio.to_thread(partial_file.check_room, self._folder, wanted)
            for transfer in transfers:
                await transfer.run()
            self.finishing = True
            await asyncio.to_thread(self._publish)
        except NoRoom as error:
            raise PullFailed(
                f"There is no room for {model_id} on the disk of {self._folder}: {error}."
            ) from error
        except CopyInProgress as error:
            raise PullFailed(f"{model_id} is being pulled by another process.") from error
        except OSError as error:
            reason = error.strerror or error
            raise PullFailed(f"{self._folder} cannot be written to: {reason}.") from error

    def _publish(self) -> None:
        """Give the files their names.  Raises OSError."""
        names = splits.names(self.record.id, len(self._models))
        targets = [self._folder / name for name in names]
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        if self._projector is not None:  # it is there when the model is seen
            target = self.projector = targets[0].with_name(projectors.name_for(targets[0]))
            if target.is_file() and sha256(target) == self._projector.digest:
                target.unlink()  # a pull that was killed, or a model that was deleted, left it
            partial_file.publish(self._folder, self._projector.key, target)
            self.files.append((target, self._projector.digest, self._projector.hashes))
            self.record = replace(self.record, projector=target.name)
        record.write(targets[0], self.record)
        for target, transfer in zip(targets, self._models, strict=True):
            partial_file.publish(self._folder, transfer.key, target)
            self.files.append((target, transfer.digest, transfer.hashes))


class _FileTransfer:
    """The download of one file, which stays among the unfinished ones.  `digest` is empty while it
    is not known; `hashes` are those of its pieces when it has come."""

    def __init__(self, client: RegistryClient, file: RemoteFile, folder: Path) -> None:
        self.size, self.digest = file.size or 0, file.digest or ""
        self._expected = self.digest
        self.hashes = b""
        self.checking = False
        self._client, self._url, self._folder = client, file.url, folder
        self._random = Random()  # noqa: S311, it spreads retries
        self._arrived: set[int] = set()
        self.sent = 0  # bytes that came in this attempt
        self._partial: UnhashedFile

    @property
    def key(self) -> str:
        """What the unfinished file is called: its digest, or one of where it comes from."""
        source = f"{self._url}\n{self.size}".encode()
        return self._expected or hashlib.sha256(source).hexdigest()

    @property
    def received(self) -> int:
        """How many of its bytes are here."""
        return sum(partial_file.length(number, self.size) for number in self._arrived)

    async def ask_size(self) -> None:
        """Ask for the size if it is not known.  Raises PullFailed."""
        if self.size:
            return
        try:
            async with self._client.open(self._url, {"Range": "bytes=0-0"}) as response:
                self.size = _total(response)
        except HttpStatus as error:
            if error.status == 404:
                raise PullFailed(f"There is no file at {quoted(self._url)}.") from error
            raise
        except httpx.TransportError as error:
            raise unreachable(self._url, error) from error

    async def run(self) -> None:
        """Download it.  Raises PullFailed, OSError."""
        partial = await asyncio.to_thread(UnhashedFile, self._folder, self.key, self.size)
        self._partial = partial
        try:
            missing = await asyncio.to_thread(partial.missing)
            self._arrived = set(range(partial_file.count(self.size))) - set(missing)
            await self._fill(missing)
            self.checking = True
            digest = await asyncio.to_thread(sha256, partial.path)
            if self._expected not in ("", digest):
                await asyncio.to_thread(partial.discard)
                raise PullFailed(
                    f"What {host_of(self._url)} sent is another file than its digest "
                    f"{self._expected[:12]} says: it was discarded.  Pull it again."
                )
            await asyncio.to_thread(partial.sync)
            self.digest, self.hashes, self.checking = digest, partial.hashes, False
        finally:
            await asyncio.to_thread(partial.close)

    async def _fill(self, missing: list[int]) -> None:
        """Raises PullFailed, OSError."""
        runs = _runs(missing)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CONNECTIONS, len(runs))):
                    group.create_task(self._fill_runs(runs))
        except* _NoRanges:
            await self._fill_runs(deque([list(range(partial_file.count(self.size)))]))
        except* (PullFailed, OSError) as group_error:
            raise group_error.exceptions[0] from None

    async def _fill_runs(self, runs: deque[list[int]]) -> None:
        """Fill runs of pieces until none is left.  Raises PullFailed, OSError."""
        failures = 0
        while runs:
            run = runs.popleft()
            while run:
                try:
                    async for number, data in self._pieces(run):
                        await asyncio.to_thread(self._partial.put, number, data)
                        self._arrived.add(number)
                        self.sent += len(data)
                        run, failures = run[1:], 0
                except (_Stopped, HttpStatus, httpx.TransportError) as error:
                    failures += 1
                    hopeless = isinstance(error, HttpStatus) and error.status not in _RETRIED
                    if hopeless or failures == _MAX_FAILURES:
                        raise self._given_up(error) from error
                    first, longest = _FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS
                    await asyncio.sleep(backoff.delay(failures, first, longest, self._random))

    async def _pieces(self, run: list[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Request a run of pieces, and return each as it comes.  Raises _NoRanges, _Stopped, and
        what `RegistryClient.open` does."""
        begin = run[0] * PIECE_BYTES
        end = begin + sum(partial_file.length(number, self.size) for number in run)
        async with self._client.open(self._url, _range(begin, end)) as response:
            _check_range(response, begin, self.size)
            numbers, data = iter(run), bytearray()
            number = next(numbers)
            async for part in response.aiter_raw():
                data += part
                while len(data) >= (length := partial_file.length(number, self.size)):
                    yield number, bytes(data[:length])
                    del data[:length]
                    if (number := next(numbers, -1)) < 0:
                        return
        raise _Stopped("it ended an answer early")

    def _given_up(self, error: Exception) -> PullFailed:
        if isinstance(error, HttpStatus):
            return error
        if isinstance(error, httpx.TransportError):
            return unreachable(self._url, error)
        return PullFailed(
            f"{host_of(self._url)} does not send {megabytes(self.size)} as it says: {error}.  What "
            "has come is kept; pull it again."
        )


def _range(begin: int, end: int) -> dict[str, str]:
    # Without `identity` a proxy may compress, and then ranges are of something else.
    return {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}


def _check_range(response: httpx.Response, begin: int, size: int) -> None:
    """Raises _NoRanges, _Stopped."""
    if response.status_code == 200:
        if begin:
            raise _NoRanges("the server sends whole files only")
        return
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != begin or int(match[3]) != size:
        raise _Stopped("it sent another part of the file than was asked for, or of another file")


def _total(response: httpx.Response) -> int:
    """The size of a file, from the answer to a request for a range of it.  Raises PullFailed."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    length = response.headers.get("Content-Length", "")
    size = int(match[3]) if match else number_of(length) or 0
    if not 0 < size <= _MAX_FILE_BYTES:
        raise PullFailed(f"{host_of(str(response.url))} does not say how long the file is.")
    return size


def _runs(missing: list[int]) -> deque[list[int]]:
    """Runs of neighbouring pieces, of at most _RUN_PIECES."""
    runs: deque[list[int]] = deque()
    for piece in missing:
        if runs and len(runs[-1]) < _RUN_PIECES and runs[-1][-1] == piece - 1:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs
