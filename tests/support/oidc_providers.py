"""Providers of OpenID Connect on loopback: a real one, and one that lies as it is told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey

from tests.support.ports import free_port
from tests.support.process_box import wait_until

CLIENT_ID = "box"
SECRET = "client secret of thirty-two chars"


@contextmanager
def real_provider() -> Iterator[str]:
    """`oidc-provider-mock` in a process of its own; its issuer."""
    port = free_port(socket.SOCK_STREAM)
    process = subprocess.Popen(
        [sys.executable, "-m", "oidc_provider_mock", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    issuer = f"http://localhost:{port}"
    try:
        wait_until(lambda: _answers(issuer), "the provider answers")
        yield issuer
    finally:
        process.kill()
        process.wait()


def _answers(issuer: str) -> bool:
    try:
        return httpx.get(f"{issuer}/jwks", timeout=60, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def set_user(issuer: str, subject: str, **claims: Any) -> None:
    done = httpx.put(f"{issuer}/users/{subject}", json=claims, trust_env=False, timeout=60)
    assert done.is_success, done.text


def approve(url: str, subject: str) -> str:
    """What a person does at the real provider; where the browser is sent then."""
    done = httpx.post(url, data={"sub": subject}, trust_env=False, timeout=60)
    assert done.status_code in (302, 303), done.text
    return done.headers["location"]


class LyingProvider:
    """Its tokens are good, unless something of it is set.

    `claims` replace those of the token (None leaves one out), `header` its header, and `key` what
    it is signed with; `description` replaces what it says of itself.
    """

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.issuer = f"http://localhost:{server.server_address[1]}"
        self._served = [RSAKey.generate_key(2048, {"kid": "first"})]
        self.reset()

    def reset(self) -> None:
        self.claims: dict[str, Any] = {}
        self.header: dict[str, Any] = {}
        self.description: dict[str, Any] = {}
        self.userinfo: dict[str, Any] = {}
        self.key: Any = self._served[0]
        self.nonce = ""
        self.asked: dict[str, Any] = {}  # of the last request for a token
        self.looks = 0  # at its keys
        self.broken = ""  # the path that answers 500
        self.refusal = ""  # instead of a token

    def new_key(self) -> Any:
        """A key that it publishes from now on."""
        key = RSAKey.generate_key(2048, {"kid": f"key{len(self._served)}"})
        self._served.append(key)
        return key

    def foreign_key(self, kid: str = "foreign") -> Any:
        return RSAKey.generate_key(2048, {"kid": kid})

    def token(self) -> str:
        now = int(time.time())
        claims = {
            "iss": self.issuer, "sub": "ada", "aud": CLIENT_ID, "iat": now, "exp": now + 600,
            "nonce": self.nonce, **self.claims,
        }  # fmt: skip
        claims = {name: value for name, value in claims.items() if value is not None}
        header = {"alg": "RS256", "kid": self.key.kid, **self.header}
        if header["alg"] == "none":
            signed = jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET))
            return f"{_segment(header)}.{signed.split('.')[1]}."
        return jwt.encode(header, claims, self.key, algorithms=[header["alg"]])

    def answer(self, path: str, form: dict[str, Any], headers: Any) -> Any:
        match path:
            case "/.well-known/openid-configuration":
                return {
                    "issuer": self.issuer,
                    "authorization_endpoint": f"{self.issuer}/authorize",
                    "token_endpoint": f"{self.issuer}/token",
                    "jwks_uri": f"{self.issuer}/keys",
                    "userinfo_endpoint": f"{self.issuer}/userinfo",
                    **self.description,
                }
            case "/keys":
                self.looks += 1
                return {"keys": [{**key.as_dict(private=False)} for key in self._served]}
            case "/token":
                if self.refusal:
                    return {"error": self.refusal}
                self.asked = {**form, "authorization": headers.get("authorization", "")}
                return {"id_token": self.token(), "access_token": "t", "token_type": "Bearer"}
            case "/userinfo":
                return {"sub": "ada", **self.userinfo}
        return None


def _segment(value: dict[str, Any]) -> str:
    from base64 import urlsafe_b64encode

    return urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@contextmanager
def lying_provider() -> Iterator[LyingProvider]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            self._answer({name: value[0] for name, value in parse_qs(body).items()})

        def _answer(self, form: dict[str, Any]) -> None:
            path = urlsplit(self.path).path
            content = provider.answer(path, form, self.headers)
            status = 404 if content is None else 500 if path == provider.broken else 200
            if status == 200 and "error" in content:
                status = 401
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider = LyingProvider(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
