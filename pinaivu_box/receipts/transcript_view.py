"""A stored transcript as the API shows it, and how it is read."""

from __future__ import annotations

import base64
import binascii

import msgspec
from msgspec import Struct

from pinaivu_box.errors import Unreadable
from pinaivu_box.receipts import transcript_sealing
from pinaivu_box.receipts.transcript import RequestTranscript, decode


class TranscriptView(Struct, frozen=True):
    """Either the `transcript`, or `sealed` (base64) to the public half `sealed_to` (hex), which is
    made of the secret that the API key had when the request was made."""

    request_id: str
    transcript: RequestTranscript | None = None
    sealed: str | None = None
    sealed_to: str | None = None
    object: str = "transcript"


_decoder = msgspec.json.Decoder(TranscriptView)
_alone = msgspec.json.Decoder(dict[str, msgspec.Raw])


def transcript_view(request_id: str, body: bytes, sealed_to: bytes | None) -> TranscriptView:
    """Of a stored body.  Raises Unreadable."""
    if sealed_to is None:
        return TranscriptView(request_id, _transcript(body, request_id))
    sealed = base64.b64encode(body).decode()
    return TranscriptView(request_id, sealed=sealed, sealed_to=sealed_to.hex())


def read(document: bytes) -> TranscriptView:
    """What the API returns, or the transcript alone, as `pinaivu receipts transcript` prints it.
    Raises ValueError."""
    try:
        if "prompts" in _alone.decode(document):
            transcript = decode(document)
            return TranscriptView(transcript.request_id, transcript)
        return _decoder.decode(document)
    except (RecursionError, UnicodeDecodeError) as error:
        raise ValueError("it is no JSON of a transcript") from error


def opened(view: TranscriptView, secret: str | None) -> RequestTranscript:
    """The transcript; `secret` is the API key, which a sealed one needs.  Raises Unreadable."""
    if view.transcript is not None:
        return view.transcript
    if view.sealed is None:
        raise Unreadable(f"The transcript of {view.request_id} is not in the document.")
    if secret is None:
        raise Unreadable(
            "The transcript is sealed: give the API key that made the request (--key-file, or "
            "PINAIVU_API_KEY)."
        )
    try:
        sealed = base64.b64decode(view.sealed, validate=True)
    except (binascii.Error, ValueError):
        sealed = b""
    return _transcript(transcript_sealing.open_sealed(sealed, secret), view.request_id)


def _transcript(body: bytes, request_id: str) -> RequestTranscript:
    try:
        transcript = decode(body)
    except ValueError as error:
        raise Unreadable(f"The transcript of {request_id} cannot be read: {error}.") from error
    if transcript.request_id != request_id:
        raise Unreadable(
            f"The transcript of {request_id} is that of {transcript.request_id}: one was put in "
            "the other's place."
        )
    return transcript
