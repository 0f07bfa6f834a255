"""What an endpoint is: a route, who may call it, and the types that its handler declares.

A handler is an async function.  Its parameters say what it needs:

* `request: Request`, or `call: InferenceCall` if it runs a model;
* one `str` for each parameter of the path, of the same name;
* `query`, a struct of the parameters behind the `?`;
* `body`, a struct of the JSON body; with a default the body may be left out.

It returns the struct that is sent as JSON (a `request_id` that it left empty is filled in), or a
response of its own: `JSON[T]`, `JsonLines[T]`, `EventStream`, `PlainText`, `Octets`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from inspect import unwrap
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct
from starlette.convertors import CONVERTOR_TYPES
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import PARAM_REGEX, Match, Route, compile_path, request_response
from starlette.types import Scope as AsgiScope

from pinaivu_box.openai.decoding import SMALL_BODY_BYTES, decode, from_validation
from pinaivu_box.policy import Scope
from pinaivu_box.server.bodies import read
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.json_response import JSON, JsonLines
from pinaivu_box.server.plain import Octets, PlainText
from pinaivu_box.server.sse import EventStream
from pinaivu_box.text import END

# The scope that a key needs; "any key" needs none, and "public" no key at all.  "page" neither, but
# the session of the browser is known, if there is one (see `sessions`).  "explorer" needs the scope
# receipts, and nothing where `[explorer] access` is "public".
Access = Scope | Literal["any key", "public", "page", "explorer"]
Method = Literal["GET", "POST", "PATCH", "DELETE"]


class Endpoint(Route):
    """One method of one path.  Without a `summary` it is not part of `/openapi.json`.  `reads` is
    the body that a handler reads by itself, for want of a parameter `body`; `reads_text` a media
    type of texts that it takes instead.

    A box has more than a hundred of them, most of which nobody calls before it stops: so what
    follows from the path and from the handler's types is worked out when it is first asked for.

    Raises TypeError if the handler's parameters are not those of the path.
    """

    def __init__(
        self,
        method: Method,
        path: str,
        access: Access,
        handler: Callable[..., Awaitable[Struct | Response]],
        summary: str = "",
        reads: type[Struct] | None = None,
        reads_text: str = "",
    ) -> None:
        # What Route's own __init__ sets, but for the regular expression, which it would compile.
        self.path, self.endpoint, self.name = path, self._handle, handler.__name__
        self.app, self.include_in_schema = request_response(self._handle), True
        self.methods = {method, "HEAD"} if method == "GET" else {method}
        self.path_format = PARAM_REGEX.sub(r"{\1}", path)
        self.param_convertors = {
            name: CONVERTOR_TYPES[kind.removeprefix(":") or "str"]
            for name, kind in PARAM_REGEX.findall(path)
        }
        self.method = method
        self.access = access
        self.handler = handler
        self.summary = summary
        self.path_parameters = tuple(self.param_convertors)
        self._prefix = path.partition("{")[0]
        self._reads = reads
        self.documented_text = reads_text
        code = unwrap(handler).__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        expected = {*self.path_parameters, *({"query", "body"} & set(names))}
        if set(names[1:]) != expected:
            raise TypeError(f"{method} {path} and the parameters of {handler} do not fit.")

    @cached_property
    def path_regex(self) -> re.Pattern[str]:  # type: ignore[override]
        return re.compile(self._pattern())

    def _pattern(self) -> str:
        # Starlette's patterns end in `$`, which also matches before a newline.
        return compile_path(self.path)[0].pattern.removesuffix("$") + END

    @cached_property
    def _types(self) -> dict[str, Any]:
        return get_type_hints(self.handler)

    @cached_property
    def query(self) -> type[Struct] | None:
        return self._types.get("query")

    @cached_property
    def body(self) -> type[Struct] | None:
        return self._types.get("body")

    @property
    def documented_body(self) -> type[Struct] | None:
        return self.body or self._reads

    @property
    def response(self) -> type[Struct] | None:
        return _returned(self._types["return"])[0]

    @property
    def media_types(self) -> list[str]:
        """What an answer may be sent as."""
        return _returned(self._types["return"])[1]

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.handler).parameters

    @cached_property
    def _calls_model(self) -> bool:
        return self._types[next(iter(self._parameters))] is InferenceCall

    def matches(self, scope: AsgiScope) -> tuple[Match, AsgiScope]:
        if not (scope.get("root_path") or scope["path"].startswith(self._prefix)):
            return Match.NONE, {}
        return super().matches(scope)

    def has_path(self, path: str) -> bool:
        return path.startswith(self._prefix) and self.path_regex.match(path) is not None

    def serves(self, method: str, path: str) -> bool:
        return method in (self.methods or ()) and self.has_path(path)

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
        default: Any = self._parameters["body"].default
        if not data and isinstance(default, Struct):
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
        elif issubclass(origin, EventStream | PlainText | Octets):
            media_types.append(origin.media_type)
        elif issubclass(origin, Struct):
            struct = part
            media_types.append(JSON.media_type)
    return struct, media_types
