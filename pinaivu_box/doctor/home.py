"""Checks of the home: its permissions, its identity and its database."""

from __future__ import annotations

import fcntl
import os
import shlex
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pinaivu_box import identity as identities
from pinaivu_box.doctor.check import Check, of_error
from pinaivu_box.errors import DatabaseUnusable, SchemaUnsupported
from pinaivu_box.receipts.receipt import RECEIPT_DOMAIN, Receipt
from pinaivu_box.store import integrity
from pinaivu_box.store.schema import CURRENT

_SECRETS = (
    "identity.key",
    "pinaivu.db",
    "pinaivu.db-wal",
    "pinaivu.db-shm",
    "run.json",
    "tls/self-signed.key",
)
_LEFT_BEHIND = ("backup.new", "restore.new")
_RESTORE = "restore a backup: 'pinaivu restore FILE --force'"


def is_served(home: Path) -> bool:
    """Whether a server runs on the home.  Raises OSError.

    Testing the lock holds it for microseconds, in which no server can start.
    """
    try:
        handle = os.open(home / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def permissions(home: Path) -> Iterator[Check]:
    if not home.exists():
        yield Check("home", "warning", f"{home} does not exist", "'pinaivu serve' creates it")
        return
    status = home.stat()
    if not stat.S_ISDIR(status.st_mode):
        yield Check("home", "failed", f"{home} is not a directory", "choose another --home")
        return
    wrong = list(_wrong(home, status))
    yield from wrong
    for name in _LEFT_BEHIND:
        if (home / name).exists():
            process = name.split(".")[0]
            finding = (
                f"{home / name} was left by an interrupted {process}, or is used by a running one"
            )
            todo = f"if none is running: rm -r {shlex.quote(str(home / name))}"
            yield Check("home", "warning", finding, todo)
    if not wrong:
        yield Check("home", "ok", f"{home} is accessible to its owner only")


def _wrong(home: Path, status: os.stat_result) -> Iterator[Check]:
    if status.st_uid != os.geteuid():
        todo = f"run as that user, or chown -R {os.geteuid()} {shlex.quote(str(home))}"
        yield Check("home", "failed", f"{home} belongs to user {status.st_uid}", todo)
    elif not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        todo = f"chmod 700 {shlex.quote(str(home))}"
        yield Check("home", "failed", f"{home} is not writable", todo)
    forbidden = [(home, 0o077, "700", "other users can enter")]
    forbidden += [(home / name, 0o077, "600", "other users can read") for name in _SECRETS]
    forbidden += [(home / "config.toml", 0o022, "600", "other users can change")]
    for path, bits, mode, why in forbidden:
        if path.exists() and path.stat().st_mode & bits:
            todo = f"chmod {mode} {shlex.quote(str(path))}"
            yield Check("home", "failed", f"{why} {path}", todo)


def newest_receipt(home: Path) -> tuple[Receipt, bytes, bytes] | None:
    """The newest receipt, its signed bytes and its signature; None if none can be read."""
    try:
        with integrity.reading(home / "pinaivu.db") as connection:
            # The last that was written, not the latest: the clock may have been ahead.
            row = connection.execute(
                "SELECT signed, signature FROM receipts ORDER BY rowid DESC LIMIT 1"
            ).fetchone()
        return (msgspec.json.decode(row[0], type=Receipt), row[0], row[1]) if row else None
    except (sqlite3.Error, msgspec.DecodeError):
        return None


def identity(home: Path) -> Check:
    path, newest = home / "identity.key", newest_receipt(home)
    if not path.exists():
        if newest is None:
            return Check("identity", "ok", "none yet: the first start creates it")
        finding = f"{path} is missing, but {newest[0].coordinator_id} has signed receipts"
        return Check("identity", "failed", finding, f"copy the file back, or {_RESTORE}")
    node_id = identities.load_or_create(path).node_id
    if newest is None:
        return Check("identity", "ok", node_id)
    receipt, signed, signature = newest
    if receipt.coordinator_id != node_id:
        finding = f"{path} is {node_id}, but receipts are signed by {receipt.coordinator_id}"
        return Check("identity", "failed", finding, "copy the identity.key of this box back")
    if not identities.verify(node_id, RECEIPT_DOMAIN, signed, signature):
        finding = f"the signature of the newest receipt ({receipt.request_id}) is not {node_id}'s"
        return Check("identity", "failed", finding, f"the database was changed: {_RESTORE}")
    return Check("identity", "ok", f"{node_id}, as in the newest receipt")


def database(home: Path) -> Check:
    path = home / "pinaivu.db"
    if not path.exists():
        return Check("database", "ok", "none yet: the first start creates it")
    try:
        version = integrity.check(path, str(path), home=home)
    except SchemaUnsupported as error:
        return of_error("database", error.message)
    except DatabaseUnusable as error:
        return Check("database", "failed", error.message.removesuffix("."), _RESTORE)
    older = "" if version == CURRENT.version else f"; the next start makes it {CURRENT.version}"
    size = path.stat().st_size / 1e6
    return Check("database", "ok", f"{size:,.1f} MB, whole, schema {version}{older}")
