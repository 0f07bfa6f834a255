"""Every error that a user can meet, in one tree.

The `message` is one sentence that says what was wrong and what to do about it.  Errors below
`ApiError` become HTTP answers through `server.envelope`; errors below `CliError` become one line
on stderr and an exit code.

    BoxError
    ├── CliError                    exit 1   the command could not do it
    │   ├── UsageError              exit 2   the command was called wrongly
    │   └── NotRunning              exit 1   it needs a running box
    ├── StoreError                  exit 1   the database does not have it, or does not take it
    │   └── DatabaseUnusable        exit 1   its file cannot be used
    │       └── SchemaUnsupported   exit 1   nor read: it is of another version
    ├── PeeringError                exit 1   something between two boxes
    │   ├── Unreachable             exit 1   nobody answered there
    │   ├── WrongPeer               exit 1   somebody else answered there
    │   ├── ProtocolError           exit 1   what came is not what boxes say
    │   ├── LinkLost                exit 1   a link, or one stream of it, has ended
    │   ├── PeerRefused             exit 1   the peer will not do what it was asked
    │   ├── NotJoined               exit 1   this box is in no network, or cannot do that in it
    │   ├── EntryRefused            exit 1   the ledger does not take it
    │   └── CopyFailed              exit 1   a model could not be copied
    └── ApiError                    status   code
        ├── BadRequest              400      invalid_request
        │   ├── InvalidJson         400      invalid_json
        │   ├── ContextOverflow     400      context_length_exceeded
        │   └── ExceedsKeyLimit     400      exceeds_key_limit
        ├── Unauthorized            401      invalid_api_key
        ├── BudgetExceeded          402      budget_exceeded
        ├── Forbidden               403      permission_denied
        │   ├── KeyBlocked          403      key_blocked
        │   └── ModelNotAllowed     403      model_not_allowed
        ├── NotFound                404      not_found
        │   ├── ModelNotFound       404      model_not_found
        │   ├── ReceiptNotFound     404      receipt_not_found
        │   └── PeerNotFound        404      peer_not_found
        ├── MethodNotAllowed        405      method_not_allowed
        ├── RequestTimeout          408      request_timeout
        ├── Conflict                409      conflict
        ├── BodyTooLarge            413      request_too_large
        ├── UnsupportedEncoding     415      unsupported_encoding
        ├── InvalidBody             422      invalid_body
        │   └── UnsupportedParameter 422     unsupported_parameter
        ├── RateLimited             429      rate_limit_exceeded
        ├── InternalError           500      internal_error
        └── NoNodesAvailable        503      no_nodes_available
            ├── EngineLost          503      no_nodes_available
            │   └── PeerFaulty      503      no_nodes_available
            ├── TooLate             503      deadline_exceeded
            └── PeerUnreachable     503      peer_unreachable
"""

from __future__ import annotations

from typing import ClassVar

_MOST_QUOTED = 100  # characters
_MOST_SAID = 2000  # characters of a message, whatever it quotes


def quoted(text: str, most: int = _MOST_QUOTED) -> str:
    """What somebody sent, for a message: at most so many characters of it, control characters and
    the like escaped."""
    cut = text[:most]
    if not cut.isprintable():
        cut = "".join(one if one.isprintable() else _escaped(one) for one in cut)
    return cut if len(text) <= most else f"{cut}…"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


class BoxError(Exception):
    """Base of every error that is meant for a user's eyes; `exit_code` is that of a command."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CliError(BoxError):
    """The command could not do it."""


class UsageError(CliError):
    exit_code = 2


class NotRunning(CliError):
    """It needs a running box."""


class StoreError(BoxError):
    """The database does not have it, or does not take it."""


class DatabaseUnusable(StoreError):
    """The file is damaged, cannot be opened, or is another program's."""


class SchemaUnsupported(DatabaseUnusable):
    """The file is of a version that this program does not read."""


class PeeringError(BoxError):
    """Something between two boxes; what a client gets for it is decided by who had asked."""


class Unreachable(PeeringError):
    """Nobody answered there; trying again later makes sense."""


class WrongPeer(PeeringError):
    """Somebody answered who has not that key; trying again makes none."""


class ProtocolError(PeeringError):
    """What the peer sent is not what boxes say to each other; its link is closed."""


class LinkLost(PeeringError):
    """A link, or one stream of it, has ended before all was said.

    `code` (`peering.wire.Code`) and `reason`, a sentence, are what the side that ended it told the
    other; None and "" if nobody told anything.
    """

    def __init__(self, message: str, *, code: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class PeerRefused(PeeringError):
    """The peer answered politely that it will not; `code` is a `peering.wire.Code`."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class NotJoined(PeeringError):
    """What was asked cannot be done in the network as it is; the sentence says what to do first."""


class EntryRefused(PeeringError):
    """The ledger does not take it: the signatures do not bear it out, or it says something else
    than what is written there."""


class CopyFailed(PeeringError):
    """A model could not be copied; what has come of it is kept, and another try goes on there."""


class ApiError(BoxError):
    """An error with an HTTP status, OpenAI's `type` and a `code`.

    `param` names the field of the request that is to blame.  `retry_after` is in whole seconds.
    One that the operator has `ordered` (by revoking a key, say) is not counted as an error.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message if len(message) <= _MOST_SAID else f"{message[:_MOST_SAID]}…")
        self.param = param
        self.retry_after = retry_after
        self.ordered = False


class BadRequest(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class InvalidJson(BadRequest):
    code = "invalid_json"


class ContextOverflow(BadRequest):
    """More than the model's context has room for."""

    code = "context_length_exceeded"

    @classmethod
    def of(
        cls, tokens: int, context: int, *, exact: bool = True, param: str | None = None
    ) -> ContextOverflow:
        """`tokens` (unless `exact`: or more) are at `param`, None for a chat's messages, and
        `context` is what there may be.

        The words are OpenAI's, by which programs know that they have to shorten what they send:
        those of its chats, then what some look for in the text alone (the code, the words of its
        responses), and llama.cpp's names of the numbers.
        """
        found = f"{tokens} tokens" if exact else f"at least {tokens} tokens"
        if param is None:
            said = f"your messages resulted in {found}. Please reduce the length of the messages."
        else:
            said = (
                f"you requested {found} ({tokens} in your prompt; 0 for the completion). "
                "Please reduce your prompt."
            )
        return cls(
            f"This model's maximum context length is {context} tokens. However, {said} "
            f"({cls.code}: your input exceeds the context window of this model; "
            f"n_prompt_tokens: {tokens}, n_ctx: {context})",
            param=param,
        )


class ExceedsKeyLimit(BadRequest):
    """It could never be served with this key, however long one waits."""

    code = "exceeds_key_limit"


class Unauthorized(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class BudgetExceeded(ApiError):
    status, type, code = 402, "insufficient_quota", "budget_exceeded"


class Forbidden(ApiError):
    status, type, code = 403, "permission_error", "permission_denied"


class KeyBlocked(Forbidden):
    code = "key_blocked"


class ModelNotAllowed(Forbidden):
    code = "model_not_allowed"


class NotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class ReceiptNotFound(NotFound):
    code = "receipt_not_found"


class PeerNotFound(NotFound):
    code = "peer_not_found"


class MethodNotAllowed(ApiError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ApiError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class Conflict(ApiError):
    status, type, code = 409, "invalid_request_error", "conflict"


class BodyTooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedEncoding(ApiError):
    """The body is compressed in a way that is not known here."""

    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class InvalidBody(ApiError):
    """The JSON is well-formed but a field is not what the API takes.

    `loc` is the path to the field, starting with "body" (or "query"); `kind` is the machine name
    of the failure, for example "value_error.missing".
    """

    status, type, code = 422, "invalid_request_error", "invalid_body"

    def __init__(
        self, message: str, *, loc: tuple[str | int, ...] = ("body",), kind: str = "value_error"
    ) -> None:
        self.loc = tuple(quoted(part) if isinstance(part, str) else part for part in loc)
        path = ".".join(str(part) for part in self.loc[1:])
        super().__init__(message, param=path or None)
        self.kind = kind


class UnsupportedParameter(InvalidBody):
    code = "unsupported_parameter"


class RateLimited(ApiError):
    """`retry_after` in whole seconds: by then it fits, if nobody else comes first."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, retry_after=retry_after)


class InternalError(ApiError):
    pass


class NoNodesAvailable(ApiError):
    status, type, code = 503, "server_error", "no_nodes_available"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, retry_after=retry_after)


class EngineLost(NoNodesAvailable):
    """Who held the request was lost, `node_id` if it was a peer; somebody may still serve it."""

    def __init__(self, message: str, *, node_id: str = "", retry_after: int = 1) -> None:
        super().__init__(message, retry_after=retry_after)
        self.node_id = node_id


class PeerFaulty(EngineLost):
    """A peer broke the rules: what it sent is not what it signed, or not what was asked."""


class TooLate(NoNodesAvailable):
    """It cannot start by its deadline."""

    code = "deadline_exceeded"


class PeerUnreachable(NoNodesAvailable):
    """A box that an operation needs does not answer."""

    code = "peer_unreachable"


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
