"""What the pages' verifier says of receipts, to be compared with what the box's own says."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import msgspec

from pinaivu_box.receipts.verify import LogPolicy, VerificationCheck
from tests.support.javascript import Scripts

_VERIFY = """
import { verifyReceipt } from "./verify.js";
const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const answer = ([document, nodeKey, log]) => verifyReceipt(bytes(document), { nodeKey, log });
"""
# A text that no reader takes is said to be none in words of its own.
_NOT_READ = ("this is not a receipt: ", "this is not a proof: ")


def by_page(
    scripts: Scripts,
    documents: Iterable[bytes],
    node_key: str | None = None,
    log: LogPolicy | None = None,
) -> list[list[VerificationCheck]]:
    """What the pages' verifier says of them."""
    policy = msgspec.to_builtins(log or LogPolicy())
    asked = [(base64.b64encode(document).decode(), node_key, policy) for document in documents]
    return [
        [VerificationCheck(check["id"], check["ok"], check["text"]) for check in checks]
        for checks in scripts.ask(_VERIFY, asked)
    ]


def told(checks: list[VerificationCheck]) -> list[tuple[str, bool, str]]:
    """The checks; of what was not read, only that it was not."""
    return [
        (
            check.name,
            check.ok,
            next((start for start in _NOT_READ if check.meaning.startswith(start)), check.meaning),
        )
        for check in checks
    ]
