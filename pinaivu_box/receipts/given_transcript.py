"""A transcript as somebody gives it to a verifier: read as strictly as a receipt, and opened if it
is sealed."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from pinaivu_box.errors import Unreadable
from pinaivu_box.log import note
from pinaivu_box.receipts import strict_json, transcript_sealing
from pinaivu_box.receipts.receipt import RequestId
from pinaivu_box.receipts.transcript import CommittedTranscript

_OTHER_KEY = (
    "it is not sealed to this key's secret: it needs the one that the key had when the request was "
    "made"
)


class NotATranscript(ValueError):
    """`str(error)` is the whole sentence, without a full stop."""


class TranscriptDocument(Struct, frozen=True, forbid_unknown_fields=True):
    """As `GET /v1/receipts/{request_id}/transcript` returns it."""

    request_id: RequestId
    transcript: CommittedTranscript | None = None
    sealed: str | None = None
    sealed_to: str | None = None
    object: Literal["transcript"] = "transcript"


def read(document: bytes, secret: str | None) -> CommittedTranscript:
    """The transcript of a document: what the API returns, or the transcript alone.  `secret` is the
    API key, which a sealed one needs.  Raises NotATranscript."""
    try:
        value = strict_json.parse(document.decode())
        if isinstance(value, dict) and "prompts" in value:
            return msgspec.json.decode(document, type=CommittedTranscript)
        shown = msgspec.json.decode(document, type=TranscriptDocument)
        if (shown.transcript is None) == (shown.sealed is None):
            raise ValueError("it has none, or two of them")
        found = shown.transcript or _opened(shown, secret)
    except NotATranscript:
        raise
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise NotATranscript(f"this is not a transcript: {error}") from error
    if found.request_id != shown.request_id:
        raise NotATranscript(f"it is that of {found.request_id}, as one of {shown.request_id}")
    return found


def _opened(shown: TranscriptDocument, secret: str | None) -> CommittedTranscript:
    """Raises ValueError, RecursionError."""
    if secret is None:
        raise NotATranscript("it is sealed: the API key that made the request opens it")
    sealed = note.decode(shown.sealed or "")
    try:
        if shown.sealed_to not in (None, transcript_sealing.public_half(secret).hex()):
            raise NotATranscript(_OTHER_KEY)
        content = transcript_sealing.open_sealed(sealed, secret)
    except Unreadable as error:
        raise NotATranscript(_OTHER_KEY) from error
    strict_json.parse(content.decode())
    return msgspec.json.decode(content, type=CommittedTranscript)
