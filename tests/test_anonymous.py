"""Requests without a key are those of the key that the operator named, and of nobody else."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from pinaivu_box import config as configs
from pinaivu_box.errors import CliError, Unauthorized
from pinaivu_box.server import anonymous
from pinaivu_box.server_config import AnonymousKeyConfig
from tests.support.process_box import Box, StartBox

FAKE = "fake:1"
USER = {"role": "user", "content": "hi"}
CONFIG = """
[server.anonymous_key]
key = "everyone"
networks = ["127.0.0.0/8"]
hosts = ["localhost", "box.lan"]
"""
# Every API that runs a model or lists some.
ASKS: dict[str, dict[str, Any] | None] = {
    "/api/chat": {"model": FAKE, "messages": [USER], "options": {"num_predict": 2}},
    "/api/tags": None,
    "/v1/models": None,
    "/v1/chat/completions": {"model": FAKE, "messages": [USER], "max_tokens": 2},
    "/v1/messages": {"model": FAKE, "messages": [USER], "max_tokens": 2},
    "/v1/responses": {"model": FAKE, "input": "hi", "max_output_tokens": 2},
}


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    started = module_box("--model", f"{FAKE}=fake:0", config=CONFIG)
    create(started, "everyone", rpm=1000)
    return started


def create(box: Box, name: str, **policy: Any) -> str:
    body = {"account": "owner", "name": name, "policy": policy}
    done = box.http("POST", "/v1/admin/keys", json=body)
    assert done.status_code == 200, done.text
    return str(done.json()["id"])


def ask(box: Box, path: str, **headers: str) -> tuple[int, str]:
    """The status and the body of an answer to a request with exactly these headers."""
    body = ASKS[path]
    connection = http.client.HTTPConnection("127.0.0.1", int(box.url.rpartition(":")[2]), 60)
    try:
        connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
        data = b"" if body is None else json.dumps(body).encode()
        given = {"Host": "127.0.0.1", **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in {**given, "Content-Length": str(len(data))}.items():
            connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ASKS)
def test_a_request_without_a_credential_is_that_keys_on_every_api(box: Box, path: str) -> None:
    assert ask(box, path)[0] == 200


def test_it_is_metered_and_limited_as_that_key(box: Box) -> None:
    answer = box.http("POST", "/v1/chat/completions", key="", json=ASKS["/v1/chat/completions"])
    assert answer.headers["x-ratelimit-limit-requests"] == "1000"
    receipt = box.http("GET", f"/v1/receipts/{answer.json()['request_id']}", key="")
    assert receipt.status_code == 200


@pytest.mark.parametrize("path", ["/api/tags", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "headers, why",
    [
        ({"Authorization": "Bearer sk-pnv-wrong"}, "malformed"),
        ({"Authorization": ""}, "missing"),
        ({"x-api-key": "sk-pnv-wrong"}, "malformed"),
        ({"Origin": "https://evil.example"}, "another origin"),
        ({"Origin": "null"}, "another origin"),
        ({"Origin": "http://127.0.0.1:1"}, "another origin"),
        ({"Sec-Fetch-Site": "cross-site"}, "another site"),
        ({"Host": "evil.example"}, "host name"),
        ({"Host": "127.0.0.1.evil.example"}, "host name"),
        ({"Host": "x@127.0.0.1"}, "host name"),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, "host name"),
        ({"X-Forwarded-For": "127.0.0.1"}, "proxy"),
        ({"X-Forwarded-Host": "box"}, "proxy"),
        ({"Forwarded": "for=127.0.0.1"}, "proxy"),
        ({"X-Real-IP": "127.0.0.1"}, "proxy"),
        ({"Via": "1.1 proxy"}, "proxy"),
    ],
)
def test_what_may_come_from_elsewhere_is_refused(
    box: Box, path: str, headers: dict[str, str], why: str
) -> None:
    status, text = ask(box, path, **headers)
    assert status == 401 and why in text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:4001"},
        {"Host": "BOX.lan"},
        {"Host": "[::1]:4001"},
        {"Host": "192.168.1.7"},
        {"Host": "localhost:9", "Origin": "http://localhost:9"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_the_boxs_own_names_and_pages_are_served(box: Box, headers: dict[str, str]) -> None:
    assert ask(box, "/api/tags", **headers)[0] == 200


def test_a_key_counts_wherever_the_request_comes_from(box: Box) -> None:
    headers = {"Origin": "https://app.example", "X-Forwarded-For": "1.2.3.4"}
    done = box.http("GET", "/api/tags", headers={**headers, "Host": "box.example"})
    assert done.status_code == 200


def test_what_its_key_may_not_do_is_forbidden(box: Box) -> None:
    done = box.http("GET", "/v1/admin/keys", key="")
    assert done.status_code == 403


def test_a_key_that_is_gone_or_an_admins_serves_nobody(module_box: StartBox) -> None:
    box = module_box("--model", f"{FAKE}=fake:0", config=CONFIG)
    assert "does not exist" in ask(box, "/api/tags")[1]
    admin = create(box, "everyone", scopes=["inference", "admin"])
    assert "scope admin" in ask(box, "/api/tags")[1]
    box.http("POST", f"/v1/admin/keys/{admin}/revoke")
    plain = create(box, "everyone")
    assert ask(box, "/api/tags")[0] == 200
    box.http("POST", f"/v1/admin/keys/{plain}/revoke")
    assert ask(box, "/api/tags")[0] == 401


@pytest.mark.parametrize(
    "address, served",
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("fd00::1", True),
        ("11.1.2.3", False),
        ("::1", False),
        ("", False),
    ],
)
def test_only_named_networks_count(address: str, served: bool) -> None:
    config = AnonymousKeyConfig("everyone", ("10.0.0.0/8", "fd00::/8"))
    headers = Headers({"host": "10.0.0.1"})
    if served:
        anonymous.check(config, headers, "http", address)
        return
    with pytest.raises(Unauthorized, match="serves no request from"):
        anonymous.check(config, headers, "http", address)


def test_it_is_off_unless_a_key_is_named() -> None:
    with pytest.raises(Unauthorized, match="is missing: send it in the header 'Authorization"):
        anonymous.check(AnonymousKeyConfig(), Headers({"host": "127.0.0.1"}), "http", "127.0.0.1")


@pytest.mark.parametrize(
    "text, why",
    [
        ('key = "a"', "needs networks"),
        ('key = "sk-pnv-abc"\nnetworks = ["::1/128"]', "has a secret"),
        ('key = "a"\nnetworks = ["10.0.0.1/8"]', "host bits"),
    ],
)
def test_a_setting_that_would_not_do_what_it_says_is_refused(
    tmp_path: Path, text: str, why: str
) -> None:
    file = tmp_path / "box.toml"
    file.write_text(f"[server.anonymous_key]\n{text}\n")
    with pytest.raises(CliError, match=why):
        configs.load(file, environ={})
