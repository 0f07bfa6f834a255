"""What the pages' verifier says of receipts, to be compared with what the box's own says."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import msgspec

from pinaivu_box.receipts.verify import LogPolicy, VerificationCheck
from tests.support.javascript import Scripts

_VERIFY = """
import { verifyReceipt } from "./verify.js";
const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const answer = ([document, nodeKey, log, given]) => {
  const transcript = given && { document: bytes(given[0]), secret: given[1] };
  return verifyReceipt(bytes(document), { nodeKey, log, transcript });
};
"""
# A text that no reader takes is said to be none in words of its own.
_NOT_READ = ("this is not a receipt: ", "this is not a proof: ", "this is not a transcript: ")


def by_page(
    scripts: Scripts,
    documents: Iterable[bytes],
    node_key: str | None = None,
    log: LogPolicy | None = None,
) -> list[list[VerificationCheck]]:
    """What the pages' verifier says of them."""
    policy = msgspec.to_builtins(log or LogPolicy())
    asked = [(_base64(document), node_key, policy, None) for document in documents]
    return _asked(scripts, asked)


def by_page_with_transcripts(
    scripts: Scripts, given: Iterable[tuple[bytes, bytes, str | None]]
) -> list[list[VerificationCheck]]:
    """The same of receipts with transcripts, and the API keys that open them."""
    return _asked(
        scripts,
        [
            (_base64(document), None, msgspec.to_builtins(LogPolicy()), (_base64(kept), secret))
            for document, kept, secret in given
        ],
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _asked(scripts: Scripts, questions: Iterable[Any]) -> list[list[VerificationCheck]]:
    return [
        [VerificationCheck(check["id"], check["ok"], check["text"]) for check in checks]
        for checks in scripts.ask(_VERIFY, questions)
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
