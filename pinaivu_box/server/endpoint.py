"""What an endpoint is: a route, who may call it, and the types that its handler declares.

A handler is an async function.  Its parameters say what it needs:

* `request: Request`, or `call: InferenceCall` if it runs a model;
* one `str` for each parameter of the path, of the same name;
* `query`, a struct of the parameters behind the `?`;
* `body`, a struct of the JSON body; with a default the body may be left out.

It returns the struct that is sent as JSON (a `request_id` that it left empty is filled in), or a
response of its own: `JSON[T]`, `JsonLines[T]`, `EventStream`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pinaivu_box.openai.decoding import SMALL_BODY_BYTES, decode, from_validation
from pinaivu_box.policy import Scope
from pinaivu_box.server.bodies import read
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.json_response import JSON, JsonLines
from pinaivu_box.server.sse import EventStream
from pinaivu_box.text import END

# The scope that a key needs; "any key" needs none, and "public" no key at all.
Access = Scope | Literal["any key", "public"]
Method = Literal["GET", "POST", "PATCH", "DELETE"]


class Endpoint(Route):
    """One method of one path.  Without a `summary` it is not part of `/openapi.json`.

    Raises TypeError if the handler's parameters are not those of the path.
    """

    def __init__(
        self,
        method: Method,
        path: str,
        access: Access,
        handler: Callable[..., Awaitable[Struct | Response]],
        summary: str = "",
    ) -> None:
        super().__init__(path, self._handle, methods=[method])
        # Starlette's patterns end in `$`, which also matches before a newline.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + END)
        self.method = method
        self.access = access
        self.handler = handler
        self.summary = summary
        types = get_type_hints(handler)
        self.path_parameters = tuple(self.param_convertors)
        self.query: type[Struct] | None = types.get("query")
        self.body: type[Struct] | None = types.get("body")
        self.response, self.media_types = _returned(types["return"])
        parameters = inspect.signature(handler).parameters
        self._calls_model = types[next(iter(parameters))] is InferenceCall
        if "body" in parameters:
            self._default_body = parameters["body"].default
        expected = {*self.path_parameters, *({"query", "body"} & set(types))}
        if set(list(parameters)[1:]) != expected:
            raise TypeError(f"{method} {path} and the parameters of {handler} do not fit.")

    def serves(self, method: str, path: str) -> bool:
        return method in (self.methods or ()) and self.path_regex.match(path) is not None

    async def _handle(self, request: Request) -> Response:
        arguments: dict[str, Any] = dict(request.path_params)
        context: Request | InferenceCall = request
        if self._calls_model:
            context = call = InferenceCall(request)
            assert self.body is not None
            arguments["body"] = await call.body(self.body)
        elif self.body is not None:
            arguments["body"] = await self._read_body(request, self.body)
        if self.query is not None:
            parameters = dict(request.query_params)
            try:
                arguments["query"] = msgspec.convert(parameters, self.query, strict=False)
            except msgspec.ValidationError as error:
                raise from_validation(error, "query") from error
        result = await self.handler(context, **arguments)
        return result if isinstance(result, Response) else _json(request, result)

    async def _read_body(self, request: Request, kind: type[Struct]) -> Struct:
        """Raises what `bodies.read` and `decode` do."""
        max_bytes = request.app.state.box.config.server.max_body_bytes
        data = await read(request, min(SMALL_BODY_BYTES, max_bytes))
        if not data and self._default_body is not inspect.Parameter.empty:
            default: Struct = self._default_body
            return default
        return decode(data, kind, strict=True)[0]


def _json(request: Request, content: Struct) -> Response:
    if not getattr(content, "request_id", True):  # it has the field, and left it empty
        request_id = request.scope["state"]["request_id"]
        content = msgspec.structs.replace(content, request_id=request_id)
    return JSON(content)


def _returned(annotation: Any) -> tuple[type[Struct] | None, list[str]]:
    """The struct that a handler returns, and the media types that it may be sent as."""
    is_union = get_origin(annotation) in (Union, UnionType)
    struct, media_types = None, []
    for part in get_args(annotation) if is_union else (annotation,):
        origin = get_origin(part) or part
        if issubclass(origin, JSON | JsonLines):
            (struct,) = get_args(part)
            media_types.append(origin.media_type)
        elif issubclass(origin, EventStream):
            media_types.append(origin.media_type)
        elif issubclass(origin, Struct):
            struct = part
            media_types.append(JSON.media_type)
    return struct, media_types
