"""The oldest glibc that a program runs with: what its files ask the loader for.

Each symbol that a library takes of glibc has a version (`GLIBC_2.34`), and the loader refuses a
file that asks for one that it does not have.  What a file asks for is in its ELF dynamic section
(DT_VERNEED; see "Symbol Versioning" in the Linux Standard Base), which is read here.
"""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NEWEST = (2, 35)  # the newest that a release may need: that of Ubuntu 22.04
VERSION = re.compile(r"GLIBC_([0-9]{1,3})\.([0-9]{1,3})(?:\.[0-9]{1,3})?")
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_STRTAB, DT_SYMTAB = 0, 5, 6
DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF
SHT_GNU_VERSYM = 0x6FFFFFFF
WEAK = 2  # VER_FLG_WEAK: asked for, but not insisted on


class NotElf(ValueError):
    """The file is no ELF file of 64 bits in little endian."""


@dataclass(frozen=True)
class GlibcNeed:
    """The newest version of glibc that `file` asks for."""

    version: tuple[int, int]
    file: str

    def __str__(self) -> str:
        return f"glibc {self.version[0]}.{self.version[1]} ({self.file})"


def baseline(files: Iterable[tuple[str, bytes]]) -> GlibcNeed:
    """What asks for most among files (name, content); those that are not ELF are passed over."""
    found = [GlibcNeed((0, 0), "nothing")]
    for name, content in files:
        try:
            found.append(GlibcNeed(newest(content), name))
        except NotElf:
            continue
    return max(found, key=lambda need: need.version)


def below(folder: Path) -> Iterable[tuple[str, bytes]]:
    """The files in a folder, as `baseline` takes them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def newest(content: bytes) -> tuple[int, int]:
    """The newest version of glibc that an ELF file asks for, (0, 0) if it asks for none."""
    found = [VERSION.fullmatch(version) for version in versions(content)]
    return max(((int(one[1]), int(one[2])) for one in found if one), default=(0, 0))


def versions(content: bytes) -> set[str]:
    """All versions of symbols that an ELF file insists on.  Raises NotElf."""
    return {need.version for need in Elf(content).needs() if not need.weak}


@dataclass(frozen=True)
class NeededVersion:
    """A version that an ELF file asks for: its index in the file, and where its flags are."""

    version: str
    index: int
    weak: bool
    flags_at: int


@dataclass(frozen=True)
class Taken:
    """A symbol that an ELF file takes of another: the index of its version, and where that is."""

    name: str
    version: int
    version_at: int


class Elf:
    """A file.  Raises NotElf, and ValueError for one that is damaged."""

    def __init__(self, content: bytes) -> None:
        if content[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
            raise NotElf
        self._content = content
        (start, size, count) = (*self._read("<Q", 32), *self._read("<HH", 54))
        headers = [self._read("<IIQQQQQ", start + size * n) for n in range(count)]
        self._loaded = [(at, address, length) for kind, _, at, address, _, length, _ in headers
                        if kind == PT_LOAD]  # fmt: skip
        dynamic = [(at, length) for kind, _, at, _, _, length, _ in headers if kind == PT_DYNAMIC]
        self._entries = self._read_entries(*dynamic[0]) if dynamic else {}

    def needs(self) -> list[NeededVersion]:
        found: list[NeededVersion] = []
        if DT_VERNEED not in self._entries:
            return found
        strings, at = self._offset(DT_STRTAB), self._offset(DT_VERNEED)
        for _ in range(self._entries[DT_VERNEEDNUM]):
            _, count, _, first, following = self._read("<HHIII", at)
            version = at + first
            for _ in range(count):
                _, flags, index, name, next_one = self._read("<IHHII", version)
                text = self._text(strings + name)
                found.append(NeededVersion(text, index, bool(flags & WEAK), version + 4))
                version += next_one
            at += following
        return found

    def taken(self) -> list[Taken]:
        """The symbols that are not defined in the file, if those have versions."""
        if DT_VERSYM not in self._entries:
            return []
        symbols, strings = self._offset(DT_SYMTAB), self._offset(DT_STRTAB)
        first = self._offset(DT_VERSYM)
        found = []
        for n in range(self._number_of_symbols()):
            name, _, _, section = self._read("<IBBH", symbols + 24 * n)
            (version,) = self._read("<H", first + 2 * n)
            if section == 0 and name:
                text = self._text(strings + name)
                found.append(Taken(text, version & 0x7FFF, first + 2 * n))
        return found

    def _number_of_symbols(self) -> int:
        """The symbol table has no end of its own: the section of versions has as many entries."""
        start, size, count = *self._read("<Q", 40), *self._read("<HH", 58)
        for n in range(count):
            kind, _, _, _, length = self._read("<IQQQQ", start + size * n + 4)
            if kind == SHT_GNU_VERSYM:
                return length // 2
        return 0

    def _read_entries(self, start: int, length: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for at in range(start, start + length, 16):
            tag, value = self._read("<QQ", at)
            if tag == DT_NULL:
                break
            found[tag] = value
        return found

    def _offset(self, tag: int) -> int:
        """In the file, of what the dynamic section says is loaded at an address."""
        address = self._entries[tag]
        for at, first, length in self._loaded:
            if first <= address < first + length:
                return at + address - first
        raise ValueError(f"an ELF file is damaged: nothing is loaded at {address:#x}")

    def _text(self, at: int) -> str:
        return self._content[at : self._content.index(b"\0", at)].decode()

    def _read(self, form: str, at: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(form, self._content, at)
        except struct.error as error:
            raise ValueError(f"an ELF file is damaged: {error}") from error
