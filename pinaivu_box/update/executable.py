"""The executable on disk: replaced by another version, and put back.

The one before is kept beside it as NAME.previous.  Every change is one rename, so that there is
always a whole executable at the path, whatever is cut off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pinaivu_box import appended
from pinaivu_box.errors import UpdateFailed

_PREVIOUS = ".previous"
_CLONE = Path(__file__).parents[2] / "pinaivu.spec"
_TRIAL_SECONDS = 120.0  # a slow disk takes its time to unpack a program
_LEFT_OVER_SECONDS = 86400.0


def own() -> Path:
    """The executable that this process runs.  Raises UpdateFailed if it is none."""
    if getattr(sys, "frozen", False):
        return Path(sys.executable)
    if _CLONE.exists():
        raise UpdateFailed(
            f"This is a clone, which 'git pull' updates: run it in {_CLONE.parent}, then build/run."
        )
    raise UpdateFailed("This was installed by pip: run 'pip install --upgrade pinaivu-box'.")


def current(executable: Path) -> Path:
    """The executable that was updated: itself, unless it is the one before."""
    return executable.with_name(executable.name.removesuffix(_PREVIOUS))


def variant(executable: Path) -> str:
    """The backend for GPUs that it carries as a payload, "" without one."""
    return next(iter(appended.payload_names(executable)), "")


def previous(executable: Path) -> Path:
    """Where the one before is kept."""
    return executable.with_name(f"{executable.name}{_PREVIOUS}")


def replace(executable: Path, version: str, write: Callable[[BinaryIO], None]) -> None:
    """Put `version` in the place of `executable`: `write` is called with the new file, which is
    then started once.

    Raises UpdateFailed, and what `write` raises; nothing is changed then.
    """
    with _explained(executable), _beside(executable) as new:
        _remove_left_over(executable)
        with new.open("wb") as out:
            write(out)
        _belong_as(executable, new)
        if (found := version_of(new)) != version:
            raise UpdateFailed(
                f"The new executable is {found}, not {version}: nothing was changed."
            )
        _keep(executable)
        new.replace(executable)


def roll_back(executable: Path) -> str:
    """Put the one before in place again, and keep this one in its stead.  Returns its version.

    Raises UpdateFailed; nothing is changed then.
    """
    before = previous(executable)
    if not before.is_file():
        raise UpdateFailed(f"There is no {before}: nothing was updated here, or it was removed.")
    with _explained(executable), _beside(executable) as new:
        shutil.copyfile(before, new)
        _belong_as(executable, new)
        version = version_of(new)
        _keep(executable)
        new.replace(executable)
    return version


def version_of(executable: Path) -> str:
    """Start it and ask for its version.  Raises UpdateFailed."""
    try:
        done = subprocess.run(
            [executable, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UpdateFailed(
            f"The new executable does not run here ({error}): nothing was changed."
        ) from error
    name, _, version = done.stdout.strip().partition(", version ")
    if done.returncode or name != "pinaivu" or not version:
        said = (done.stderr.strip() or done.stdout.strip()).split("\n")[0][:200]
        raise UpdateFailed(f"The new executable does not run here ({said}): nothing was changed.")
    return version


def _belong_as(executable: Path, new: Path) -> None:
    """Give the new file mode, group and (as root) owner of the executable."""
    found = executable.stat()
    with contextlib.suppress(PermissionError):  # a group that this user is not in
        os.chown(new, found.st_uid if os.geteuid() == 0 else -1, found.st_gid)
    new.chmod(found.st_mode & 0o777)


def _keep(executable: Path) -> None:
    """Make the executable the previous one, too."""
    with _beside(executable) as copy:
        copy.unlink()
        try:
            os.link(executable, copy)
        except OSError:  # a file system without hard links
            shutil.copy2(executable, copy)
        copy.replace(previous(executable))


@contextlib.contextmanager
def _beside(executable: Path) -> Iterator[Path]:
    """A new file in the same folder, which is gone afterwards unless it was given another name."""
    handle, name = tempfile.mkstemp(prefix=f".{executable.name}-", dir=executable.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_left_over(executable: Path) -> None:
    """What updates have left that were killed."""
    for path in executable.parent.glob(f".{executable.name}-????????"):
        if path.is_file() and time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(executable: Path) -> Iterator[None]:
    """Raises UpdateFailed for errors of the file system."""
    try:
        yield
    except OSError as error:
        raise UpdateFailed(
            f"{executable} cannot be replaced ({error.strerror or error}): run this as a user who "
            f"may write to {executable.parent}, with enough space there."
        ) from error
