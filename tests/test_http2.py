"""HTTP/2: what one stream does is nobody else's loss, and floods are bounded."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from h2.connection import H2Connection
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PriorityFrame,
    RstStreamFrame,
    WindowUpdateFrame,
)

from pinaivu_box.server import http2
from pinaivu_box.tls.pinned import pinned_context
from tests.support.asgi_server import served
from tests.support.http2_client import headers, http2_client
from tests.support.process_box import UNDRAFTED, Box, StartBox
from tests.support.waiting import DEADLINE, soon
from tests.support.waiting import wait_until as wait_for

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end", "more_body": False}
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11


async def read_body(receive: Any) -> int:
    """The number of its bytes."""
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if not message["more_body"]:
            return size
    raise AssertionError("the client has gone")


class Steered:
    """An application that does what the path says; `held` are the requests that wait."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.running = self.held = self.most_held = self.written = 0
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        self.scopes.append(scope)
        self.running += 1
        try:
            await self.answer(scope, receive, send)
        finally:
            self.running -= 1

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        match scope["path"]:
            case "/count":
                size = await read_body(receive)
                await send(START)
                await send({**END, "body": b"%d" % size})
            case "/early":
                await send({**START, "status": 413})
                await send(END)
            case "/endless":
                await send(START)
                while not self.go_on.is_set():
                    await asyncio.sleep(0)
                    await send({**END, "body": bytes(10_000), "more_body": True})
                    self.written += 10_000
            case "/hold":
                self.held += 1
                self.most_held = max(self.most_held, self.held)
                await self.go_on.wait()
                self.held -= 1
                await send(START)
                await send(END)
            case _:
                await send(START)
                await send(END)


@pytest.mark.anyio
async def test_a_body_that_nobody_reads_stops_no_other_stream() -> None:
    app = Steered()
    async with served(app) as port, http2_client(port) as client:
        for _ in range(3):
            waiting = await client.request("POST", "/hold", end=False)
            for _ in range(50):
                client.talk.send_data(waiting, b"x")
        await client.send()
        large = await client.request("POST", "/count", end=False)
        await client.upload(large, 3_000_000)
        assert await client.answer(large) == b"3000000"
        assert app.held == 3


@pytest.mark.anyio
async def test_what_a_client_may_send_unread_is_bounded() -> None:
    app = Steered()
    async with served(app) as port, http2_client(port) as client:
        waiting = await client.request("POST", "/hold", end=False)
        await client.until(lambda: client.talk.local_flow_control_window(waiting) > 65_535)
        uploading = asyncio.create_task(client.upload(waiting, 1_000_000))
        await wait_for(lambda: client.talk.local_flow_control_window(waiting) == 0)
        assert await client.answer(await client.request()) == b"end"
        assert client.talk.local_flow_control_window(waiting) == 0
        app.go_on.set()
        await client.answer(waiting)
        uploading.cancel()


@pytest.mark.anyio
async def test_an_answer_that_nobody_reads_is_held_in_part_and_stops_no_other_stream() -> None:
    app = Steered()
    async with served(app) as port, http2_client(port, reads=False) as client:
        slow = await client.request("GET", "/endless")
        await client.until(lambda: len(client.answers[slow]) == 65_535)
        # The window of the connection is used up too: it is opened, that of the stream is not.
        client.talk.increment_flow_control_window(65_535)
        await client.send()
        assert await client.answer(await client.request()) == b"end"
        for _ in range(1000):
            await asyncio.sleep(0)
        assert app.written < 65_535 + 4 * 32_768
        client.talk.reset_stream(slow)
        await client.send()
        app.go_on.set()
        await wait_for(lambda: app.running == 0)


@pytest.mark.anyio
async def test_who_writes_goes_on_when_the_client_has_gone() -> None:
    app = Steered()
    async with served(app) as port:
        async with http2_client(port, reads=False) as client:
            slow = await client.request("GET", "/endless")
            await client.until(lambda: len(client.answers[slow]) == 65_535)
        app.go_on.set()
        await wait_for(lambda: app.running == 0)


@pytest.mark.anyio
async def test_streams_that_are_opened_and_reset_run_in_bounded_number() -> None:
    app = Steered()
    async with served(app) as port, http2_client(port) as client:
        last = 0
        for _ in range(1000):
            last = client.talk.get_next_available_stream_id()
            client.talk.send_headers(last, headers("GET", "/hold"), end_stream=True)
            client.talk.reset_stream(last)
        await client.send()
        kept = await client.request("GET", "/hold")
        await client.until(lambda: kept in client.resets)
        assert client.resets[kept] == REFUSED_STREAM  # a client may send it again
        assert app.most_held == http2.MAX_RUNNING
        app.go_on.set()
        await wait_for(lambda: app.running == 0)
        assert await client.answer(await client.request()) == b"end"


@pytest.mark.anyio
async def test_headers_without_end_close_their_connection_only() -> None:
    async with served(Steered()) as port, http2_client(port) as other:
        async with http2_client(port) as client:
            block = client.talk.encoder.encode(headers("GET", "/"))
            await client.send_raw(HeadersFrame(1, block).serialize())
            for _ in range(100):
                await client.send_raw(ContinuationFrame(1, b"").serialize())
            await wait_for(lambda: client.closed)
        async with http2_client(port) as client:
            await client.request("GET", "/", ("x-large", "x" * 70_000))
            await wait_for(lambda: client.gone == ENHANCE_YOUR_CALM)
        async with http2_client(port) as client:
            for stream in range(1, 6001, 2):
                await client.send_raw(PriorityFrame(stream, 0, 16).serialize())
            assert await client.answer(await client.request()) == b"end"
        assert await other.answer(await other.request()) == b"end"


def request_and_more(*frames: Frame) -> bytes:
    """A request without the end of its body, and what arrives with it."""
    client = H2Connection()
    client.initiate_connection()
    client.send_headers(1, headers("POST", "/hold"))
    client.send_data(1, b"x" * 100)
    return client.data_to_send() + b"".join(frame.serialize() for frame in frames)


@pytest.mark.anyio
async def test_nonsense_ends_its_connection_and_is_not_worth_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Steered()
    app.go_on.set()
    async with served(app) as port:
        for data in (
            request_and_more(GoAwayFrame(0)),
            request_and_more(DataFrame(1, b"y"), GoAwayFrame(0), DataFrame(1, b"z")),
            request_and_more(DataFrame(99, b"y")),
            request_and_more(RstStreamFrame(99)),
            request_and_more(WindowUpdateFrame(0, 2**31 - 1)),
            request_and_more(WindowUpdateFrame(1, 2**31 - 1), DataFrame(1, b"z")),
            request_and_more(DataFrame(1, b"z", flags=["END_STREAM"]), DataFrame(1, b"z")),
            request_and_more(HeadersFrame(3, b"\xff\xff\xff", flags=["END_HEADERS"])),
            request_and_more() + bytes(range(256)),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"nonsense" * 100,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            writer.write_eof()
            await soon(reader.read())
            writer.close()
        async with http2_client(port) as client:
            assert await client.answer(await client.request()) == b"end"
        await wait_for(lambda: app.running == 0)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.anyio
async def test_a_body_may_go_on_after_its_answer() -> None:
    async with served(Steered()) as port, http2_client(port) as client:
        early = await client.request("POST", "/early", end=False)
        assert await client.answer(early) == b"end" and client.statuses[early] == 413
        await client.upload(early, 2_000_000)
        assert await client.answer(await client.request()) == b"end"


@pytest.mark.anyio
async def test_a_connection_lasts_for_any_number_of_requests() -> None:
    app = Steered()
    async with served(app) as port, http2_client(port) as client:
        first = await client.request("GET", "/hold")
        for _ in range(12):
            streams = [await client.request() for _ in range(90)]
            assert {await client.answer(stream) for stream in streams} == {b"end"}
        app.go_on.set()
        assert await client.answer(first) == b"end" and client.gone is None


@pytest.mark.anyio
async def test_what_is_no_request_is_refused() -> None:
    app = Steered()
    async with served(app) as port, http2_client(port) as client:
        for path in ("/\xff", "nowhere", "*"):
            stream = await client.request("GET", path)
            await client.until(lambda one=stream: one in client.ended)  # type: ignore[misc]
            assert client.statuses[stream] == 400, path
        assert not app.scopes
        crumbs = [("cookie", "a=1"), ("x", "y"), ("cookie", "b=2")]
        assert await client.answer(await client.request("GET", "/", *crumbs)) == b"end"
        found = [value for name, value in app.scopes[0]["headers"] if name == b"cookie"]
        assert found == [b"a=1; b=2"]


@pytest.mark.anyio
async def test_there_are_no_web_sockets() -> None:
    app = Steered()
    async with served(app) as port:
        async with http2_client(port) as client:
            protocol = (":protocol", "websocket")
            await client.request("CONNECT", "/", protocol, end=False)
            await wait_for(lambda: client.closed or client.statuses)
            assert 200 not in client.statuses.values()
        async with http2_client(port) as client:
            assert await client.answer(await client.request()) == b"end"
        assert len(app.scopes) == 1


@pytest.mark.anyio
async def test_there_is_no_upgrade_over_plain_http() -> None:
    async with served(Steered()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: box\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
        )
        assert (await soon(reader.readline())).startswith(b"HTTP/1.1 200")
        writer.close()


# -- a box over TLS --------------------------------------------------------------------------------

SLOW = "slow:1"
BOX = '[server]\ntls = "self-signed"\n' + UNDRAFTED


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box("--model", f"{SLOW}=fake:5", config=BOX)


def chat(tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": SLOW, "messages": messages, "stream": True, "max_tokens": tokens, **more}


@asynccontextmanager
async def client_of(box: Box, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        http2=True,
        base_url=box.url,
        verify=pinned_context(box.home),
        trust_env=False,
        timeout=DEADLINE,
        headers={"Authorization": f"Bearer {box.key}"},
        **more,
    ) as client:
        yield client


@pytest.mark.anyio
async def test_a_hundred_streams_share_one_connection(box: Box) -> None:
    async def read(client: httpx.AsyncClient) -> tuple[str, int]:
        path = "/v1/chat/completions"
        async with client.stream("POST", path, json=chat(8)) as answer:
            lines = [line async for line in answer.aiter_lines()]
        assert lines[-2] == "data: [DONE]"
        return answer.http_version, len(lines)

    limits = httpx.Limits(max_connections=1)
    async with client_of(box, limits=limits) as client:
        found = await asyncio.gather(*(read(client) for _ in range(100)))
    assert {version for version, _ in found} == {"HTTP/2"}
    assert min(lines for _, lines in found) > 4


@pytest.mark.anyio
async def test_large_bodies_of_many_streams_are_all_read(box: Box) -> None:
    """More than the box has in memory at a time, so that some wait for others."""
    text = "word " * 60_000
    body = {"model": SLOW, "messages": [{"role": "user", "content": text}]}
    limits = httpx.Limits(max_connections=1)
    async with client_of(box, limits=limits) as client:
        path = "/v1/chat/completions"
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(8)))
        assert {answer.json()["error"]["code"] for answer in answers} == {"context_length_exceeded"}
        refused = await client.post(path, content=bytes(11_000_000))
        assert refused.status_code == 413 and refused.http_version == "HTTP/2"


@pytest.mark.anyio
async def test_a_stream_that_is_reset_ends_its_answer(box: Box) -> None:
    context = pinned_context(box.home)
    context.set_alpn_protocols(["h2"])
    port = int(box.url.rpartition(":")[2])
    async with http2_client(port, context=context) as client:
        headers = ("authorization", f"Bearer {box.key}"), ("content-type", "application/json")
        path = "/v1/chat/completions"
        kept, left = [await client.request("POST", path, *headers, end=False) for _ in range(2)]
        for stream, tokens in ((kept, 60), (left, 100_000)):
            client.talk.send_data(stream, json.dumps(chat(tokens)).encode(), end_stream=True)
        await client.send()
        await client.until(lambda: bool(client.answers[kept] and client.answers[left]))
        client.talk.reset_stream(left)
        await client.send()
        assert (await client.answer(kept)).endswith(b"data: [DONE]\n\n")
    left_early = f'pinaivu_requests_total{{model="{SLOW}",status="499"}} 1.0'
    async with client_of(box) as asking:
        while left_early not in (await asking.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def test_curl_speaks_it(box: Box) -> None:
    if not (curl := shutil.which("curl")):
        pytest.skip("curl is not installed")
    done = subprocess.run(
        [
            *(curl, "-sS", "--http2", "--no-buffer", "--cacert", box.home / "tls/self-signed.crt"),
            *("-w", "%{http_version}", "-H", f"Authorization: Bearer {box.key}"),
            *("--json", json.dumps(chat(5)), f"{box.url}/v1/chat/completions"),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    if done.stdout.endswith("1.1"):
        pytest.skip("this curl has no HTTP/2")
    assert done.stdout.endswith("data: [DONE]\n\n2")
