"""A body that nobody reads, since the answer is known before: over raw sockets."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import h2.connection
import h2.events
import pytest

from tests.support.in_process_command import run_command_json
from tests.support.process_box import Box, StartBox

LARGE = 9_000_000
LIMIT = "[server]\nmax_body_bytes = 1000000\n"
SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    return module_box("--model", "fake:1=fake:0", config=LIMIT)


def connected(box: Box) -> socket.socket:
    host, port = box.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=120)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    return made


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: box", *lines, "", "")).encode()


def answers(client: socket.socket) -> list[tuple[int, dict[str, str]]]:
    """All that comes up to the end of the connection: each status with its headers."""
    data = b""
    while part := client.recv(65536):
        data += part
    found = []
    while data:
        top, _, data = data.partition(b"\r\n\r\n")
        first, *lines = top.decode().split("\r\n")
        status = int(first.split()[1])
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        if status != 100:
            data = data[int(headers["content-length"]) :]
            found.append((status, headers))
    return found


def send_all(client: socket.socket, first: bytes, chunked: bool) -> None:
    """The head, then the body to its end or until nobody takes it any more."""
    client.sendall(first)
    part = SMUGGLED.ljust(50_000, b" ")
    try:
        for _ in range(LARGE // len(part)):
            client.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        if chunked:
            client.sendall(b"0\r\n\r\n")
    except (BrokenPipeError, ConnectionResetError):
        pass


CASES = {
    "no key": (401, "POST", "/v1/chat/completions", ""),
    "unknown key": (401, "POST", "/v1/responses", "sk-pnv-none"),
    "no scope": (403, "POST", "/v1/admin/keys", "inference"),
    "no such path": (404, "POST", "/v1/nothing", "all"),
    "outside": (404, "PUT", "/nothing", ""),
    "no such method": (405, "PUT", "/v1/chat/completions", "all"),
    "too large": (413, "POST", "/v1/chat/completions", "all"),
    "another's": (404, "DELETE", "/v1/responses/resp_x", "all"),
    "preflight": (200, "OPTIONS", "/v1/chat/completions", "preflight"),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_refused_client_gets_the_error_and_connection_close(
    here: Box, case: tuple[int, str, str, str], chunked: bool
) -> None:
    status, method, path, key = case
    if key == "inference":
        key = run_command_json("keys", "create", "--scope", "inference", home=here.home)["key"]
    lines = [f"Authorization: Bearer {here.key if key == 'all' else key}"] if key else []
    if key == "preflight":
        lines = ["Origin: http://x", "Access-Control-Request-Method: POST"]
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {LARGE}"
    with connected(here) as client:
        send_all(client, head(method, path, *lines, size), chunked)
        (found,) = answers(client)
    assert found[0] == status and found[1]["connection"] == "close"


def test_a_client_that_never_sends_its_body_is_answered(here: Box) -> None:
    """Nothing of it ever comes; the connection has an end all the same."""
    with connected(here) as client:
        client.sendall(head("POST", "/v1/chat/completions", f"Content-Length: {LARGE}"))
        ((status, headers),) = answers(client)
    assert (status, headers["connection"]) == (401, "close")


def test_a_body_sent_after_the_answer_resets_nothing(here: Box) -> None:
    """A reset could overtake our answer: what a client was sending meanwhile is taken."""
    with connected(here) as client:
        client.sendall(head("POST", "/v1/responses", f"Content-Length: {LARGE}"))
        assert answers(client)[0][0] == 401  # and it has ended
        for _ in range(3):
            client.sendall(bytes(100_000))


def test_a_connection_whose_body_was_read_goes_on(here: Box) -> None:
    body = json.dumps({"model": "fake:1", "messages": []}).encode()
    key = f"Authorization: Bearer {here.key}"
    with connected(here) as client:
        one = head("POST", "/v1/chat/completions", key, f"Content-Length: {len(body)}") + body
        client.sendall(
            one + head("GET", "/v1/models") + head("GET", "/health", "Connection: close")
        )
        found = answers(client)
    assert [status for status, _ in found] == [422, 401, 200]
    assert "connection" not in found[0][1] and "connection" not in found[1][1]


def test_http_2_does_without_that_header(here: Box) -> None:
    with connected(here) as client:
        talk = h2.connection.H2Connection()
        talk.initiate_connection()
        names = {":method": "POST", ":path": "/v1/responses", ":scheme": "http", ":authority": "x"}
        for stream in (1, 3):
            talk.send_headers(stream, list(names.items()))
            talk.send_data(stream, b"{" * 10_000)
        client.sendall(talk.data_to_send())
        found: dict[int, dict[str, str]] = {}
        ended: set[int] = set()
        while len(ended) < 2:
            for event in talk.receive_data(client.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    text = [(_text(name), _text(value)) for name, value in event.headers or ()]
                    found[event.stream_id or 0] = dict(text)
                if isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id or 0)
            client.sendall(talk.data_to_send())
    assert {one[":status"] for one in found.values()} == {"401"}
    assert all("connection" not in one for one in found.values())


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def test_many_that_are_refused_hold_no_descriptor(here: Box) -> None:
    def open_files() -> int:
        return len(list(Path(f"/proc/{here.process.pid}/fd").iterdir()))

    before = open_files()
    for _ in range(50):
        with connected(here) as client:
            send_all(client, head("POST", "/v1/responses", "Content-Length: 200000"), False)
            assert answers(client)[0][0] == 401
    assert open_files() < before + 25
