"""What computing legs again has found: the interface of sampled audits to what computes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

from msgspec import Struct

from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.receipts.transcript import RequestTranscript

Result = Literal["agreed", "failed", "disproved", "not_auditable"]


class Finding(Struct, frozen=True):
    """Of one leg.  `failed`: by statistics, which are wrong now and then; `disproved`: the peer has
    promised the very bits, and they are others.

    `why` is the end of a sentence, and `report` JSON.  Those of a disproof are kept, also when the
    request's account is erased, and name no token of the output; neither is logged.  `evaded`: it
    is not auditable because of what the peer signed, and not for lack of something here.
    """

    result: Result
    why: str = ""
    report: dict[str, Any] = {}
    evaded: bool = False


# Computes these legs of a request again, on this box; a finding for each.  If it is cancelled it
# stops computing.  Raises BoxError if it cannot be done now.
Replay = Callable[[RequestTranscript, Sequence[LegToAudit]], Coroutine[Any, Any, list[Finding]]]
