"""Checks of the machine: disk space, clock, port and links."""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import msgspec
from nacl.signing import SigningKey

from pinaivu_box.config import Config
from pinaivu_box.doctor.check import Check, State
from pinaivu_box.doctor.home import is_served, newest_receipt
from pinaivu_box.errors import NotRunning
from pinaivu_box.identity import Identity
from pinaivu_box.processors import physical_cores, quota, taken, usable_cores
from pinaivu_box.server.serve import bind
from pinaivu_box.text import megabytes, utc_text
from pinaivu_box.tls.pinned import context_for

_TEMPORARY = 100e6  # bytes that are comfortable in TMPDIR
_NTP_UNSYNCHRONISED = 0x40  # STA_UNSYNC of adjtimex(2)
_CLOCK_SLACK = 5.0  # seconds
_LOOK_SECONDS = 0.5
_BUSY_SHARE = 0.5  # of the machine's processor time, above which it is busy


def disk(home: Path, models: Path) -> Iterator[Check]:
    places = [
        ("home", home, 100e6, 1e9),
        ("models", models, 0, 1e9),
        ("TMPDIR", Path(tempfile.gettempdir()), 0, _TEMPORARY),
    ]
    for purpose, path, least, comfortable in places:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        yield space(purpose, path, shutil.disk_usage(existing).free, least, comfortable)


def space(purpose: str, path: Path, free: int, least: float, comfortable: float) -> Check:
    """The check of one path; sizes in bytes.  Below `least` the box does not work."""
    state: State = "failed" if free < least else "warning" if free < comfortable else "ok"
    todo = "" if state == "ok" else f"free some space there, or move {purpose} to another disk"
    return Check("disk", state, f"{megabytes(free)} free for {purpose} ({path})", todo)


def clock(home: Path, now: float) -> Check:
    """Check the clock; `now` is its time in Unix seconds."""
    newest = newest_receipt(home)
    if newest:
        last = datetime.fromisoformat(newest[0].timestamp).timestamp()
        if last > now + _CLOCK_SLACK:
            finding = f"it is {utc_text(now)}, but the newest receipt is from {newest[0].timestamp}"
            todo = "set the clock, which receipts and the expiry of keys depend on ('timedatectl')"
            return Check("clock", "failed", finding, todo)
    if (known := synchronised()) is False:
        finding = f"{utc_text(now)}, not synchronised"
        return Check("clock", "warning", finding, "turn on NTP: 'timedatectl set-ntp true'")
    how = "synchronised" if known else "whether it is synchronised is unknown"
    return Check("clock", "ok", f"{utc_text(now)}, {how}")


def processors(home: Path) -> Check:
    """Check how many there are for this box, and whether other programs leave it any time."""
    cores, limit, share = usable_cores(), quota(), taken(_LOOK_SECONDS)
    found = f"{cores} core{'s' if cores > 1 else ''} to compute with"
    if limit < physical_cores():
        found += f" (the control group allows {limit:g} of {physical_cores()})"
    if share is None:
        return Check("processors", "ok", found)
    found += f", {share:.0%} of the machine's processor time is taken"
    if is_served(home):
        return Check("processors", "ok", f"{found}, this box's engines included")
    if share < _BUSY_SHARE:
        return Check("processors", "ok", found)
    todo = "answers are slow beside other programs: end them, or run them with 'nice -n 19'"
    return Check("processors", "warning", found, todo)


class _Timex(ctypes.Structure):
    """The beginning of struct timex, and room for the rest.  Without modes, it is only read."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def synchronised() -> bool | None:
    """Whether the kernel says that its clock is synchronised; None if it does not say."""
    timex = _Timex()
    try:
        answer = ctypes.CDLL(None).ntp_adjtime(ctypes.byref(timex))
    except (AttributeError, OSError):
        return None
    return None if answer < 0 else not timex.status & _NTP_UNSYNCHRONISED


def port(home: Path, config: Config) -> Check:
    if is_served(home):
        return _server(home)
    host, number = config.server.host, config.server.port
    if number == 0:
        return Check("port", "ok", "any free port is used")
    bind(host, number).close()
    return Check("port", "ok", f"{host}:{number} is free")


def _server(home: Path) -> Check:
    """Check that the server on the home answers."""
    try:
        run = msgspec.json.decode((home / "run.json").read_bytes(), type=dict[str, str | int])
        url = str(run["url"])
        verify = context_for(home, url)
        httpx.get(f"{url}/health", timeout=10, trust_env=False, verify=verify).raise_for_status()
    except (OSError, KeyError, ValueError, httpx.HTTPError, NotRunning) as error:
        finding = f"the server on {home} does not answer ({error or type(error).__name__})"
        return Check("port", "failed", finding, "if it is starting, wait; otherwise restart it")
    return Check("port", "ok", f"in use by this box, which answers at {url}")


def links() -> Check:
    """Check that the library for links can be loaded and can bind a socket."""
    try:
        asyncio.run(_bind_and_close())
    except (ImportError, OSError) as error:  # its library does not fit the system's
        finding = f"links to other boxes are not possible here ({error})"
        todo = "update the system if this box is to have peers"
        return Check("peering", "warning", finding, todo)
    return Check("peering", "ok", "links to other boxes are possible")


async def _bind_and_close() -> None:
    from pinaivu_box.transport.iroh_transport import IrohTransport  # 18 MB, only if it is wanted

    await (await IrohTransport.bind(Identity(SigningKey.generate()), "127.0.0.1", 0)).close()
