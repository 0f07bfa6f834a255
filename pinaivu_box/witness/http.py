"""Witnesses outside of the network, over HTTP (C2SP tlog-witness)."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import msgspec

from pinaivu_box import http_body
from pinaivu_box.errors import PeeringError, Unreachable
from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.note import NoteError
from pinaivu_box.text import number
from pinaivu_box.witness.cosigning import Ask
from pinaivu_box.witness.rules import Submission
from pinaivu_box.witness.wire import Cosigned, Declined, SizeConflict, Submit

if TYPE_CHECKING:
    import httpx

# Base64: the statement with which a log begins; with 422, the former checkpoint that it has to
# name.
STATEMENT_HEADER = "pinaivu-log-restart"
FORMER_HEADER = "pinaivu-log-former"
_SECONDS = 20.0
_MAX_ANSWER_BYTES = 65536
_CONFLICT, _REFUSED = 409, 422
_MEANINGS = {
    403: " (it has another key for the log of this box)",
    404: " (it does not know the log of this box, or there is no witness)",
    _REFUSED: " (it has seen another history of the log)",
}


class HttpWitnesses:
    """Keeps connections; `close` closes them."""

    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def ask(self, url: str, *, is_box: bool = True) -> Ask:
        """Sends checkpoints to the witness with that submission prefix.  Of restarts only boxes
        know."""

        async def ask(submit: Submit) -> Cosigned | SizeConflict | Declined:
            if not is_box:
                submit = msgspec.structs.replace(submit, restart=b"")
            return await self._submit(url.rstrip("/"), submit)

        return ask

    async def _submit(self, url: str, submit: Submit) -> Cosigned | SizeConflict | Declined:
        signed = note.read(submit.note)
        body = Submission(submit.old, submit.proof, signed).text
        headers = {"content-type": "text/plain; charset=utf-8"}
        if submit.restart:
            headers[STATEMENT_HEADER] = base64.b64encode(submit.restart).decode()
        status, text, former = await self._request("POST", f"{url}/add-checkpoint", body, headers)
        if status == 200:
            return Cosigned(text)
        if status == _REFUSED and former and not submit.restart:
            return SizeConflict(0, former)
        if status != _CONFLICT:
            return Declined(status, f"it answered {status}{_MEANINGS.get(status, '')}")
        size = number(text.removesuffix("\n"))
        if size is None:
            raise PeeringError(f"{url} answered {_CONFLICT} without a size.")
        head = checkpoint.read(signed)
        known = await self._known(url, head.origin) if size > head.size else ""
        return SizeConflict(size, known)

    async def _known(self, url: str, origin: str) -> str:
        """The last checkpoint that it cosigned; empty if it does not give it."""
        name = hashlib.sha256(origin.encode()).hexdigest()
        status, text, _ = await self._request("GET", f"{url}/{name}/checkpoint", "", {})
        try:
            return str(note.read(text)) if status == 200 else ""
        except NoteError:
            return ""

    async def _request(
        self, method: str, url: str, body: str, headers: dict[str, str]
    ) -> tuple[int, str, str]:
        """Status, text and the former checkpoint.  Raises PeeringError."""
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(timeout=_SECONDS)
        try:
            async with self._client.stream(method, url, content=body, headers=headers) as answer:
                data = await http_body.read(answer, _MAX_ANSWER_BYTES)
                if data is None:
                    raise PeeringError(f"{url} answered more than a witness does.")
                former = _former(answer.headers.get(FORMER_HEADER, ""))
                return answer.status_code, data.decode(errors="replace"), former
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(f"{url} cannot be asked: {error}.") from error


def _former(encoded: str) -> str:
    """Empty if it is no note."""
    try:
        return str(note.read(base64.b64decode(encoded, validate=True).decode()))
    except (NoteError, ValueError):
        return ""
