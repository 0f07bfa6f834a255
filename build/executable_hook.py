"""Runs in the executable before our own code (pinaivu.spec names it).

The executable is the launcher (build/launcher), which has unpacked the program into a folder of the
user's cache and started it there.  This makes the executable, not that folder, what the program
takes itself for, and removes what older versions have unpacked.
"""

import contextlib
import os
import re
import sys
import time
from pathlib import Path

# Folders beside ours: programs, one that was damaged, one whose unpacking was cut off.
OURS = re.compile(r"program-[0-9a-f]{24}|\.(?:old|new)-[0-9a-f-]+")
UNFINISHED = re.compile(r"\.new-[0-9a-f-]+")
STILL_UNPACKED_SECONDS = 3600.0  # a younger one may not have been locked yet


def main() -> None:
    launched = os.environ.get("PINAIVU_LAUNCHED")
    if launched is None:
        sys.exit("pinaivu: this is a part of Pinaivu Box: start the executable that it came from.")
    fresh, lock, executable = launched.split(":", 2)
    sys.executable = executable
    if lock:
        os.set_inheritable(int(lock), False)  # it is ours alone, and held as long as we live
    # For a child that is started without the launcher (pinaivu_box/child.py): our lock is enough.
    os.environ["PINAIVU_LAUNCHED"] = f"0::{executable}"
    if fresh == "1":
        remove_unused(Path(sys._MEIPASS))  # type: ignore[attr-defined]


def remove_unused(ours: Path) -> None:
    """Remove the folders beside ours that no process runs from."""
    for other in ours.parent.iterdir():
        if other != ours and OURS.fullmatch(other.name):
            with contextlib.suppress(OSError):  # it is in use, or somebody else was faster
                remove_unless_held(other)


def remove_unless_held(folder: Path) -> None:
    import fcntl
    import shutil

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(handle)
        age = time.time() - found.st_mtime
        if UNFINISHED.fullmatch(folder.name) and age < STILL_UNPACKED_SECONDS:
            return
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if found.st_uid == os.geteuid():
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


main()
