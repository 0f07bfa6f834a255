"""Runs a command under the restrictions of a unit that need neither systemd nor a privilege:

    python -m tests.support.confined UNIT COMMAND...

They are made of the unit's own lines, as systemd makes them: by seccomp, for all that the command
starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

LIBRARY = "libseccomp.so.2"
_ALLOW = 0x7FFF0000
_EQUAL, _MASKED_EQUAL = 4, 7  # enum scmp_compare
_NOT_EQUAL = 1
_NO_NEW_PRIVILEGES = 38  # of prctl(2)
_REFUSE_EXEC_GAIN = (65, 1)  # PR_SET_MDWE, from Linux 6.3 on
_WRITE_AND_EXEC, _EXEC = 6, 4  # of mmap(2)
_SHM_EXEC = 0o100000
_NAMESPACES = 0x7E020080  # all that clone(2) makes
_FAMILIES = 46


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class _Filter:
    """A filter of system calls: those that match none of its rules have the `default` action."""

    def __init__(self, default: int) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(default)))

    def add(self, action: int, call: str, *compared: tuple[int, int, int, int]) -> None:
        """A rule for a system call whose arguments compare so; none for one that this machine does
        not have."""
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return
        array = (_Comparison * len(compared))(*(_Comparison(*each) for each in compared))
        result = self._library.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(action), number, len(compared), array
        )
        if result not in (0, -errno.EACCES):  # it does by default what the rule says
            raise OSError(-result, f"no rule for {call}")

    def load(self) -> None:
        if result := self._library.seccomp_load(self._context):
            raise OSError(-result, "the filter cannot be loaded")


def _refusal(code: int = errno.EPERM) -> int:
    return 0x00050000 | code


@cache
def calls_of(group: str) -> frozenset[str]:
    """The system calls of a group such as "@system-service"."""
    done = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    )
    names = [line.strip() for line in done.stdout.splitlines()[1:]]
    names = [name for name in names if name and not name.startswith("#")]
    inner = (calls_of(name) if name.startswith("@") else {name} for name in names)
    return frozenset().union(*inner)


def _system_calls(lines: list[str]) -> Iterator[_Filter]:
    allowed: set[str] = set()
    for line in lines:
        groups = [calls_of(name) for name in line.removeprefix("~").split()]
        calls = frozenset().union(*groups)
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    made = _Filter(_refusal())
    for call in allowed:
        made.add(_ALLOW, call)
    yield made


def _write_or_execute(_: list[str]) -> Iterator[_Filter]:
    made = _Filter(_ALLOW)
    made.add(_refusal(), "mmap", (2, _MASKED_EQUAL, _WRITE_AND_EXEC, _WRITE_AND_EXEC))
    made.add(_refusal(), "mprotect", (2, _MASKED_EQUAL, _EXEC, _EXEC))
    made.add(_refusal(), "pkey_mprotect", (2, _MASKED_EQUAL, _EXEC, _EXEC))
    made.add(_refusal(), "shmat", (2, _MASKED_EQUAL, _SHM_EXEC, _SHM_EXEC))
    yield made


def _address_families(lines: list[str]) -> Iterator[_Filter]:
    allowed = {getattr(socket, name) for name in lines[0].split()}
    made = _Filter(_ALLOW)
    for family in set(range(_FAMILIES)) - allowed:
        made.add(_refusal(errno.EAFNOSUPPORT), "socket", (0, _EQUAL, family, 0))
    yield made


def _namespaces(_: list[str]) -> Iterator[_Filter]:
    made = _Filter(_ALLOW)
    made.add(_refusal(), "unshare")
    made.add(_refusal(), "setns")
    made.add(_refusal(errno.ENOSYS), "clone3")  # its flags are in memory, where no filter looks
    for bit in range(64):
        if (flag := 1 << bit) & _NAMESPACES:
            made.add(_refusal(), "clone", (0, _MASKED_EQUAL, flag, flag))
    yield made


def _personality(_: list[str]) -> Iterator[_Filter]:
    made = _Filter(_ALLOW)
    made.add(_refusal(), "personality", (0, _NOT_EQUAL, 0, 0))
    yield made


def _set_ids(_: list[str]) -> Iterator[_Filter]:
    made = _Filter(_ALLOW)
    for call, argument in (("chmod", 1), ("fchmod", 1), ("fchmodat", 2), ("mkdir", 1)):
        for bit in (0o4000, 0o2000):
            made.add(_refusal(), call, (argument, _MASKED_EQUAL, bit, bit))
    yield made


def _realtime(_: list[str]) -> Iterator[_Filter]:
    made = _Filter(_ALLOW)
    for policy in (1, 2, 6):  # SCHED_FIFO, SCHED_RR, SCHED_DEADLINE
        made.add(_refusal(), "sched_setscheduler", (1, _EQUAL, policy, 0))
    yield made


_RESTRICTIONS: dict[str, Callable[[list[str]], Iterator[_Filter]]] = {
    "MemoryDenyWriteExecute": _write_or_execute,
    "RestrictAddressFamilies": _address_families,
    "RestrictNamespaces": _namespaces,
    "LockPersonality": _personality,
    "RestrictSUIDSGID": _set_ids,
    "RestrictRealtime": _realtime,
    "SystemCallFilter": _system_calls,  # last, for the others need calls that it refuses
}


def confine(unit: str) -> list[str]:
    """Restrict this process as the unit says; the names of what was restricted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    filters: list[_Filter] = []
    names: list[str] = []
    for name, make in _RESTRICTIONS.items():
        if lines := re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE):
            filters += make(lines)
            names.append(name)
            if name == "MemoryDenyWriteExecute":
                libc.prctl(*_REFUSE_EXEC_GAIN, 0, 0, 0)  # as newer versions of systemd do
    for each in filters:
        each.load()
    return names


def main() -> None:
    unit, *command = sys.argv[1:]
    confine(Path(unit).read_text())
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
