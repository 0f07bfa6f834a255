"""Applies a unified diff to a folder, as `patch -p0` would: that program is not everywhere.

Every line of a hunk has to be where the diff says, with nothing guessed: a patch is for one version
of a source.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from common import Stop

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def apply(patch: Path, root: Path) -> None:
    """Changes files below `root`.  Raises Stop, before any is written, if one is not as the patch
    has it."""
    changed = {}
    for name, hunks in _files(patch.read_text().splitlines(keepends=True)):
        path = root / name
        try:
            changed[path] = _patched(path.read_text(), hunks)
        except (OSError, ValueError) as error:
            raise Stop(f"{patch.name} is for another version of {name}: {error}") from None
    for path, text in changed.items():
        path.write_text(text)


def changed_files(patch: Path) -> list[str]:
    """Their names in the patch."""
    return [name for name, _ in _files(patch.read_text().splitlines(keepends=True))]


def _files(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each file's name with the lines of its hunks."""
    starts = [number for number, line in enumerate(lines) if line.startswith("diff ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        header = next(n for n in range(start, end) if lines[n].startswith("+++ "))
        yield lines[header].removeprefix("+++ ").strip(), lines[header + 1 : end]


def _patched(text: str, hunks: list[str]) -> str:
    """Raises ValueError if a line is not as a hunk has it."""
    old, new = text.splitlines(keepends=True), []
    at = 0  # lines of `old` that are done
    for line in hunks:
        if begins := _HUNK.match(line):
            start = int(begins[1]) - 1
            if not at <= start <= len(old):
                raise ValueError(f"no line {start + 1}")
            new += old[at:start]
            at = start
            continue
        kind, content = line[0], line[1:]
        if kind in " -":
            if old[at : at + 1] != [content]:
                raise ValueError(f"line {at + 1} differs")
            at += 1
        if kind in " +":
            new.append(content)
    return "".join(new + old[at:])
