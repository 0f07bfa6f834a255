"""The progress of a pull."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from pinaivu_box.files.download import Download
from pinaivu_box.models import licenses

if TYPE_CHECKING:
    from pinaivu_box.registry.transfer import Transfer

State = Literal["copying", "checking", "done", "failed"]


class PullSource(Struct, frozen=True):
    """`bytes` came from this peer; `left_out` says why it is not asked for more."""

    peer: str
    name: str
    bytes: int
    left_out: str = ""


class PullProgress(Struct, frozen=True):
    """`bytes` of `size` have been copied.  The last line is `done`, or `failed` with a `message`;
    `done` has a message too if there was nothing to copy.  `license` is the licence's name, as far
    as a registry says it."""

    state: State
    model: str
    digest: str
    size: int
    bytes: int
    sources: list[PullSource]
    message: str = ""
    request_id: str = ""
    license: str = ""


def license_of(copy: Download | Transfer) -> str:
    """The name of the licence of what is copied."""
    if isinstance(copy, Download):
        return ""
    return licenses.name_in(copy.record.id, copy.record.license)


def sources_of(copy: Download | Transfer) -> list[PullSource]:
    """Where the bytes of a copy come from, by name."""
    return [
        PullSource(source.peer, source.name, copy.sent[source], copy.left_out.get(source, ""))
        for source in sorted({*copy.sources, *copy.left_out}, key=lambda source: source.name)
    ]
