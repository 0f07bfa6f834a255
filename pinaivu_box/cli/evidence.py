"""Evidence for `pinaivu ledger`: put together from the ledger, the receipt and the transcript."""

from __future__ import annotations

from typing import Any

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.transcripts import secret_of
from pinaivu_box.errors import CliError, Unreadable


def evidence_of(call: Call, request_id: str, leg: tuple[int, int], key_file: str | None) -> Any:
    """The `audits.disproof.Evidence` about a leg (its number, and that of its choice) of a request.
    What is sealed is only in it with the request's key.  Raises CliError."""
    from pinaivu_box.audits.disproof import Evidence
    from pinaivu_box.ledger import disproofs
    from pinaivu_box.receipts.receipt import view
    from pinaivu_box.receipts.transcript_view import opened, transcript_view
    from pinaivu_box.store import requests, transcripts

    secret = secret_of(key_file)

    async def work(database: Any) -> Any:
        found = await disproofs.of_request(database, request_id)
        stored = next((one for one in found if (one.leg, one.choice) == leg), None)
        if stored is None:
            raise CliError(
                f"No audit has proven leg {leg[0]} of choice {leg[1]} of {request_id[:100]} false: "
                "'pinaivu ledger disproofs' lists those that are."
            )
        receipt = await requests.find_receipt(database, request_id, account_id=None)
        kept = await transcripts.find(database, request_id, account_id=None)
        signed, signature = stored.signed.decode(), stored.signature.hex()
        if receipt is None or kept is None or (kept.sealed_to is not None and secret is None):
            return Evidence(signed, signature)
        try:
            transcript = opened(transcript_view(request_id, kept.body, kept.sealed_to), secret)
        except Unreadable as error:
            raise CliError(error.message) from error
        shown = view(receipt.signed, receipt.signature, receipt.opening)
        return Evidence(signed, signature, shown, transcript)

    return call.in_database(work)
