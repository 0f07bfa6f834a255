"""The ASGI application: routes, and what stands before them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError
from pinaivu_box.server import (
    chat,
    completions,
    embeddings,
    envelope,
    health,
    messages,
    models,
    openapi,
    receipts,
    responses,
    tokens,
    usage,
)
from pinaivu_box.server.auth import Authenticate
from pinaivu_box.server.edge import Edge

EXPOSED = ["x-request-id", "openai-processing-ms", "Retry-After"]


def create_app(box: Box) -> Starlette:
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
            Route("/v1/chat/completions/input_tokens", tokens.input_tokens, methods=["POST"]),
            Route("/v1/completions", completions.completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
            Route("/v1/responses", responses.create, methods=["POST"]),
            Route("/v1/responses/{response_id}", responses.get, methods=["GET"]),
            Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
            Route("/v1/responses/{response_id}/input_items", responses.input_items),
            Route("/v1/messages", messages.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
            Route("/v1/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/v1/detokenize", tokens.detokenize, methods=["POST"]),
            Route("/v1/models", models.models),
            Route("/v1/models/{model:path}", models.model),
            Route("/v1/engines", models.engines),
            Route("/v1/receipts/{request_id}", receipts.receipt),
            Route("/v1/usage", usage.usage),
            Route("/openapi.json", openapi.document),
            Route("/docs", openapi.docs),
            Route("/health", health.health),
            Route("/readyz", health.readyz),
            Route("/metrics", health.metrics),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=box.config.server.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED,
            ),
            Middleware(Edge),
            Middleware(Authenticate, box=box),
        ],
        exception_handlers={
            ApiError: envelope.on_api_error,
            HTTPException: envelope.on_http_error,
        },
    )
    app.state.box = box
    app.router.redirect_slashes = False  # Edge has already dealt with slashes
    return app
