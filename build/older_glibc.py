"""Libraries of this system that run with an older glibc than this system's.

Debian 12 has glibc 2.36, and its libraries ask for functions by the version in which glibc changed
them last.  Nearly all are older: glibc 2.34 moved those of threads from libpthread to libc, where
they got a new version, and `hypot` got one for a faster variant.  A few are new, and glibc_check.c
has them for systems that do not.  The copies of the libraries in the executable take both without a
version (as patchelf's --clear-symbol-version does), and ask for the versions that nothing else
needs only weakly, which the dynamic linker does not insist on.
"""

import struct

from glibc import VERSION, WEAK, Elf, NotElf

NO_VERSION = 1  # VER_NDX_GLOBAL
FLOOR = (2, 31)  # of Debian 11 and Ubuntu 20.04; what is older than that stays as it is
# Functions that glibc 2.31 has, in libc, libm, or a library that the executable loads.
OLDER = frozenset(
    {
        "__pthread_key_create",
        "dladdr",
        "dlclose",
        "dlerror",
        "dlopen",
        "dlsym",
        "forkpty",
        "hypot",
        "login_tty",
        "openpty",
        "pthread_attr_getstacksize",
        "pthread_attr_setaffinity_np",
        "pthread_attr_setstacksize",
        "pthread_condattr_setclock",
        "pthread_create",
        "pthread_detach",
        "pthread_getaffinity_np",
        "pthread_getcpuclockid",
        "pthread_getspecific",
        "pthread_join",
        "pthread_key_create",
        "pthread_key_delete",
        "pthread_kill",
        "pthread_mutex_trylock",
        "pthread_mutexattr_destroy",
        "pthread_mutexattr_init",
        "pthread_mutexattr_settype",
        "pthread_once",
        "pthread_rwlock_destroy",
        "pthread_rwlock_init",
        "pthread_rwlock_rdlock",
        "pthread_rwlock_unlock",
        "pthread_rwlock_wrlock",
        "pthread_setaffinity_np",
        "pthread_setspecific",
        "pthread_sigmask",
        "sem_clockwait",
        "sem_close",
        "sem_destroy",
        "sem_getvalue",
        "sem_init",
        "sem_open",
        "sem_post",
        "sem_timedwait",
        "sem_trywait",
        "sem_unlink",
        "sem_wait",
        "shm_open",
        "shm_unlink",
    }
)
# What glibc_check.c has.
SUPPLIED = frozenset(
    {
        "__libc_single_threaded",
        "_dl_find_object",
        "arc4random",
        "close_range",
        "fstat",
        "fstat64",
        "fstatat64",
        "lstat",
        "lstat64",
        "mknod",
        "mknodat",
        "stat",
        "stat64",
    }
)


def lowered(content: bytes, known: frozenset[str] = OLDER | SUPPLIED) -> bytes | None:
    """The library without the versions above the floor of which it takes nothing but what is known;
    None if it has no such version."""
    try:
        elf = Elf(content)
    except NotElf:
        return None
    needs = {need.index: need for need in elf.needs()}
    newer = {index for index, need in needs.items() if _is_newer(need.version)}
    taken = [symbol for symbol in elf.taken() if symbol.version in newer]
    dropped = newer - {symbol.version for symbol in taken if symbol.name not in known}
    changed = bytearray(content)
    for symbol in taken:
        if symbol.version in dropped:
            struct.pack_into("<H", changed, symbol.version_at, NO_VERSION)
    for index in dropped:
        struct.pack_into("<H", changed, needs[index].flags_at, WEAK)
    return bytes(changed) if dropped else None


def _is_newer(version: str) -> bool:
    found = VERSION.fullmatch(version)
    return found is not None and (int(found[1]), int(found[2])) > FLOOR
