"""`pinaivu receipts show|verify|transcript|audit|evidence`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from pinaivu_box.cli import documents
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.log_evidence import evidence
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_json, print_steps
from pinaivu_box.cli.transcripts import (
    given_transcript,
    key_file_option,
    secret_of,
    stored_transcript,
)
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.identity import NODE_PREFIX

_JSON_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_node_key_option = click.option(
    "--node-key", metavar="HEX", help="The key of the box that you trust, from 'pinaivu id'."
)


@click.group(cls=Group)
def receipts() -> None:
    """Show, verify and audit receipts."""


receipts.add_command(evidence)


@receipts.command()
@standard_options()
@click.argument("request_id")
def show(call: Call, request_id: str) -> None:
    """Print a receipt.

    With --json it is printed as the API returns it, which is what 'receipts verify' reads.
    """
    document = _from_database(call, request_id)
    if call.as_json:
        click.echo(document.decode())
        return
    view = msgspec.json.decode(document)
    receipt = msgspec.json.decode(view["signed_receipt"])
    receipt["proofs"] = [
        {**msgspec.json.decode(proof["signed"]), "signature": proof["signature"]}
        for proof in receipt["proofs"]
    ]
    print_json({**receipt, "coordinator_signature": view["coordinator_signature"]})


@receipts.command()
@standard_options()
@click.argument("file_or_id", metavar="FILE|ID", required=False)
@click.option(
    "--all", "all_of_them", is_flag=True, help="Verify all receipts in HOME, and the log of them."
)
@_node_key_option
@click.option(
    "--witness",
    "witnesses",
    metavar="HEX",
    multiple=True,
    help="The key of a box that has to have cosigned the checkpoint of the log (repeatable).",
)
@click.option(
    "--quorum",
    metavar="N",
    type=click.IntRange(min=1),
    help="How many of these witnesses suffice.  [default: all]",
)
@click.option("--require-log", is_flag=True, help="Fail if no proof says that a log has it.")
@click.option(
    "--request",
    "request_file",
    type=_JSON_FILE,
    help="JSON body of the request: check that the receipt belongs to it.",
)
@click.option(
    "--answer",
    type=_JSON_FILE,
    help="JSON body of the answer, or its text only: check that the receipt belongs to it, and to "
    "its log probabilities or vectors.",
)
@click.option(
    "--transcript",
    "transcript_file",
    metavar="FILE|ID",
    help="The request's transcript: check that its texts and tokens are what was committed to.",
)
@key_file_option
def verify(
    call: Call,
    file_or_id: str | None,
    all_of_them: bool,
    node_key: str | None,
    witnesses: tuple[str, ...],
    quorum: int | None,
    require_log: bool,
    request_file: Path | None,
    answer: Path | None,
    transcript_file: str | None,
    key_file: str | None,
) -> None:
    """Verify a receipt offline, and say what each check proves.

    FILE is the answer of GET /v1/receipts/{request_id} ('-': standard input); ID is a request id,
    whose receipt is read from the database in HOME.  Exits with 1 if a check fails.
    """
    if all_of_them:
        from pinaivu_box.cli.receipts_all import verify_all

        verify_all(call)
        return
    if file_or_id is None:
        raise UsageError("Name a file or a request id, or pass --all.")
    from pinaivu_box.receipts.verify import Transcript, verify_receipt
    from pinaivu_box.receipts.verify_transcript import usual_stop

    trusted = None if node_key is None else _node_key("--node-key", node_key)
    log = _log_policy(require_log, witnesses, quorum)
    document = _document(call, file_or_id)
    exchange = _transcript(request_file, answer, usual_stop(document))
    if transcript_file is not None:
        recorded, secret = given_transcript(call, transcript_file), secret_of(key_file)
        exchange = msgspec.structs.replace(
            exchange or Transcript(), recorded=recorded, secret=secret
        )
    checks = verify_receipt(document, node_key=trusted, log=log, transcript=exchange)
    if call.as_json:
        print_json(checks)
    else:
        print_steps(checks)
        if node_key is None and all(check.ok for check in checks):
            click.echo("   Compare the signer with the key that you trust, or use --node-key.")
    if not all(check.ok for check in checks):
        sys.exit(1)


@receipts.command()
@standard_options()
@click.argument("file_or_id", metavar="FILE|ID")
@key_file_option
def transcript(call: Call, file_or_id: str, key_file: str | None) -> None:
    """Print the transcript of a request as JSON: what an audit of it needs.

    FILE is the answer of GET /v1/receipts/{request_id}/transcript ('-': standard input); ID is a
    request id, whose transcript is read from the database in HOME.  A sealed one is opened with the
    API key that made the request, as it was then.
    """
    print_json(stored_transcript(call, file_or_id, key_file))


@receipts.command()
@standard_options(config=True)
@click.argument("file_or_id", metavar="FILE|ID")
@click.option(
    "--transcript",
    "transcript_file",
    metavar="FILE",
    help="The request's transcript, if the database in HOME does not have it.",
)
@key_file_option
@click.option(
    "--request",
    "request_file",
    type=_JSON_FILE,
    help="JSON body of the request, in place of a transcript; with --answer.",
)
@click.option(
    "--answer",
    type=_JSON_FILE,
    help="JSON body of the answer, or its text only.",
)
@_node_key_option
def audit(
    call: Call,
    file_or_id: str,
    transcript_file: str | None,
    key_file: str | None,
    request_file: Path | None,
    answer: Path | None,
    node_key: str | None,
) -> None:
    """Compute an answer again, and say whether it is what its proofs say.

    FILE is the answer of GET /v1/receipts/{request_id}, as the key's owner gets it ('-': standard
    input); ID is a request id, whose receipt is read from the database in HOME.  The model with the
    same digest has to be here.  Exits with 1 unless all of it agrees.
    """
    from pinaivu_box.cli.kept_answer import transcript_of_files
    from pinaivu_box.cli.receipt_audit import audit_receipt, transcript_kept
    from pinaivu_box.receipts.verify_transcript import usual_stop

    trusted = None if node_key is None else _node_key("--node-key", node_key)
    if (request_file is None) != (answer is None) or (request_file and transcript_file):
        raise UsageError("Give --request and --answer together, or --transcript.")
    document = _document(call, file_or_id)
    if request_file is not None and answer is not None:
        asked, said = request_file.read_bytes(), answer.read_bytes()
        read = transcript_of_files(asked, said, usual_stop(document))
    else:
        source = transcript_file or _request_id(document)
        read = transcript_kept(stored_transcript(call, source, key_file))
    audit_receipt(call, document, read, trusted)


def _request_id(document: bytes) -> str:
    """Raises CliError."""
    from pinaivu_box.receipts.receipt import ReceiptView

    try:
        return msgspec.json.decode(document, type=ReceiptView).request_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CliError(f"This is no receipt: {error}.") from error


def _log_policy(required: bool, witnesses: tuple[str, ...], quorum: int | None) -> Any:
    """What the options ask of the log.  Raises UsageError."""
    from pinaivu_box.receipts.verify import LogPolicy

    keys = tuple(dict.fromkeys(_node_key("--witness", text) for text in witnesses))
    if quorum is not None and quorum > len(keys):
        raise UsageError(f"--quorum: {quorum} of {len(keys)} witnesses: name more with --witness.")
    return LogPolicy(required, keys, quorum)


def _node_key(option: str, text: str) -> str:
    """The 64 hex digits of a key, with or without the prefix node_.  Raises UsageError."""
    key = text.strip().removeprefix(NODE_PREFIX).lower()
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise UsageError(
            f"{option}: '{text[:80]}' is not a node key of 64 hex digits: 'pinaivu id' prints "
            "that of the box that it runs on."
        )
    return key


def _document(call: Call, file_or_id: str) -> bytes:
    if (found := documents.document(file_or_id)) is not None:
        return found
    if not file_or_id.startswith("req_"):
        raise CliError(f"There is no file {file_or_id}, and request ids begin with req_.")
    return _from_database(call, file_or_id)


def _from_database(call: Call, request_id: str) -> bytes:
    from pinaivu_box.receipt_log.proofs import inclusion
    from pinaivu_box.receipts.receipt import view
    from pinaivu_box.store.requests import find_receipt

    if not (call.home / "pinaivu.db").exists():
        raise CliError(f"There is no box in {call.home}: choose another --home, or verify a file.")

    async def work(database: Any) -> Any:
        receipt = await find_receipt(database, request_id, account_id=None)
        return receipt and (receipt, await inclusion(database, request_id))

    found = call.in_database(work)
    if found is None:
        raise CliError(f"There is no receipt of {request_id} in {call.home}.")
    receipt, proof = found
    return msgspec.json.encode(view(receipt.signed, receipt.signature, receipt.opening, proof))


def _transcript(request_file: Path | None, answer: Path | None, stop: list[str]) -> Any:
    from pinaivu_box.receipts.verify import Transcript

    if request_file is None and answer is None:
        return None
    transcript = Transcript() if request_file is None else _request(request_file.read_bytes(), stop)
    return msgspec.structs.replace(transcript, answer=answer and answer.read_bytes())


def _request(data: bytes, usual_stop: list[str]) -> Any:
    """The transcript of a request's body, without an answer."""
    from pinaivu_box.openai.completions import CompletionRequest
    from pinaivu_box.openai.decoding import decode
    from pinaivu_box.openai.embeddings import EmbeddingRequest
    from pinaivu_box.openai.images import read_all
    from pinaivu_box.openai.request import normalise, stop_strings, texts_or_tokens
    from pinaivu_box.openai.types import ChatRequest
    from pinaivu_box.receipts.commitment import prompt_text
    from pinaivu_box.receipts.verify import Transcript
    from pinaivu_box.server.jobs import asked

    try:
        fields: dict[str, msgspec.Raw] = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        fields = {}  # the decoder below says what is wrong
    if "input" in fields and "messages" not in fields:
        embedding, _ = decode(data, EmbeddingRequest)
        inputs = texts_or_tokens(embedding.input, "input", len(data))
        return Transcript(prompts=[prompt_text([], [], input=inputs)])
    if "prompt" in fields and "messages" not in fields:
        completion, _ = decode(data, CompletionRequest)
        asked_for = texts_or_tokens(completion.prompt, "prompt", len(data))
        stop = stop_strings(completion.stop) or usual_stop
        more = {"suffix": completion.suffix} if completion.suffix else {}
        prompts = [prompt_text([], stop, prompt=[prompt], **more) for prompt in asked_for]
        texts = [text for text in asked_for if isinstance(text, str)] if completion.echo else []
        echoed = [text for text in texts for _ in range(completion.n or 1)]
        return Transcript(prompts=prompts, echoed=echoed)
    chat, _ = decode(data, ChatRequest)
    stop = stop_strings(chat.stop) or usual_stop
    messages = read_all(normalise(chat.messages), lambda url: None)
    return Transcript([prompt_text(messages, stop, **asked(chat))])
