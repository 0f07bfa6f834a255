"""`/openapi.json`, made of the wire types, and `/docs`, which draws it."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from pinaivu_box import __version__
from pinaivu_box.ledger.views import SettledView, StatementView
from pinaivu_box.network.peer import PeerView
from pinaivu_box.openai import anthropic, completions, embeddings, responses, types
from pinaivu_box.receipts.receipt import ReceiptView
from pinaivu_box.server import (
    admin_accounts,
    admin_audit,
    admin_keys,
    admin_ledger,
    admin_models,
    admin_peers,
    receipts,
)
from pinaivu_box.server.admin import Page
from pinaivu_box.server.edge import prefix_of
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.models import EngineList, OneModel
from pinaivu_box.server.operations import ReloadAnswer
from pinaivu_box.server.usage import UsageQuery
from pinaivu_box.store.usage_report import UsageReport
from pinaivu_box.store.views import AccountView, KeyView, NewKey


class OpenAIError(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True):
    """`detail` is a sentence, or on 422 a list of what is wrong where."""

    error: OpenAIError
    detail: str | list[dict[str, Any]]


class Operation(Struct, frozen=True):
    """`streams`: with `stream` the answer is a text/event-stream.  `lines`: it is one a line."""

    method: str
    path: str
    summary: str
    answer: type[Struct]
    body: type[Struct] | None = None
    streams: bool = False
    query: tuple[str, ...] = ()
    lines: bool = False


_chat, _many = types.ChatRequest, completions
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Chat", types.ChatCompletion, _chat, True),
    Operation(
        "post",
        "/v1/chat/completions/input_tokens",
        "Count a chat's prompt tokens before paying for them",
        _many.InputTokens,
        _chat,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Complete text as it is",
        _many.Completion,
        _many.CompletionRequest,
        True,
    ),
    Operation(
        "post",
        "/v1/responses",
        "Chat with stored conversations",
        responses.ResponseObject,
        responses.ResponseRequest,
        True,
    ),
    Operation(
        "get",
        "/v1/responses/{response_id}",
        "A stored response, or one that runs in the background",
        responses.ResponseObject,
        streams=True,
        query=responses.Retrieve.__struct_fields__,
    ),
    Operation(
        "post",
        "/v1/responses/{response_id}/cancel",
        "Cancel a response that runs in the background",
        responses.ResponseObject,
    ),
    Operation(
        "delete", "/v1/responses/{response_id}", "Delete a response", responses.DeletedResponse
    ),
    Operation(
        "get",
        "/v1/responses/{response_id}/input_items",
        "What a stored response was asked",
        responses.ItemList,
    ),
    Operation(
        "post",
        "/v1/messages",
        "Chat, in Anthropic's shape",
        anthropic.AnthropicAnswer,
        anthropic.MessagesRequest,
        True,
    ),
    Operation(
        "post",
        "/v1/messages/count_tokens",
        "Count the tokens of such a chat",
        anthropic.TokenCountAnswer,
        anthropic.CountTokensRequest,
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "Vectors of texts",
        embeddings.EmbeddingList,
        embeddings.EmbeddingRequest,
    ),
    Operation("post", "/v1/tokenize", "Text to tokens", _many.TokenList, _many.TokenizeRequest),
    Operation(
        "post",
        "/v1/detokenize",
        "Tokens to text",
        _many.DetokenizedText,
        _many.DetokenizeRequest,
    ),
    Operation("get", "/v1/models", "What this box serves", types.ModelList),
    Operation("get", "/v1/models/{model}", "One model", OneModel),
    Operation("get", "/v1/engines", "What runs (admin keys)", EngineList),
    Operation("post", "/v1/admin/reload", "Read the configuration again", ReloadAnswer),
    Operation(
        "get",
        "/v1/receipts",
        "The receipts of an account (admin keys: all), newest first",
        receipts.ReceiptList,
        query=receipts.ReceiptPage.__struct_fields__,
    ),
    Operation("get", "/v1/receipts/{request_id}", "The receipt of a request", ReceiptView),
    Operation(
        "get",
        "/v1/usage",
        "What was used",
        UsageReport,
        query=UsageQuery.__struct_fields__,
    ),
)

_account, _key = "/v1/admin/accounts/{account}", "/v1/admin/keys/{key_id}"
_peer = "/v1/admin/peers/{peer}"
_ledger = "/v1/admin/ledger"
_now = admin_keys.AtOnce.__struct_fields__
ADMIN = (
    Operation(
        "get",
        "/v1/admin/accounts",
        "The accounts, by name",
        admin_accounts.AccountList,
        query=Page.__struct_fields__,
    ),
    Operation(
        "post",
        "/v1/admin/accounts",
        "A new account",
        AccountView,
        admin_accounts.CreateAccount,
    ),
    Operation("get", _account, "One account, by name or id", AccountView),
    Operation("patch", _account, "Other settings", AccountView, admin_accounts.ChangeAccount),
    Operation(
        "delete",
        _account,
        "Remove it and revoke its keys; what it used stays in the books",
        admin_accounts.RemovedAccount,
    ),
    Operation(
        "get",
        "/v1/admin/keys",
        "The keys, newest first",
        admin_keys.KeyList,
        query=admin_keys.KeyPage.__struct_fields__,
    ),
    Operation("post", "/v1/admin/keys", "A new key", NewKey, admin_keys.CreateKey),
    Operation("get", _key, "One key", KeyView),
    Operation("patch", _key, "Other settings", KeyView, admin_keys.ChangeKey, query=_now),
    Operation("post", f"{_key}/rotate", "A new secret", NewKey, admin_keys.RotateKey),
    Operation("post", f"{_key}/revoke", "Revoke it for good", KeyView, query=_now),
    Operation("get", "/v1/admin/peers", "The other boxes of the network", admin_peers.PeerList),
    Operation(
        "post",
        "/v1/admin/peers",
        "Join the network that a ticket is for",
        PeerView,
        admin_peers.JoinBody,
    ),
    Operation(
        "post",
        "/v1/admin/peers/invitations",
        "A ticket for another box",
        admin_peers.NewInvitation,
        admin_peers.Invite,
    ),
    Operation("post", "/v1/admin/peers/leave", "Leave the network", admin_peers.Left),
    Operation("get", _peer, "One peer, by name or id", PeerView),
    Operation("patch", _peer, "Its name here and its limits", PeerView, admin_peers.ChangePeer),
    Operation("delete", _peer, "Revoke it for good", PeerView, admin_peers.RemoveBody),
    Operation(
        "get",
        "/v1/admin/models",
        "The models and their files, and which files are not served",
        admin_models.ModelFiles,
    ),
    Operation(
        "post",
        "/v1/admin/models/pull",
        "Copy a model from other boxes; a line as it goes on",
        admin_models.PullProgress,
        admin_models.Pull,
        lines=True,
    ),
    Operation(
        "get",
        "/v1/admin/audit",
        "Who changed what, newest first",
        admin_audit.AuditList,
        query=admin_audit.AuditPage.__struct_fields__,
    ),
    Operation("get", _ledger, "What peers owe us, and we them", admin_ledger.BalanceList),
    Operation(
        "get",
        f"{_ledger}/{{peer}}/entries",
        "The entries with a peer, newest first",
        admin_ledger.EntryList,
        query=admin_ledger.EntryPage.__struct_fields__,
    ),
    Operation("post", f"{_ledger}/{{peer}}/settle", "Agree with a peer, and sign", SettledView),
    Operation(
        "post",
        f"{_ledger}/{{peer}}/forgive",
        "Write off what a peer has not accepted",
        admin_ledger.ForgivenView,
    ),
    Operation(
        "get",
        f"{_ledger}/statements",
        "What was settled, newest first",
        admin_ledger.StatementList,
        query=admin_ledger.StatementQuery.__struct_fields__,
    ),
    Operation(
        "post",
        f"{_ledger}/statements/{{statement}}/paid",
        "Note that it was made good",
        StatementView,
    ),
)

_REFUSALS = {
    "400": "The request cannot be served as it is.",
    "401": "There is no valid API key.",
    "403": "The key may not do this.",
    "404": "There is no such thing.",
    "409": "It is not in a state for this.",
    "413": "The body is too large.",
    "415": "The body is compressed in a way that is not known; Accept-Encoding says which are.",
    "422": "A field is wrong; detail says which.",
    "503": "Nobody can serve this now; Retry-After says when to try again.",
}


@cache
def specification() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    operations = (*OPERATIONS, *ADMIN)
    kinds = {one.answer for one in operations} | {one.body for one in operations if one.body}
    _, components = msgspec.json.schema_components(
        sorted([*kinds, ErrorBody], key=lambda kind: kind.__name__),
        ref_template="#/components/schemas/{name}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pinaivu Box", "version": __version__},
        "servers": [{"url": "."}],  # where this document is, under whatever prefix
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    kind = "application/x-ndjson" if operation.lines else "application/json"
    content: dict[str, Any] = {kind: {"schema": _ref(operation.answer)}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [_parameter(name, "path", required=True) for name in names]
    parameters += [_parameter(name, "query", required=False) for name in operation.query]
    made: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(operation),
        "parameters": parameters,
        "responses": {"200": {"description": "As asked.", "content": content}},
    }
    refusal = {"application/json": {"schema": _ref(ErrorBody)}}
    for status, text in _REFUSALS.items():
        made["responses"][status] = {"description": text, "content": refusal}
    if operation.body is not None:
        body = {"application/json": {"schema": _ref(operation.body)}}
        made["requestBody"] = {"required": True, "content": body}
    return made


def _operation_id(operation: Operation) -> str:
    path = operation.path.replace("/v1/", "").replace("{", "").replace("}", "")
    return f"{operation.method}_{path.replace('/', '_')}"


def _parameter(name: str, where: str, *, required: bool) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "schema": {"type": "string"}}


def _ref(kind: type[Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


async def document(request: Request) -> Response:
    made = specification()
    if prefix := prefix_of(request.headers):
        made = {**made, "servers": [{"url": prefix}]}
    return JSON(made)


async def docs(request: Request) -> Response:
    page = resources.files("pinaivu_box.server").joinpath("docs.html").read_text()
    if request.scope["raw_path"].endswith(b"/"):  # it names the document beside it
        page = page.replace('"openapi.json"', '"../openapi.json"')
    return HTMLResponse(page)
