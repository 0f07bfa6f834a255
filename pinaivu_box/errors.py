"""All errors that users see, in one tree below BoxError.

The `message` is a sentence that says what is wrong and what to do about it.  A command that fails
prints it as one line on stderr and exits with the `exit_code`.  Errors below `ApiError` become HTTP
answers through `server.error_responses`, which also translates those below `StoreError`.
"""

from __future__ import annotations

from typing import ClassVar

_MAX_QUOTED_CHARS = 100
_MAX_MESSAGE_CHARS = 2000


def quoted(text: str, max_chars: int = _MAX_QUOTED_CHARS) -> str:
    """Text from outside, for a message: at most `max_chars` characters, those not printable
    escaped."""
    cut = text[:max_chars]
    if not cut.isprintable():
        cut = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut
        )
    return cut if len(text) <= max_chars else f"{cut}…"


class BoxError(Exception):
    """Base of all errors for users; `exit_code` is that of a command."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CliError(BoxError):
    """The command failed."""


class UsageError(CliError):
    """The command line is not valid."""

    exit_code = 2


class ConfigurationInvalid(CliError):
    """The configuration is not valid; a service that says so is not started again.

    Its exit status is EX_CONFIG of sysexits.h.
    """

    exit_code = 78


class NotRunning(CliError):
    """The command needs a running box."""


class StoreError(BoxError):
    """The database has no such row, or rejects a change."""


class InvalidValue(StoreError):
    """A value cannot be stored; `field` names it, with dots between its levels."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class RowNotFound(StoreError):
    """Nothing has this name or id."""


class RowConflict(StoreError):
    """What is stored does not allow the change, or has changed meanwhile."""


class ConversationTooLong(StoreError):
    """A stored conversation has more bytes than is allowed."""


class ResponseNotCompleted(StoreError):
    """A stored response has not ended, or failed: a conversation cannot go on after it."""


class Unreadable(StoreError):
    """A sealed row is not what was sealed there."""


class DatabaseUnusable(StoreError):
    """The database file is damaged, cannot be opened, or belongs to another program."""


class SchemaUnsupported(DatabaseUnusable):
    """The database file has a schema that this program does not support."""


class PullFailed(BoxError):
    """A model could not be had from a registry or a URL; what arrived is kept for another attempt
    unless it is wrong."""


class ReleaseNotVerified(BoxError):
    """A file is not, or is not known to be, what the owner of the release key has released."""


class UpdateFailed(BoxError):
    """This program cannot be replaced by another version of it; it is as it was."""


class PeeringError(BoxError):
    """Communication between two boxes failed; the caller decides what a client is told."""


class Unreachable(PeeringError):
    """No box answers at the address; a later attempt may succeed."""


class WrongPeer(PeeringError):
    """Another box answers at the address; another attempt does not help."""

    beginning: ClassVar[str] = "Another box than "  # of each message


class ProtocolError(PeeringError):
    """The peer violated the protocol; its link is closed."""


class LinkLost(PeeringError):
    """A link or a stream ended early.

    `code` (`transport.wire.Code`) and `reason`, a sentence, are from the side that ended it; None
    and "" if it gave none.
    """

    def __init__(self, message: str, *, code: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class PeerRefused(PeeringError):
    """The peer refused; `code` is a `transport.wire.Code`."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class NotJoined(PeeringError):
    """The network does not allow it in its present state; the message says what to do first."""


class EntryRefused(PeeringError):
    """The ledger rejects an entry: its signatures do not prove it, or it contradicts another."""


class CopyFailed(PeeringError):
    """A model could not be copied; the part that arrived is kept for another attempt."""


class ApiError(BoxError):
    """An error with an HTTP status, OpenAI's `type` and a `code`.

    `param` names the field of the request that is wrong.  After `retry_after` whole seconds it may
    be tried again.  An error that the operator `ordered`, by revoking a key for example, is not
    counted as one.
    """

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]
    retry_after: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(
            message if len(message) <= _MAX_MESSAGE_CHARS else f"{message[:_MAX_MESSAGE_CHARS]}…"
        )
        self.param = param
        self.ordered = False
        if retry_after is not None:
            self.retry_after = retry_after


class BadRequest(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class InvalidJson(BadRequest):
    code = "invalid_json"


class ContextOverflow(BadRequest):
    """The prompt exceeds the context of the model."""

    code = "context_length_exceeded"

    @classmethod
    def of(
        cls, tokens: int, context: int, *, exact: bool = True, param: str | None = None
    ) -> ContextOverflow:
        """The error for a prompt of `tokens` (or more, unless `exact`) and a `context` of fewer.

        `param` is where the prompt is, None for the messages of a chat.

        The wording is OpenAI's, by which programs recognise that they have to shorten the prompt:
        that of its chats, then what some look for in the text only (the code, the wording of its
        responses), and llama.cpp's names of the numbers.
        """
        amount = f"{tokens} tokens" if exact else f"at least {tokens} tokens"
        if param is None:
            consequence = (
                f"your messages resulted in {amount}. Please reduce the length of the messages."
            )
        else:
            consequence = (
                f"you requested {amount} ({tokens} in your prompt; 0 for the completion). "
                "Please reduce your prompt."
            )
        return cls(
            f"This model's maximum context length is {context} tokens. However, {consequence} "
            f"({cls.code}: your input exceeds the context window of this model; "
            f"n_prompt_tokens: {tokens}, n_ctx: {context})",
            param=param,
        )


class ExceedsKeyLimit(BadRequest):
    """The limits of the key are too low to ever serve the request."""

    code = "exceeds_key_limit"


class Unauthorized(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class SessionEnded(Unauthorized):
    code = "session_ended"


class LoginFailed(Unauthorized):
    code = "login_failed"


class LoginNeeded(Unauthorized):
    """A page needs a session: the browser is sent to the login, and comes back."""

    code = "login_needed"


class SignOnFailed(ApiError):
    """Single sign-on has not led to a session."""

    status, type, code = 401, "authentication_error", "sign_on_failed"


class SignOnForbidden(SignOnFailed):
    """The provider knows the person, and this box lets them not in."""

    status, type, code = 403, "permission_error", "sign_on_forbidden"


class SignOnUnavailable(SignOnFailed):
    """The provider cannot be used now."""

    status, type, code = 503, "server_error", "sign_on_unavailable"


class BudgetExceeded(ApiError):
    status, type, code = 402, "insufficient_quota", "budget_exceeded"


class Forbidden(ApiError):
    status, type, code = 403, "permission_error", "permission_denied"


class Locked(Forbidden):
    """The session does not have the key of the account's chats."""

    code = "locked"


class SealNotChosen(Forbidden):
    """The account has no key for its chats yet: somebody has to choose what wraps it."""

    code = "seal_not_chosen"


class WrongSecret(Forbidden):
    """In a session: that is not the password, passphrase or recovery key."""

    code = "wrong_secret"


class CrossSite(Forbidden):
    """A change that a page of another site may have had the browser send."""

    code = "cross_site_request"


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


class TranscriptNotFound(NotFound):
    code = "transcript_not_found"


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
    """The content encoding of the body is not supported."""

    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class InvalidBody(ApiError):
    """The JSON is well-formed, but a field is not valid.

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
    """The limit allows the request after `retry_after` seconds."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    retry_after = 1


class InternalError(ApiError):
    status, type, code = 500, "server_error", "internal_error"


class NoNodesAvailable(ApiError):
    status, type, code = 503, "server_error", "no_nodes_available"
    retry_after = 1


class EngineLost(NoNodesAvailable):
    """The engine or peer (`node_id`) that served the request was lost; another may serve it."""

    def __init__(self, message: str, *, node_id: str = "") -> None:
        super().__init__(message)
        self.node_id = node_id


class PeerFaulty(EngineLost):
    """A peer violated the protocol: it sent what it did not sign, or was not asked for."""


class UpstreamBusy(NoNodesAvailable):
    """An upstream asks to be left alone for `retry_after` seconds; others may serve the request."""


class UpstreamLost(NoNodesAvailable):
    """An upstream failed, or says what nobody can use; others may serve the request."""


class UpstreamFailed(UpstreamLost):
    """An upstream says that it has failed on this request: others may not fare so."""


class TooLate(NoNodesAvailable):
    """The request cannot start before its deadline."""

    code = "deadline_exceeded"


class PeerUnreachable(NoNodesAvailable):
    """A box that the operation needs does not answer."""

    code = "peer_unreachable"


def by_code(code: str, message: str, param: str | None = None) -> ApiError:
    """The error with a `code`, as frames of the engine carry it."""
    kinds: list[type[ApiError]] = [ApiError]
    for kind in kinds:  # those added to it as well
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds[1:] if kind.code == code), InternalError)
    if issubclass(kind, InvalidBody):
        return kind(message, loc=("body", *(param.split(".") if param else ())))
    return kind(message, param=param)
