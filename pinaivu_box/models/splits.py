"""Models in several files, as `llama-gguf-split` makes them: names, order and digest.

`NAME-00002-of-00003.gguf` is the second of three files of one model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pinaivu_box.models.gguf import Header
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.names import printable

MAX_PARTS = 1000
RENAME_IT = ": rename it"  # the end of a reason
_NAME = re.compile(
    r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.gguf)",
    re.DOTALL | re.IGNORECASE,
)
_DIGEST_DOMAIN = b"pinaivu/model-parts/v1\n"


@dataclass(frozen=True)
class PartName:
    """Part `number` (from 1) of `count`."""

    stem: str
    number: int
    count: int
    suffix: str

    @property
    def all_parts(self) -> list[str]:
        """The names of all parts, in their order."""
        return [
            f"{self.stem}-{number:05}-of-{self.count:05}{self.suffix}"
            for number in range(1, self.count + 1)
        ]


def parse(name: str) -> PartName | None:
    """None for the name of a file that is a whole model.  Raises BadGguf."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    part = PartName(match["stem"], int(match["number"]), int(match["count"]), match["suffix"])
    if not 1 <= part.number <= part.count:
        raise BadGguf(f"its name says that it is part {part.number} of {part.count}")
    if part.count > MAX_PARTS:
        raise BadGguf(f"its name says that it has {part.count} parts, more than {MAX_PARTS}")
    return part if part.count > 1 else None


def names(stem: str, count: int) -> list[str]:
    """What the files of a model in so many files are called."""
    return [f"{stem}.gguf"] if count == 1 else PartName(stem, 1, count, ".gguf").all_parts


def stem_of(name: str) -> str:
    """The name of a model's file, or of any of its parts, without number and suffix."""
    match = _NAME.fullmatch(name)
    return match["stem"] if match else name[: -len(".gguf")]


def grouped(
    files: Sequence[Path], not_served: dict[Path, str]
) -> list[tuple[int, dict[int, Path]]]:
    """Of each model in these files, how many parts it has, and its files by the number of the part;
    a file of its own is part 1 of 1.  Files that fit nowhere are noted."""
    groups: dict[tuple[Path, int], dict[int, Path]] = {}
    for path in files:
        try:
            part = parse(path.name)
            if part is None:
                groups[path, 1] = {1: path}
                continue
            group = groups.setdefault((path.with_name(part.stem), part.count), {})
            if part.number in group:
                raise BadGguf(f"{printable(group[part.number].name)} is the same part{RENAME_IT}")
            group[part.number] = path
        except BadGguf as error:
            not_served[path] = str(error)
    return [(count, group) for (_, count), group in groups.items()]


def check_complete(count: int, present: Sequence[int]) -> None:
    """Check that all parts are present.  Raises BadGguf."""
    missing = sorted(set(range(1, count + 1)) - set(present))
    if missing:
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        which = (
            f"part {named} of {count} is" if len(missing) == 1 else f"parts {named} of {count} are"
        )
        raise BadGguf(f"it is incomplete: {which} missing")


def check_consistent(headers: Sequence[Header]) -> int:
    """Check that the headers of a model's files, in the order of their names, agree with those
    names.  Returns the number of tensors in all.  Raises BadGguf."""
    if len(headers) == 1:
        _check_single(headers[0])
        return headers[0].tensors
    for number, header in enumerate(headers, 1):
        if (header.part, header.parts) != (number, len(headers)):
            claim = (
                f"says that it is part {header.part} of {header.parts}"
                if header.parts
                else "does not say that it is a part of a model"
            )
            raise BadGguf(f"part {number} of {len(headers)} {claim}")
    tensors = sum(header.tensors for header in headers)
    if headers[0].all_tensors not in (0, tensors):
        raise BadGguf(f"its parts have {tensors} tensors, not {headers[0].all_tensors}")
    return tensors


def _check_single(header: Header) -> None:
    if header.parts > 1:
        raise BadGguf(
            f"it is part {header.part} of {header.parts} of a model, and its name does not say so: "
            f"name it NAME-{header.part:05}-of-{header.parts:05}.gguf"
        )


def digest_of_parts(digests: Sequence[str]) -> str:
    """The digest of a model in several files, from those of its parts (SHA-256 in hex) in their
    order; see docs/receipts.md."""
    joined = b"".join(bytes.fromhex(digest) for digest in digests)
    count = len(digests).to_bytes(4, "big")
    return hashlib.sha256(_DIGEST_DOMAIN + count + joined).hexdigest()
