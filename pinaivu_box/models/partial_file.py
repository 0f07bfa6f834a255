"""A model file in pieces of 4 MiB, and the unfinished copy of one, which grows piece by piece.

An unfinished copy is `.partial/DIGEST` in the models folder, as large as the model will be and with
holes where nothing has come yet.  There is no list of what it holds, which could be wrong after a
`kill -9` or a power cut: what is there is found out by hashing it, at about 1 GB/s.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pinaivu_box.models.catalog import Model
from pinaivu_box.models.regular_files import open_regular, sha256

PIECE_BYTES = 4 * 1024 * 1024
HASH_BYTES = 32
_MIN_SPARE_BYTES = 100 * 1000 * 1000  # of the disk, for the database and other programs


class CopyInProgress(OSError):
    """Another process is making this copy."""


class NoRoom(OSError):
    """`needed` and `free` bytes of the disk."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")


def count(size: int) -> int:
    return -(-size // PIECE_BYTES)


def length(number: int, size: int) -> int:
    return min(PIECE_BYTES, size - number * PIECE_BYTES)


def hashes(model: Model, stopped: Callable[[], bool] = lambda: False) -> bytes:
    """The SHA-256 of each piece of a GGUF in one file, one after the other.  Raises OSError, also
    if it is `stopped`."""
    hashes_ = bytearray()
    with open_regular(model.path) as file:
        for number in range(count(model.size)):
            file.seek(model.offset + number * PIECE_BYTES)
            hashes_ += hashlib.sha256(file.read(length(number, model.size))).digest()
            if stopped():
                raise InterruptedError(0, "its hashes are no longer needed", str(model.path))
    return bytes(hashes_)


def read(model: Model, begin: int, size: int) -> bytes:
    """Some bytes of a GGUF in one file.  Raises OSError, also if it has become shorter."""
    with open_regular(model.path) as file:
        file.seek(model.offset + begin)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{model.path} has become shorter")
    return data


def check_room(folder: Path, files: Iterable[tuple[str, int]]) -> None:
    """Whether copies of files with these digests and sizes have room in that folder, beside what is
    there of them.  Raises NoRoom, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = _MIN_SPARE_BYTES
    for digest, size in files:
        needed += size
        with suppress(FileNotFoundError):
            needed -= _partial(folder, digest).stat().st_blocks * 512
    if needed > (free := shutil.disk_usage(folder).free):
        raise NoRoom(needed, free)


@contextmanager
def claimed(folder: Path, digest: str) -> Iterator[None]:
    """While this lasts no other process copies the files of the model with that digest.  Raises
    CopyInProgress, OSError."""
    path = _partial(folder, f"{digest}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        _lock(file.fileno())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CopyInProgress("it is being copied already") from None


def publish(folder: Path, digest: str, target: Path) -> None:
    """Give a copy that is whole and on disk its name.  Raises FileExistsError, OSError."""
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    partial = _partial(folder, digest)
    partial.rename(target)
    for changed in (target.parent, partial.parent):
        handle = os.open(changed, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _partial(folder: Path, digest: str) -> Path:
    return folder / ".partial" / digest


class PartialFile:
    """An unfinished copy, which no other process can open meanwhile.  Its methods block on disk
    and are for threads; those that run stop at `close`.  All raise OSError."""

    def __init__(self, folder: Path, digest: str, size: int, expected: bytes) -> None:
        """`expected` are the hashes of the pieces.  Raises CopyInProgress, NoRoom, OSError."""
        self.path = _partial(folder, digest)
        self.size = size
        self._expected = expected
        self._digest = digest
        self._closed = False
        self._writing = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(self._file)
            check_room(folder, [(digest, size)])
            os.ftruncate(self._file, size)
        except BaseException:
            self.close()
            raise

    def missing(self) -> list[int]:
        """The pieces that have still to come."""
        lacking = set(range(count(self.size)))
        with self.path.open("rb") as file:
            for number in self._written(file.fileno()):
                file.seek(number * PIECE_BYTES)
                if self._fits(number, file.read(PIECE_BYTES)):
                    lacking.discard(number)
        return sorted(lacking)

    def _written(self, file: int) -> Iterator[int]:
        """The pieces that are no holes."""
        number = 0
        while number < count(self.size) and not self._closed:
            try:
                data = os.lseek(file, number * PIECE_BYTES, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                return
            number = data // PIECE_BYTES
            yield number
            number += 1

    def _fits(self, number: int, data: bytes) -> bool:
        begin = number * HASH_BYTES
        return hashlib.sha256(data).digest() == self._expected[begin : begin + HASH_BYTES]

    def put(self, number: int, data: bytes) -> bool:
        """Keep a piece; False if it is not what it should be."""
        if not self._fits(number, data):
            return False
        # Who has given up may have closed it while this waited for its thread, and another file
        # may have its number.
        with self._writing:
            begin = number * PIECE_BYTES
            while data and not self._closed:
                written = os.pwrite(self._file, data, begin)
                begin, data = begin + written, data[written:]
        return True

    def is_right(self) -> bool:
        """Whether the whole has the digest that was asked for."""
        return sha256(self.path, lambda: self._closed) == self._digest

    def sync(self) -> None:
        """Wait until it is safely on disk; `publish` gives it its name."""
        os.fsync(self._file)

    def discard(self) -> None:
        """Delete what has come: it is of no use."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        with self._writing:
            if not self._closed:
                self._closed = True
                os.close(self._file)
