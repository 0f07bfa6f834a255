"""Transcripts for `pinaivu receipts`: from a file or the database, opened if they are sealed."""

from __future__ import annotations

import os
from typing import Any

import click
import msgspec

from pinaivu_box.cli import documents
from pinaivu_box.cli.call import Call
from pinaivu_box.errors import CliError, Unreadable

_VARIABLE = "PINAIVU_API_KEY"

key_file_option = click.option(
    "--key-file",
    metavar="FILE",
    help="File with the API key that opens a sealed transcript.  [env: PINAIVU_API_KEY]",
)


def stored_transcript(call: Call, file_or_id: str, key_file: str | None) -> Any:
    """The `RequestTranscript` of a file, or of a request of the home's database.

    Raises CliError, also if it is sealed to another key than is given.
    """
    from pinaivu_box.receipts.transcript_view import opened

    try:
        return opened(_view(call, file_or_id), secret_of(key_file))
    except Unreadable as error:
        raise CliError(error.message) from error


def given_transcript(call: Call, file_or_id: str) -> bytes:
    """The transcript as a verifier reads it: what a file has, or one of the home's database.
    Raises CliError."""
    if (found := documents.document(file_or_id)) is not None:
        return found
    return msgspec.json.encode(_from_database(call, file_or_id))


def _view(call: Call, file_or_id: str) -> Any:
    from pinaivu_box.receipts.transcript_view import read

    if (data := documents.document(file_or_id)) is None:
        return _from_database(call, file_or_id)
    try:
        return read(data)
    except ValueError as error:
        raise CliError(
            f"{file_or_id} is no transcript as GET /v1/receipts/ID/transcript returns it: {error}."
        ) from error


def _from_database(call: Call, request_id: str) -> Any:
    from pinaivu_box.receipts.transcript_view import transcript_view
    from pinaivu_box.store import transcripts

    if not request_id.startswith("req_"):
        raise CliError(f"There is no file {request_id}, and request ids begin with req_.")
    if not (call.home / "pinaivu.db").exists():
        raise CliError(f"There is no box in {call.home}: choose another --home, or give a file.")
    stored = call.in_database(
        lambda database: transcripts.find(database, request_id, account_id=None)
    )
    if stored is None:
        raise CliError(f"There is no transcript of {request_id} in {call.home}.")
    return transcript_view(request_id, stored.body, stored.sealed_to)


def secret_of(key_file: str | None) -> str | None:
    """The API key of a file, or of the environment.  Raises CliError."""
    from pinaivu_box.secret import read_secret

    if key_file is not None:
        secret = read_secret("--key-file", "", key_file)
    else:
        secret = read_secret(_VARIABLE, _VARIABLE, "") if os.environ.get(_VARIABLE) else None
    return None if secret is None else secret.reveal()
