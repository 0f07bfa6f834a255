"""Every error that a user can meet, in one tree.

The `message` is one sentence that says what was wrong and what to do about it.  Errors below
`ApiError` become HTTP answers through `server.envelope`; errors below `CliError` become one line
on stderr and an exit code.

    BoxError
    ├── CliError                    exit 1   the command could not do it
    │   └── UsageError              exit 2   the command was called wrongly
    └── ApiError                    status   code
        ├── BadRequest              400      invalid_request
        │   ├── InvalidJson         400      invalid_json
        │   └── ContextOverflow     400      context_length_exceeded
        ├── Unauthorized            401      invalid_api_key
        ├── Forbidden               403      permission_denied
        ├── NotFound                404      not_found
        │   ├── ModelNotFound       404      model_not_found
        │   └── ReceiptNotFound     404      receipt_not_found
        ├── MethodNotAllowed        405      method_not_allowed
        ├── RequestTimeout          408      request_timeout
        ├── BodyTooLarge            413      request_too_large
        ├── InvalidBody             422      invalid_body
        │   └── UnsupportedParameter 422     unsupported_parameter
        ├── InternalError           500      internal_error
        └── NoNodesAvailable        503      no_nodes_available
            └── EngineLost          503      no_nodes_available
"""

from __future__ import annotations

from typing import ClassVar


class BoxError(Exception):
    """Base of every error that is meant for a user's eyes."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CliError(BoxError):
    exit_code: ClassVar[int] = 1


class UsageError(CliError):
    exit_code = 2


class ApiError(BoxError):
    """An error with an HTTP status, OpenAI's `type` and a `code`.

    `param` names the field of the request that is to blame.  `retry_after` is in whole seconds.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after


class BadRequest(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class InvalidJson(BadRequest):
    code = "invalid_json"


class ContextOverflow(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ApiError):
    status, type, code = 403, "permission_error", "permission_denied"


class NotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class ReceiptNotFound(NotFound):
    code = "receipt_not_found"


class MethodNotAllowed(ApiError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ApiError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class BodyTooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class InvalidBody(ApiError):
    """The JSON is well-formed but a field is not what the API takes.

    `loc` is the path to the field, starting with "body" (or "query"); `kind` is the machine name
    of the failure, for example "value_error.missing".
    """

    status, type, code = 422, "invalid_request_error", "invalid_body"

    def __init__(
        self, message: str, *, loc: tuple[str | int, ...] = ("body",), kind: str = "value_error"
    ) -> None:
        path = ".".join(str(part) for part in loc[1:])
        super().__init__(message, param=path or None)
        self.loc = loc
        self.kind = kind


class UnsupportedParameter(InvalidBody):
    code = "unsupported_parameter"


class InternalError(ApiError):
    pass


class NoNodesAvailable(ApiError):
    status, type, code = 503, "server_error", "no_nodes_available"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, retry_after=retry_after)


class EngineLost(NoNodesAvailable):
    """The engine died while it held the request; somebody else may still serve it."""


def _descendants(root: type[ApiError]) -> list[type[ApiError]]:
    found = [root]
    for child in root.__subclasses__():
        found += _descendants(child)
    return found


def by_code(code: str, message: str, param: str | None = None) -> ApiError:
    """Rebuild the error that an engine child named by its `code` (frames carry no classes)."""
    for kind in _descendants(ApiError):
        if kind.code == code:
            if issubclass(kind, InvalidBody):
                return kind(message, loc=("body", *(param.split(".") if param else ())))
            error = kind(message)
            error.param = param
            return error
    return InternalError(message)
