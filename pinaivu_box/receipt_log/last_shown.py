"""The last checkpoint that this box has shown, in a file beside the database.

If somebody puts an older copy of the database into the home, the file says so: the log of the copy
must not go on, since it would contradict what was shown.
"""

from __future__ import annotations

import os
from pathlib import Path

from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.note import Note, NoteError

NAME = "log.checkpoint"


def read(home: Path, node_id: str | None) -> tuple[Checkpoint, Note] | None:
    """None if there is none, or it is not that of the box with this node id (None: of any).  Raises
    OSError."""
    try:
        signed = note.read((home / NAME).read_text(encoding="utf-8"))
        found = checkpoint.read(signed)
    except (FileNotFoundError, UnicodeDecodeError, NoteError):
        return None
    right = node_id in (None, found.node_id) and checkpoint.is_signed(signed, found)
    return (found, signed) if right else None


def write(home: Path, signed: Note) -> None:
    """On disk on return; a crash leaves the old one or the new one.  Raises OSError."""
    temporary = home / f"{NAME}.new"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(str(signed))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(home / NAME)
    folder = os.open(home, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
