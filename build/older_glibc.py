"""Libraries of this system that an older glibc than this system's runs.

Debian 12 has glibc 2.36, and its libstdc++ takes a single function of that: arc4random.  The copy
in the executable asks for no version of it (as patchelf's --clear-symbol-version does), and for
glibc 2.36 only weakly, which the dynamic linker does not insist on.  On a system without the
function, the one of glibc_check.c is found.
"""

import struct

from glibc import WEAK, Elf, NotElf

SUPPLIED = frozenset({"arc4random"})  # by glibc_check.c
GLOBAL = 1  # VER_NDX_GLOBAL: of no version


def lowered(content: bytes, supplied: frozenset[str] = SUPPLIED) -> bytes | None:
    """The library with those functions of no version, and without the versions that nothing else
    in it needs; None if it takes none of them of another library."""
    try:
        elf = Elf(content)
    except NotElf:
        return None
    changed = bytearray(content)
    kept: set[int] = set()
    dropped: set[int] = set()
    for symbol in elf.taken():
        if symbol.name in supplied and symbol.version > GLOBAL:
            struct.pack_into("<H", changed, symbol.version_at, GLOBAL)
            dropped.add(symbol.version)
        else:
            kept.add(symbol.version)
    for need in elf.needs():
        if need.index in dropped - kept:
            struct.pack_into("<H", changed, need.flags_at, WEAK)
    return bytes(changed) if dropped else None
