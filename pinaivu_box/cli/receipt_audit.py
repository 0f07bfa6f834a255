"""What `pinaivu receipts audit` does: an engine of its own computes the answer again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgspec

from pinaivu_box.cli.call import Call
from pinaivu_box.errors import BoxError, CliError

# From an engine, the model, and the legs: the transcript of their request.  Raises CliError.
TranscriptReader = Callable[[Any, Any, list[Any]], Awaitable[Any]]
_MARKS = {"agrees": "ok    ", "differs": "DIFFERS", "not auditable": "unknown"}


def audit_receipt(
    call: Call, document: bytes, read: TranscriptReader, node_key: str | None
) -> None:
    """Print the audit of a receipt; `read` gives the transcript of its request.  Ends the process
    with 1 unless all agrees, prompts too.  Raises CliError."""
    proofs, legs = _signed_legs(document, node_key)
    report = asyncio.run(_audit(call, read, proofs, legs))
    call.print(report, print_report)
    if report["verdict"] != "agrees" or report["other_prompts"]:
        sys.exit(1)


def _signed_legs(document: bytes, node_key: str | None) -> tuple[list[Any], list[Any]]:
    """The statements of all legs, and those of boxes with what opens their commitments.  Raises
    CliError unless the receipt verifies."""
    from pinaivu_box.audits.pending import LegToAudit
    from pinaivu_box.receipts.receipt import Proof, Receipt, ReceiptView
    from pinaivu_box.receipts.transcript import openings_of
    from pinaivu_box.receipts.verify import read_statement, verify_receipt

    wrong = [one for one in verify_receipt(document, node_key=node_key) if not one.ok]
    if wrong:
        raise CliError(f"The receipt does not verify: {wrong[0].name}: {wrong[0].meaning}.")
    view = msgspec.json.decode(document, type=ReceiptView)
    signed = msgspec.json.decode(view.signed_receipt, type=Receipt).proofs
    statements = [read_statement(each) for each in signed]
    if view.opening is None:
        raise CliError(
            "The receipt has no opening, without which nothing can be compared: take it as its "
            "key's owner gets it."
        )
    try:
        openings = openings_of(view.opening, statements)
    except ValueError as error:
        raise CliError(f"The receipt cannot be audited: {error}.") from error
    return statements, [
        LegToAudit(statement, each, *pair)
        for statement, each, pair in zip(statements, signed, openings, strict=True)
        if isinstance(statement, Proof)
    ]


async def _audit(call: Call, read: TranscriptReader, statements: list[Any], legs: list[Any]) -> Any:
    """The report as JSON has it.  Raises CliError."""
    from pinaivu_box.audits.auditor import audit_legs
    from pinaivu_box.audits.own_engine import NotHere, engine_for
    from pinaivu_box.errors import EngineLost

    proofs, engine = [leg.proof for leg in legs], {"build": "", "exactness": ""}
    others: set[int] = set()
    try:
        config, model, digest = await _model(call, proofs)
        try:
            async with engine_for(config, model, digest, None, proofs) as process:
                engine = {"build": process.ready.build, "exactness": process.ready.exactness}
                transcript = await read(process, model, legs)
                audits = await audit_legs(process, transcript, legs)
                others = await _other_prompts(process, model, transcript)
        except NotHere as error:
            audits = _not_here(proofs, error)
            # What a proof says of its prompt decides how large an engine has to be; not for this.
            async with engine_for(config, model, digest, None, ()) as process:
                others = await _other_prompts(process, model, await read(process, model, legs))
    except NotHere as error:
        audits = _not_here(proofs, error)
    except EngineLost as error:
        raise CliError(f"The engine ended in the middle of the audit: {error.message}") from error
    return _report(statements, audits, engine, others)


def _not_here(proofs: list[Any], error: BoxError) -> list[Any]:
    from pinaivu_box.receipts.audit import not_auditable

    why = error.message.removesuffix(".")
    return [not_auditable(proof, f"not here: {why}") for proof in proofs]


async def _other_prompts(process: Any, model: Any, transcript: Any) -> set[int]:
    from pinaivu_box.audits.prompts import other_prompts

    # With a template of its own this box cannot say what others make of a chat.
    return await other_prompts(process, transcript, chats=not model.settings.template)


async def _model(call: Call, proofs: list[Any]) -> Any:
    """The configuration of the home, its model with the proofs' digest, and who knows digests.
    Raises NotHere, CliError."""
    from pinaivu_box.audits.own_engine import NotHere, model_of
    from pinaivu_box.files.store import Digests
    from pinaivu_box.home import database_of
    from pinaivu_box.models import catalog_loader

    if not proofs:
        raise NotHere("No box has made a leg of it.")
    config = call.config()
    listed = catalog_loader.load(config, call.home)
    if not (call.home / "pinaivu.db").exists():
        raise CliError(f"There is no box in {call.home}, whose models an audit takes.")
    async with database_of(call.home) as database:
        digests = Digests(database)
        try:
            model = await model_of(listed, proofs[0], digests.of, digests.known)
            found = await digests.of(model)
        except OSError as error:
            raise CliError(f"The model cannot be read: {error}.") from error

    async def digest(_: Any) -> str:
        return found

    return config, model, digest


def _report(statements: list[Any], audits: list[Any], engine: Any, others: set[int]) -> Any:
    from pinaivu_box.receipts.audit import verdict_of
    from pinaivu_box.receipts.receipt import Proof

    upstream = [each for each in statements if not isinstance(each, Proof)]
    legs = msgspec.to_builtins(audits) + [_of_upstream(each) for each in upstream]
    verdict = verdict_of(audits)
    if upstream and verdict == "agrees":
        verdict = "not auditable"
    request_id = statements[0].request_id
    return {
        "request_id": request_id,
        "verdict": verdict,
        "engine": engine,
        "legs": legs,
        "other_prompts": sorted(others),
    }


def _of_upstream(leg: Any) -> dict[str, Any]:
    return {
        "choice": leg.choice,
        "leg": leg.leg,
        "node_id": leg.node_id,
        "verdict": "not auditable",
        "meaning": f"the upstream {leg.upstream} made it, and nobody knows its tokens",
    }


def transcript_kept(transcript: Any) -> TranscriptReader:
    """One that is there."""

    async def read(*_: Any) -> Any:
        return transcript

    return read


def print_report(report: Any) -> None:
    """In sentences, a leg each."""
    exactness = report["engine"]["exactness"]
    if report["engine"]["build"]:
        how = f"to the bit where proofs say {exactness}" if exactness else "up to rounding"
        click.echo(f"Computed again by {report['engine']['build']}, which compares {how}.")
    for number, leg in enumerate(report["legs"], start=1):
        where = f"leg {leg['leg']} of choice {leg['choice']}"
        click.echo(f"{number}. {_MARKS[leg['verdict']]} {where}: {leg['meaning']}")
        _print_first(leg)
    for number in report["other_prompts"]:
        click.echo(
            f"Prompt {number} has other tokens than this box makes of the request: it was cut "
            "short, became longer, or the node has another chat template."
        )
    click.echo(f"{report['request_id']}: {report['verdict']}.")


def _print_first(leg: Any) -> None:
    """The first difference, where the meaning has not told it, and the largest margins."""
    from pinaivu_box.receipts.audit import DrawDifference, describe

    first = leg.get("first")
    if first is None:
        return
    if leg.get("mode") == "statistical":
        told = describe(msgspec.convert(first, DrawDifference))
        click.echo(f"   The first difference: {told}.")
        if margins := leg.get("margins"):
            click.echo(f"   The largest margins: {', '.join(f'{m:.3g}' for m in margins[:5])}.")
