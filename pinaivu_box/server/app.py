"""The ASGI application: routes, and what stands before them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route as StarletteRoute

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError
from pinaivu_box.server import (
    admin_accounts,
    admin_audit,
    admin_keys,
    admin_ledger,
    admin_models,
    admin_peers,
    chat,
    completions,
    embeddings,
    envelope,
    health,
    index,
    messages,
    models,
    openapi,
    operations,
    receipts,
    responses,
    tokens,
    usage,
)
from pinaivu_box.server.auth import Authenticate
from pinaivu_box.server.background import Background
from pinaivu_box.server.bodies import Bodies
from pinaivu_box.server.cors import Cors
from pinaivu_box.server.edge import Edge
from pinaivu_box.server.unread import Unread
from pinaivu_box.text import END


class Route(StarletteRoute):
    """Of whole paths: Starlette's patterns end in `$`, which also fits before a newline."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, methods: list[str] | None = None
    ) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + END)


ROUTES = [
    Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
    Route("/v1/chat/completions/input_tokens", tokens.input_tokens, methods=["POST"]),
    Route("/v1/completions", completions.completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
    Route("/v1/responses", responses.create, methods=["POST"]),
    Route("/v1/responses/{response_id}", responses.get, methods=["GET"]),
    Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
    Route("/v1/responses/{response_id}/cancel", responses.cancel, methods=["POST"]),
    Route("/v1/responses/{response_id}/input_items", responses.input_items),
    Route("/v1/messages", messages.messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
    Route("/v1/tokenize", tokens.tokenize, methods=["POST"]),
    Route("/v1/detokenize", tokens.detokenize, methods=["POST"]),
    Route("/v1/models", models.models),
    Route("/v1/models/{model:path}", models.model),
    Route("/v1/engines", models.engines),
    Route("/v1/receipts", receipts.receipts),
    Route("/v1/receipts/{request_id}", receipts.receipt),
    Route("/v1/admin/reload", operations.reload, methods=["POST"]),
    Route("/v1/usage", usage.usage),
    Route("/v1/admin/accounts", admin_accounts.ls, methods=["GET"]),
    Route("/v1/admin/accounts", admin_accounts.create, methods=["POST"]),
    Route("/v1/admin/accounts/{account}", admin_accounts.get, methods=["GET"]),
    Route("/v1/admin/accounts/{account}", admin_accounts.change, methods=["PATCH"]),
    Route("/v1/admin/accounts/{account}", admin_accounts.remove, methods=["DELETE"]),
    Route("/v1/admin/keys", admin_keys.ls, methods=["GET"]),
    Route("/v1/admin/keys", admin_keys.create, methods=["POST"]),
    Route("/v1/admin/keys/{key_id}", admin_keys.get, methods=["GET"]),
    Route("/v1/admin/keys/{key_id}", admin_keys.change, methods=["PATCH"]),
    Route("/v1/admin/keys/{key_id}/rotate", admin_keys.rotate, methods=["POST"]),
    Route("/v1/admin/keys/{key_id}/revoke", admin_keys.revoke, methods=["POST"]),
    Route("/v1/admin/peers", admin_peers.ls, methods=["GET"]),
    Route("/v1/admin/peers", admin_peers.join, methods=["POST"]),
    Route("/v1/admin/peers/invitations", admin_peers.invite, methods=["POST"]),
    Route("/v1/admin/peers/leave", admin_peers.leave, methods=["POST"]),
    Route("/v1/admin/peers/{peer}", admin_peers.get, methods=["GET"]),
    Route("/v1/admin/peers/{peer}", admin_peers.change, methods=["PATCH"]),
    Route("/v1/admin/peers/{peer}", admin_peers.remove, methods=["DELETE"]),
    Route("/v1/admin/models", admin_models.ls, methods=["GET"]),
    Route("/v1/admin/models/pull", admin_models.pull, methods=["POST"]),
    Route("/v1/admin/audit", admin_audit.ls),
    Route("/v1/admin/ledger", admin_ledger.ls),
    Route("/v1/admin/ledger/statements", admin_ledger.all_statements),
    Route("/v1/admin/ledger/statements/{statement}/paid", admin_ledger.paid, methods=["POST"]),
    Route("/v1/admin/ledger/{peer}/entries", admin_ledger.entries),
    Route("/v1/admin/ledger/{peer}/settle", admin_ledger.settle, methods=["POST"]),
    Route("/v1/admin/ledger/{peer}/forgive", admin_ledger.forgive, methods=["POST"]),
    Route("/", index.index),
    Route("/openapi.json", openapi.document),
    Route("/docs", openapi.docs),
    Route("/health", health.health),
    Route("/readyz", health.readyz),
    Route("/metrics", health.metrics),
]


def create_app(box: Box) -> Starlette:
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(Unread),
            Middleware(Cors, origins=box.config.server.cors_origins),
            Middleware(Edge),
            Middleware(Authenticate, box=box),
        ],
        exception_handlers={
            ApiError: envelope.on_api_error,
            HTTPException: envelope.on_http_error,
            sqlite3.OperationalError: envelope.on_database_error,
        },
    )
    app.state.box = box
    app.state.bodies = Bodies()
    app.state.background = Background()
    app.router.redirect_slashes = False  # Edge has already dealt with slashes
    return app
