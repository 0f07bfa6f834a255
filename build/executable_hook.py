"""Runs in the executable before our own code (pinaivu.spec names it).

PyInstaller's executable runs as two processes: a loader, which unpacks the libraries into a folder
of the temporary directory and waits, and its child, which is us. Left alone, a `kill -9` of the
loader would leave the server running, and the folder behind.
"""

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

HELD_FOR_SURE = 3600.0  # seconds; a younger folder may be one that is just being unpacked
PR_SET_PDEATHSIG = 1
SIGKILL = 9


def hold(folder: Path) -> None:
    """Lock the folder for as long as this process lives; systemd-tmpfiles heeds that lock too."""
    with contextlib.suppress(OSError):  # a file system without locks: there, nothing is removed
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)


def end_with_the_loader() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)


def remove_those_left_behind(folder: Path) -> None:
    """Folders that an executable like this one has unpacked, and that no process holds."""
    for other in folder.parent.glob("_MEI*"):
        try:
            found = other.lstat()
            old = time.time() - found.st_mtime > HELD_FOR_SURE
            if old and found.st_uid == os.getuid() and (other / "pinaivu_box").is_dir():
                remove_unless_held(other)
        except OSError:  # somebody else was faster
            continue


def remove_unless_held(folder: Path) -> None:
    import shutil

    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def main() -> None:
    folder = Path(sys._MEIPASS)  # type: ignore[attr-defined]
    hold(folder)
    if sys.argv[1:2] == ["serve"]:
        end_with_the_loader()
        remove_those_left_behind(folder)


main()
