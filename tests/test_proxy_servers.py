"""A box behind nginx and Caddy, with the configurations of docs/proxies.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.certificates import make_certificate
from tests.support.held_upstream import MODEL, WORDS, HeldUpstream
from tests.support.in_process_command import run_command
from tests.support.ports import free_port
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.waiting import DEADLINE
from tests.support.waiting import wait_until as wait_for

DOCUMENT = (Path(__file__).parent.parent / "docs/proxies.md").read_text()
BLOCKS = re.findall(r"```(nginx|caddy)\n(.*?)```", DOCUMENT, re.DOTALL)
CLIENT = "127.0.0.2"  # its address; the proxies have 127.0.0.1
PASSWORD = "correct horse battery"
# What else the proxy compresses.
NGINX = """
daemon off; pid {folder}/nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 256; }}
http {{
    access_log off; gzip on; gzip_types *; gzip_min_length 1;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    {servers}
}}
"""
NGINX_SERVER = """
server {{
    listen 443 ssl http2; server_name localhost;
    ssl_certificate /etc/ssl/box.pem; ssl_certificate_key /etc/ssl/box.key;
    {location}
}}
"""
CADDY = """
{{
    admin off
    auto_https off
    skip_install_trust
    default_bind 127.0.0.1
    servers {{
        protocols h1 h2
    }}
}}
{site}
"""


@dataclass
class Proxy:
    url: str  # of the box, seen through it
    context: ssl.SSLContext

    def client(self, *, http2: bool = True, **more: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(
            verify=self.context, http2=http2, local_address=CLIENT, trust_env=False
        )
        return httpx.Client(base_url=self.url, transport=transport, timeout=DEADLINE, **more)


@pytest.fixture(scope="module")
def upstream() -> Iterator[HeldUpstream]:
    made = HeldUpstream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def box(module_box: StartBox, upstream: HeldUpstream) -> Box:
    server = '[server]\ntrusted_proxies = ["127.0.0.1"]\nstream_grace_seconds = 0.01\n'
    return module_box(config=server + upstream.config)


@pytest.fixture(scope="module", params=range(4), ids=["nginx", "nginx/path", "caddy", "caddy/path"])
def proxy(
    request: pytest.FixtureRequest, box: Box, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    kind, block = BLOCKS[request.param]
    program = shutil.which(kind) or shutil.which(f"/usr/sbin/{kind}")
    if program is None:
        pytest.skip(f"{kind} is not installed")
    folder, port = tmp_path_factory.mktemp(kind), free_port(socket.SOCK_STREAM)
    cert, key = make_certificate(folder)
    block = block.replace("box.example", "localhost").replace("host.example", "localhost")
    if kind == "nginx":
        text = NGINX_SERVER.format(location=block) if block.startswith("location") else block
        user = "user root;" if os.geteuid() == 0 else ""
        text = NGINX.format(folder=folder, user=user, servers=text)
        text = text.replace("listen 443", f"listen 127.0.0.1:{port}")
        text = text.replace("/etc/ssl/box.pem", str(cert)).replace("/etc/ssl/box.key", str(key))
        command = [program, "-p", str(folder), "-e", "stderr", "-c"]
    else:
        site = block.replace("localhost {", f"https://localhost:{port} {{\n tls {cert} {key}\n")
        text = CADDY.format(site=site.replace("{\n tls", "{\n encode gzip\n tls"))
        command = [program, "run", "--adapter", "caddyfile", "--config"]
    address = box.url.removeprefix("http://")
    assert "127.0.0.1:4001" in text
    config = folder / "proxy.conf"
    config.write_text(text.replace("127.0.0.1:4001", address))
    with (folder / "log").open("w") as errors:
        running = subprocess.Popen(
            [*command, str(config)], stderr=errors, stdout=errors,
            env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)},
        )  # fmt: skip
    path = "/box" if "/box/" in block else ""
    context = ssl.create_default_context(cafile=str(cert))
    found = Proxy(f"https://localhost:{port}{path}/", context)
    try:
        with found.client() as client:

            def answers() -> bool:
                assert running.poll() is None, (folder / "log").read_text()
                try:
                    return client.get("health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers, "the proxy to answer")
        yield found
    finally:
        running.terminate()
        running.wait(60)


def chat(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def headers(box: Box) -> dict[str, str]:
    return {"Authorization": f"Bearer {box.key}", "Accept-Encoding": "gzip"}


def test_an_answer_arrives_while_it_is_made(proxy: Proxy, box: Box, upstream: HeldUpstream) -> None:
    """Its rest is held until the beginning has arrived, and so is the beginning until the comment
    that keeps connections alive has."""
    upstream.begin.clear()
    upstream.go_on.clear()
    with (
        proxy.client(headers=headers(box)) as client,
        client.stream("POST", "v1/chat/completions", json=chat(stream=True)) as answer,
    ):
        assert answer.status_code == 200 and answer.http_version == "HTTP/2"
        assert "content-encoding" not in answer.headers
        lines = answer.iter_lines()
        assert next(lines) == ": waiting"
        upstream.begin.set()
        wanted = f'"content":"{WORDS[0]}"'
        assert next(line for line in lines if wanted in line)
        upstream.go_on.set()
        assert "data: [DONE]" in list(lines)


def test_a_client_that_leaves_ends_its_answer(
    proxy: Proxy, box: Box, upstream: HeldUpstream
) -> None:
    async def leave(*, stream: bool) -> None:
        arrived, left = len(upstream.sizes), upstream.left
        async with httpx.AsyncClient(
            http2=True, verify=proxy.context, trust_env=False, headers=headers(box),
            base_url=proxy.url, timeout=DEADLINE,
        ) as client:  # fmt: skip
            asking = asyncio.create_task(
                client.post("v1/chat/completions", json=chat(stream=stream))
            )
            await wait_for(lambda: len(upstream.sizes) > arrived)
            asking.cancel()
        await wait_for(lambda: upstream.left > left)

    upstream.go_on.clear()
    try:
        asyncio.run(leave(stream=True))
        asyncio.run(leave(stream=False))
    finally:
        upstream.go_on.set()


def test_bodies_are_as_large_as_the_box_takes_them(
    proxy: Proxy, box: Box, upstream: HeldUpstream
) -> None:
    # Over HTTP/2, httpx never reads an answer that comes before it has sent its body.
    with proxy.client(http2=False, headers=headers(box)) as client:
        answer = client.post("v1/chat/completions", json=chat("word " * 2_000_000))
        assert answer.json()["choices"][0]["message"]["content"] == "".join(WORDS)
        assert upstream.sizes[-1] > 10_000_000
        refused = client.post("v1/chat/completions", content=b" " * 10_600_000)
        assert refused.status_code == 413 and refused.json()["error"]["code"]


def test_the_box_sees_the_client_and_where_it_is(proxy: Proxy, box: Box) -> None:
    path = httpx.URL(proxy.url).path.rstrip("/")
    link = run_command("accounts", "link", "owner", home=box.home).stdout.strip()
    with proxy.client() as client:
        lies = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Prefix": "/lie"}
        lies |= {"Forwarded": "for=198.51.100.7", "X-Forwarded-Host": "evil.example"}
        body = {"token": link.rpartition("/")[2], "password": PASSWORD}
        answer = client.post("v1/session/link", json=body, headers=lies)
        assert answer.status_code == 200, answer.text
        cookie = answer.headers["set-cookie"].lower()
        assert "secure" in cookie and "httponly" in cookie and f"path={path or '/'};" in cookie
        csrf = answer.json()["csrf"]
        made = client.post(
            "v1/account/keys", json={"name": f"through{path[1:]}{proxy.url[-9:-5]}"},
            headers={"x-csrf-token": csrf, **lies},
        )  # fmt: skip
        assert made.status_code == 200, made.text
        page = client.get("account", headers={"Accept": "text/html"})
        links = re.findall(r'(?:href|src)="(/[^"]*)"', page.text)
        assert page.status_code == 200 and links
        assert all(link.startswith(f"{path}/") for link in links), links
        assert client.get("openapi.json").json()["servers"] == [{"url": path or "."}]
    audit = box.http("GET", "/v1/admin/audit?limit=5").json()["data"]
    assert CLIENT in [entry["source"] for entry in audit], json.dumps(audit)
    assert "198.51.100.7" not in json.dumps(audit)
