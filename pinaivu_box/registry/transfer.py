"""Downloads the files of a model from a registry: in several connections, resumable, verified.

A file grows piece by piece (`models.partial_file`) at `.partial/DIGEST`, so that a later attempt
asks only for what is missing.  When all has come, the whole is compared with its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

from pinaivu_box import backoff
from pinaivu_box.errors import PullFailed, quoted
from pinaivu_box.models import partial_file
from pinaivu_box.models.partial_file import PIECE_BYTES, CopyInProgress, NoRoom
from pinaivu_box.models.regular_files import sha256
from pinaivu_box.registry.client import HttpStatus, RegistryClient, host_of, unreachable
from pinaivu_box.registry.manifest import Listing, RemoteFile
from pinaivu_box.registry.unhashed_file import UnhashedFile
from pinaivu_box.text import megabytes

CONNECTIONS = 4
_RUN_PIECES = 16  # 64 MiB: what one request asks for
_MAX_FAILURES = 6  # in a row, of one connection
_FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 15.0
_MAX_FILE_BYTES = 2**50
# What the storage behind a registry says when the URL of a redirect has expired.
_EXPIRED = {401, 403, 404, 410}
_RETRIED = {408, 429, 500, 502, 503, 504}
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


@dataclass(frozen=True)
class FetchedFile:
    """A whole file that is still among the unfinished ones, under `key`: see
    `partial_file.settle`.  `digest` is its SHA-256 in hex, `hashes` are those of its pieces."""

    key: str
    digest: str
    hashes: bytes


class _NoRanges(PullFailed):
    """The server sends whole files only."""


class _Stopped(Exception):
    """The server ended an answer early, or sent another range than was asked for."""


class Transfer:
    """The download of a listing into a folder.  `received` of `size` bytes are here; `checking`
    while the whole is compared with its digest."""

    def __init__(self, client: RegistryClient, listing: Listing, folder: Path) -> None:
        self.listing = listing
        self.checking = False
        self._client = client
        self._folder = folder
        self._random = Random()  # noqa: S311, it spreads retries
        self._sizes: dict[str, int] = {f.url: f.size for f in listing.files if f.size is not None}
        self._arrived: dict[str, set[int]] = {}  # by URL, the numbers of pieces

    @property
    def size(self) -> int:
        """Of all files together, as far as it is known."""
        return sum(self._sizes.values())

    @property
    def received(self) -> int:
        """The bytes that have come of all files together."""
        return sum(
            partial_file.length(number, self._sizes[url])
            for url, numbers in self._arrived.items()
            for number in numbers
        )

    async def run(self) -> list[FetchedFile]:
        """Download all files.  Raises PullFailed; what has come is kept for another attempt, unless
        it is wrong."""
        files = [await self._described(file) for file in self.listing.files]
        try:
            wanted = [(_key(file), file.size or 0) for file in files]
            await asyncio.to_thread(partial_file.check_room, self._folder, wanted)
            return [await self._fetch(file) for file in files]
        except NoRoom as error:
            raise PullFailed(
                f"There is no room for {self.listing.id} on the disk of {self._folder}: {error}."
            ) from error
        except CopyInProgress as error:
            raise PullFailed(f"{self.listing.id} is being pulled by another process.") from error
        except OSError as error:
            reason = error.strerror or error
            raise PullFailed(f"{self._folder} cannot be written to: {reason}.") from error

    async def _described(self, file: RemoteFile) -> RemoteFile:
        """The file with its size, which is asked for where it is not known."""
        if file.size is not None:
            return file
        try:
            async with self._client.open(file.url, {"Range": "bytes=0-0"}) as response:
                size = _total(response)
        except HttpStatus as error:
            if error.status == 404:
                raise PullFailed(f"There is no file at {quoted(file.url)}.") from error
            raise
        except httpx.TransportError as error:
            raise unreachable(file.url, error) from error
        self._sizes[file.url] = size
        return RemoteFile(file.url, size, file.digest)

    async def _fetch(self, file: RemoteFile) -> FetchedFile:
        """Raises PullFailed, OSError."""
        size, key = file.size or 0, _key(file)
        partial = await asyncio.to_thread(UnhashedFile, self._folder, key, size)
        try:
            missing = await asyncio.to_thread(partial.missing)
            self._arrived[file.url] = set(range(partial_file.count(size))) - set(missing)
            await self._fill(file, partial, missing)
            self.checking = True
            digest = await asyncio.to_thread(sha256, partial.path)
            if file.digest not in (None, digest):
                await asyncio.to_thread(partial.discard)
                raise PullFailed(
                    f"What {host_of(file.url)} sent is another file than its digest "
                    f"{(file.digest or '')[:12]} says: it was discarded.  Pull it again."
                )
            await asyncio.to_thread(partial.finish, None)
            self.checking = False
            return FetchedFile(key, digest, partial.hashes)
        finally:
            await asyncio.to_thread(partial.close)

    async def _fill(self, file: RemoteFile, partial: UnhashedFile, missing: list[int]) -> None:
        """Raises PullFailed, OSError."""
        runs = _runs(missing)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CONNECTIONS, len(runs))):
                    group.create_task(self._fill_runs(file, partial, runs))
        except* _NoRanges:
            everything = deque([list(range(partial_file.count(file.size or 0)))])
            await self._fill_runs(file, partial, everything)
        except* (PullFailed, OSError) as group_error:
            raise group_error.exceptions[0] from None

    async def _fill_runs(
        self, file: RemoteFile, partial: UnhashedFile, runs: deque[list[int]]
    ) -> None:
        """Fill runs of pieces until none is left.  Raises PullFailed, OSError."""
        failures = 0
        while runs:
            run = runs.popleft()
            while run:
                try:
                    async for number, data in self._pieces(file, run):
                        await asyncio.to_thread(partial.put, number, data)
                        self._arrived[file.url].add(number)
                        run, failures = run[1:], 0
                except (_Stopped, HttpStatus, httpx.TransportError) as error:
                    failures += 1
                    hopeless = isinstance(error, HttpStatus) and error.status not in (
                        _RETRIED | _EXPIRED
                    )
                    if hopeless or failures == _MAX_FAILURES:
                        raise _given_up(file, error) from error
                    await asyncio.sleep(
                        backoff.delay(
                            failures, _FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS, self._random
                        )
                    )

    async def _pieces(self, file: RemoteFile, run: list[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Request a run of pieces, and return each as it comes.  Raises _NoRanges, _Stopped, and
        what `RegistryClient.open` does."""
        size = file.size or 0
        begin = run[0] * PIECE_BYTES
        end = begin + sum(partial_file.length(number, size) for number in run)
        async with self._client.open(file.url, _range(begin, end)) as response:
            _check_range(response, begin, size)
            numbers, data = iter(run), bytearray()
            number = next(numbers)
            async for part in response.aiter_raw():
                data += part
                while len(data) >= (length := partial_file.length(number, size)):
                    yield number, bytes(data[:length])
                    del data[:length]
                    if (number := next(numbers, -1)) < 0:
                        return
        raise _Stopped("it ended an answer early")


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
    size = int(match[3]) if match else int(length) if length.isdecimal() else 0
    if not 0 < size <= _MAX_FILE_BYTES:
        raise PullFailed(f"{host_of(str(response.url))} does not say how long the file is.")
    return size


def _runs(missing: list[int]) -> deque[list[int]]:
    """Runs of neighbouring pieces, of at most _RUN_PIECES."""
    runs: deque[list[int]] = deque()
    for number in missing:
        if runs and len(runs[-1]) < _RUN_PIECES and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _key(file: RemoteFile) -> str:
    """What the unfinished file is called: its digest, or one of where it comes from."""
    return file.digest or hashlib.sha256(f"{file.url}\n{file.size}".encode()).hexdigest()


def _given_up(file: RemoteFile, error: Exception) -> PullFailed:
    if isinstance(error, HttpStatus):
        return error
    if isinstance(error, httpx.TransportError):
        return unreachable(file.url, error)
    return PullFailed(
        f"{host_of(file.url)} does not send {megabytes(file.size or 0)} as it says: {error}.  What "
        "has come is kept; pull it again."
    )
