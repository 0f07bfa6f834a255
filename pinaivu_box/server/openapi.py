"""`/openapi.json`, made from the endpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from pinaivu_box import __version__
from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.json_response import JSON, JsonLines
from pinaivu_box.server.sessions import COOKIE, CSRF_HEADER


class OpenAIError(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True):
    """`detail` is a sentence, or on 422 a list of what is wrong where."""

    error: OpenAIError
    detail: str | list[dict[str, Any]]


_ERRORS = {
    "400": "The request cannot be served as it is.",
    "401": "The API key is missing or invalid.",
    "403": "The key lacks the permission.",
    "404": "Not found.",
    "409": "The current state does not allow this.",
    "413": "The body is too large.",
    "415": "The encoding of the body is unknown; Accept-Encoding lists the known ones.",
    "422": "A field is invalid; `detail` says which.",
    "503": "This cannot be served now; Retry-After says when to try again.",
}
_JSON = (JSON.media_type, JsonLines.media_type)
_BY_DEFAULT: list[dict[str, list[str]]] = [{"key": []}, {"session": []}]
_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer"},
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "Of the pages, once somebody has logged in.",
    },
    "csrf": {
        "type": "apiKey",
        "in": "header",
        "name": CSRF_HEADER,
        "description": "The token of the session, which changes need beside its cookie.",
    },
}


def specification(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The document of those that have a summary."""
    documented = [endpoint for endpoint in endpoints if endpoint.summary]
    kinds = {
        kind
        for endpoint in documented
        for kind in (endpoint.response, endpoint.documented_body)
        if kind
    }
    _, schemas = msgspec.json.schema_components(
        sorted([*kinds, ErrorBody], key=lambda kind: kind.__name__),
        ref_template="#/components/schemas/{name}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in documented:
        operations = paths.setdefault(endpoint.path_format, {})
        operations[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pinaivu Box", "version": __version__},
        "servers": [{"url": "."}],  # where this document is, under any prefix
        "security": _BY_DEFAULT,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": _SCHEMES,
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    response = _schema(endpoint.response) if endpoint.response is not None else {}
    content = {
        kind: response if kind in _JSON else {"schema": {"type": "string"}}
        for kind in endpoint.media_types
    }
    query = endpoint.query.__struct_encode_fields__ if endpoint.query else ()
    parameters = [_parameter(name, "path", required=True) for name in endpoint.path_parameters]
    parameters += [_parameter(name, "query", required=False) for name in query]
    error = {JSON.media_type: _schema(ErrorBody)}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": _operation_id(endpoint),
        "parameters": parameters,
        "responses": {
            "200": {"description": "Success.", "content": content},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }
    if endpoint.documented_body is not None:
        body = {JSON.media_type: _schema(endpoint.documented_body)}
        if endpoint.documented_text:
            body[endpoint.documented_text] = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": True, "content": body}
    if (security := _security(endpoint)) != _BY_DEFAULT:
        operation["security"] = security
    return operation


def _security(endpoint: Endpoint) -> list[dict[str, list[str]]]:
    """One of these is needed; an empty one stands for nothing."""
    if endpoint.access == "public":
        return []
    session: dict[str, list[str]] = {"session": []}
    if endpoint.method != "GET":
        session["csrf"] = []
    if endpoint.access == "page":
        return [{}, session]
    nothing: list[dict[str, list[str]]] = [{}] if endpoint.access == "explorer" else []
    return [{"key": []}, session, *nothing]


def _operation_id(endpoint: Endpoint) -> str:
    path = endpoint.path_format.replace("/v1/", "").replace("{", "").replace("}", "")
    return f"{endpoint.method.lower()}_{path.replace('/', '_')}"


def _parameter(name: str, location: str, *, required: bool) -> dict[str, Any]:
    return {"name": name, "in": location, "required": required, "schema": {"type": "string"}}


def _schema(kind: type[Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
