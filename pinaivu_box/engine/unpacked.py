"""Payloads as they are unpacked: each into a folder of the user's cache, when it is first needed.

The files are checked when they are unpacked, and again whenever something has touched them since:
what is not as it was is unpacked anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import platformdirs

from pinaivu_box.engine.payload import Content, Payload, PayloadError, PayloadFile, Table, explained

_CHUNK_BYTES = 1 << 20
_UNUSED_SECONDS = 30 * 86400.0
_CHECKED = "checked.json"  # what the files were when they were right

Stamp = tuple[int, int, int, int]


def cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("pinaivu")) / "backends"


def unpack(payload: Payload, cache: Path) -> Path:
    """The folder in `cache` with the payload's files, which are unpacked unless they are there.
    Raises PayloadError."""
    folder = cache / f"{payload.table.name}-{payload.digest[:16]}"
    with explained(f"it cannot be unpacked into {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache):
            if not _is_right(folder, payload.table):
                _unpack(payload, folder)
                _remove_unused(cache, folder)
            os.utime(folder)
    return folder


def _unpack(payload: Payload, folder: Path) -> None:
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    with payload.content() as content:
        for file in payload.table.files:
            _write(work, content, file)
    _remember(work, payload.table)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def _write(folder: Path, content: Content, file: PayloadFile) -> None:
    path = folder / file.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PayloadError("it is damaged: get the executable again")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    digest, left = hashlib.sha256(), file.size
    with path.open("xb") as out:
        while left and (data := content.read(min(left, _CHUNK_BYTES))):
            out.write(data)
            digest.update(data)
            left -= len(data)
        out.flush()
        os.fsync(out.fileno())
    if left or digest.hexdigest() != file.sha256:
        raise PayloadError("it is damaged: get the executable again")
    path.chmod(0o500)


def _is_right(folder: Path, table: Table) -> bool:
    """Whether the files are what the table says.  They are read only if something touched them
    since they were last: half a gigabyte takes a second."""
    if not all((folder / file.name).is_file() for file in table.files):
        return False
    if _remembered(folder) == _stamps(folder, table):
        return True
    if not all(_digest(folder / file.name) == file.sha256 for file in table.files):
        return False
    _remember(folder, table)
    return True


def _stamps(folder: Path, table: Table) -> dict[str, Stamp]:
    stats = {file.name: (folder / file.name).stat() for file in table.files}
    return {
        name: (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        for name, stat in stats.items()
    }


def _remember(folder: Path, table: Table) -> None:
    (folder / _CHECKED).write_bytes(msgspec.json.encode(_stamps(folder, table)))


def _remembered(folder: Path) -> dict[str, Stamp] | None:
    try:
        return msgspec.json.decode((folder / _CHECKED).read_bytes(), type=dict[str, Stamp])
    except (OSError, msgspec.MsgspecError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_unused(cache: Path, but: Path) -> None:
    """What other versions of the program have unpacked, and nobody has used for a month."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):
            if folder != but and time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
