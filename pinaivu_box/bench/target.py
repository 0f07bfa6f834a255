"""A URL with its key, model and additional fields, and the requests to it before a run."""

from __future__ import annotations

import random
import ssl
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pinaivu_box.bench.client import RequestOutcome, stream
from pinaivu_box.bench.workload import Scale, Workload, WorkloadRequest
from pinaivu_box.errors import CliError, UsageError

CHAT = "/chat/completions"
_PROBES = (8, 136)  # words of the two prompts that determine the scale
_PROBE_SECONDS = 600.0  # the server may have to load the model first


class BenchTarget(msgspec.Struct, frozen=True):
    """Where requests go.  `url` is as given; `fields` are added to every body."""

    url: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    path: str
    key: str
    model: str
    fields: dict[str, Any]

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        key: str = "",
        model: str = "",
        fields: dict[str, Any] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> BenchTarget:
        """`http://host:port`, its `/v1`, or the whole address of its chat completions.

        `tls` verifies the server, if not the system's authorities are to do so.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"'{url}' is not a URL such as http://localhost:4001/v1.")
        path = parts.path.rstrip("/") or "/v1"
        return cls(
            url=url,
            host=parts.hostname,
            port=port,
            tls=(tls or ssl.create_default_context()) if parts.scheme == "https" else None,
            path=path if path.endswith(CHAT) else path + CHAT,
            key=key,
            model=model,
            fields=fields or {},
        )

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def message(self, request: WorkloadRequest, key: str | None = None) -> bytes:
        """The HTTP request, head and body; `key` replaces that of the target."""
        body = msgspec.json.encode(
            {
                "model": self.model,
                "messages": request.messages,
                "max_tokens": request.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self.fields,
            }
        )
        secret = self.key if key is None else key
        head = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {self.authority}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            "Connection: close",
            f"Content-Length: {len(body)}",
            *([f"Authorization: Bearer {secret}"] if secret else []),
        ]
        return "\r\n".join([*head, "", ""]).encode() + body


async def named(target: BenchTarget) -> BenchTarget:
    """The target with a model, by default the first of the server.  Raises CliError."""
    if target.model:
        return target
    import httpx

    scheme = "https" if target.tls else "http"
    models = f"{scheme}://{target.authority}{target.path.removesuffix(CHAT)}/models"
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    try:
        verify = target.tls or False  # False: there is nothing to verify without TLS
        async with httpx.AsyncClient(verify=verify, trust_env=False, timeout=30) as client:
            answer = (await client.get(models, headers=headers)).raise_for_status()
        model = answer.json()["data"][0]["id"]
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise CliError(f"{models} answered {status}: use a valid --key, or --model.") from error
    except (httpx.HTTPError, ssl.SSLError) as error:
        raise CliError(f"{target.url} cannot be reached: {error or 'no answer'}.") from error
    except (ValueError, LookupError, TypeError):
        raise CliError(f"{models} lists no model: name one with --model.") from None
    return msgspec.structs.replace(target, model=str(model))


async def measure_scale(target: BenchTarget, workload: Workload) -> Scale:
    """Send two short requests, which load the model, and return how the server counts tokens.

    If the server reports no usage, one token per word is assumed.  Raises CliError.
    """
    counts = []
    for words in _PROBES:
        rng = random.Random(f"scale/{words}")  # noqa: S311
        request = WorkloadRequest(workload.messages(words, rng), 1)
        outcome = RequestOutcome()
        await stream(target, target.message(request), outcome, _PROBE_SECONDS)
        if outcome.error:
            why = outcome.detail or outcome.error
            raise CliError(f"{target.url} does not answer a chat request: {why.rstrip('.')}.")
        counts.append(outcome.prompt_tokens)
    first, second = counts
    if not first or not second or second <= first:
        return Scale()
    slope = (second - first) / (_PROBES[1] - _PROBES[0])
    return Scale(slope, max(0.0, first - slope * _PROBES[0]))
