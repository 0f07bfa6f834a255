"""`pinaivu receipts show|verify`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from pinaivu_box.cli.group import Group
from pinaivu_box.cli.home import home_option, json_option, print_json, with_database
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.identity import NODE_PREFIX


@click.group(cls=Group)
def receipts() -> None:
    """Show and verify receipts."""


@receipts.command()
@home_option
@json_option
@click.argument("request_id")
def show(home: Path, as_json: bool, request_id: str) -> None:
    """Print a receipt; with --json exactly as the API serves it (for 'receipts verify')."""
    document = _from_database(home, request_id)
    if as_json:
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
@home_option
@json_option
@click.argument("file_or_id", metavar="FILE|ID")
@click.option("--node-key", metavar="HEX", help="The public key of the box that you trust.")
@click.option(
    "--request",
    "request_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The request's JSON body: check that the receipt is about it.",
)
@click.option(
    "--answer",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with the answer, its JSON body or its text alone: check that the receipt is about "
    "it, with its log-probabilities or vectors.",
)
def verify(
    home: Path,
    as_json: bool,
    file_or_id: str,
    node_key: str | None,
    request_file: Path | None,
    answer: Path | None,
) -> None:
    """Check a receipt offline and say what each check proves; exit 1 if one fails.

    FILE is what GET /v1/receipts/{request_id} answered ('-' is standard input); an ID is looked up
    in this home's database.
    """
    from pinaivu_box.receipts.verify import verify_receipt

    trusted = None if node_key is None else _node_key(node_key)
    checks = verify_receipt(
        _document(home, file_or_id),
        node_key=trusted,
        transcript=_transcript(request_file, answer),
    )
    if as_json:
        print_json(checks)
    else:
        for number, check in enumerate(checks, start=1):
            mark = "ok    " if check.ok else "FAILED"
            click.echo(f"{number}. {mark} {check.name}: {check.meaning}")
        if node_key is None and all(check.ok for check in checks):
            click.echo("   Compare the signer with the key you trust, or pass it as --node-key.")
    if not all(check.ok for check in checks):
        sys.exit(1)


def _node_key(text: str) -> str:
    """64 hex digits, also where they come with the node_ before them.  Raises UsageError."""
    key = text.strip().removeprefix(NODE_PREFIX).lower()
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise UsageError(
            f"--node-key: '{text[:80]}' is not a node key, which is 64 hex digits: 'pinaivu id' "
            "prints that of the box that it runs on."
        )
    return key


def _document(home: Path, file_or_id: str) -> bytes:
    if file_or_id == "-":
        return sys.stdin.buffer.read()
    path = Path(file_or_id)
    if path.is_file():
        return path.read_bytes()
    if not file_or_id.startswith("req_"):
        raise CliError(f"There is no file {file_or_id}, and a request id begins with req_.")
    return _from_database(home, file_or_id)


def _from_database(home: Path, request_id: str) -> bytes:
    from pinaivu_box.receipts.receipt import view
    from pinaivu_box.store.requests import StoredReceipt, find_receipt

    if not (home / "pinaivu.db").exists():
        raise CliError(f"There is no box in {home}: choose another --home, or verify a file.")

    async def work(database: Any) -> StoredReceipt | None:
        return await find_receipt(database, request_id, account_id=None)

    found = with_database(home, work)
    if found is None:
        raise CliError(f"There is no receipt of {request_id} in {home}.")
    return msgspec.json.encode(view(found.signed, found.signature, found.opening))


def _transcript(request_file: Path | None, answer: Path | None) -> Any:
    from pinaivu_box.receipts.verify import Transcript

    if request_file is None and answer is None:
        return None
    given = Transcript() if request_file is None else _asked(request_file.read_bytes())
    return msgspec.structs.replace(given, answer=answer.read_bytes() if answer else None)


def _asked(data: bytes) -> Any:
    """What the body of a request says of its prompts."""
    from pinaivu_box.openai.completions import CompletionRequest
    from pinaivu_box.openai.embeddings import EmbeddingRequest
    from pinaivu_box.openai.request import decode, normalise, stop_strings, texts_or_tokens
    from pinaivu_box.openai.types import ChatRequest
    from pinaivu_box.receipts.commitment import prompt_text
    from pinaivu_box.receipts.verify import Transcript
    from pinaivu_box.server.jobs import asked

    try:
        named: dict[str, msgspec.Raw] = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        named = {}  # the decoder below says what is wrong
    if "input" in named and "messages" not in named:
        texts, _ = decode(data, EmbeddingRequest, lenient=True)
        inputs = texts_or_tokens(texts.input, "input", len(data))
        return Transcript(prompts=[prompt_text([], [], input=inputs)])
    if "prompt" in named and "messages" not in named:
        completion, _ = decode(data, CompletionRequest, lenient=True)
        prompts = texts_or_tokens(completion.prompt, "prompt", len(data))
        stop = stop_strings(completion.stop)
        more = {"suffix": completion.suffix} if completion.suffix else {}
        texts_ = [prompt_text([], stop, prompt=[one], **more) for one in prompts]
        echoed = [one for one in prompts if isinstance(one, str) for _ in range(completion.n or 1)]
        return Transcript(prompts=texts_, echoed=echoed if completion.echo else [])
    chat, _ = decode(data, ChatRequest, lenient=True)
    return Transcript(normalise(chat.messages), stop_strings(chat.stop), more=asked(chat))
