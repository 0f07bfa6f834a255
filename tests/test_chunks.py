"""The short way from a frame to the socket: what is written at once, and what waits."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h2.connection
import h2.events
import httpx
import pytest

from pinaivu_box.engine.fake_runner import SENTENCE
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.server.chunks import ChunkWriter, chunk_writer
from tests.support.asgi_server import served
from tests.support.process_box import UNDRAFTED, Box, StartBox, wait_until
from tests.support.waiting import soon
from tests.support.waiting import wait_until as wait_for

TOKENS = 4000  # of the slow reader's answer: over a megabyte of chunks


# -- the mailbox -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_what_is_offered_comes_in_order_with_what_is_not() -> None:
    mailbox: Mailbox[int] = Mailbox()
    offered: list[int] = []

    def offer(item: int) -> bool:
        if item % 10 == 0:
            return False
        offered.append(item)
        return True

    mailbox.offer = offer
    mailbox.put(1)  # nobody waits: what came before may not be dealt with yet
    assert (await mailbox.take(), offered) == ([1], [])
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(2)
    mailbox.put(3)
    assert offered == [2, 3] and not taking.done()
    mailbox.put(10)  # which is for the reader, as is all that comes before it has read that
    mailbox.put(4)
    assert await taking == [10, 4] and offered == [2, 3]
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    taking.cancel()
    mailbox.put(5)
    assert (await mailbox.take(), offered) == ([5], [2, 3])


# -- the connection --------------------------------------------------------------------------------

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end", "more_body": False}


async def connect(port: int, buffer: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=client, limit=buffer or 2**16)


async def tell(scope: Any, receive: Any, send: Any) -> None:
    """Whether there is a short way."""
    await send(START)
    body = b"short" if chunk_writer(scope) is not None else b"usual"
    await send({**END, "body": body})


@pytest.mark.anyio
async def test_only_answers_of_http_1_1_that_have_a_body_have_the_short_way() -> None:
    async with served(tell) as port:
        for line, told in (
            (b"GET / HTTP/1.1", b"short"), (b"GET / HTTP/1.0", b"usual"), (b"HEAD / HTTP/1.1", b""),
        ):  # fmt: skip
            reader, writer = await connect(port)
            writer.write(line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
            body = (await soon(reader.read())).partition(b"\r\n\r\n")[2]
            assert told in body and bool(told) == bool(body), line
            writer.close()
        reader, writer = await connect(port)
        talk = h2.connection.H2Connection()
        talk.initiate_connection()
        names = {":method": "GET", ":path": "/", ":scheme": "http", ":authority": "x"}
        talk.send_headers(1, list(names.items()), end_stream=True)
        writer.write(talk.data_to_send())
        body, ended = b"", False
        while not ended:
            for event in talk.receive_data(await soon(reader.read(65536))):
                body += event.data if isinstance(event, h2.events.DataReceived) else b""
                ended |= isinstance(event, h2.events.StreamEnded)
        assert body == b"usual"
        writer.close()


@pytest.mark.anyio
async def test_what_is_written_is_bounded_by_what_the_client_reads() -> None:
    written = b""
    writers: list[ChunkWriter] = []
    full, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal written
        writer = chunk_writer(scope)
        assert writer is not None
        writers.append(writer)
        await send(START)
        await send({**END, "body": b"begin ", "more_body": True})
        number = 0
        while writer.ready and len(written) < 64_000_000:
            number += 1
            data = b"%d " % number * 1000
            writer.write(data)
            written += data
        writer.write(b"")  # which is nothing, and not the end
        full.set()
        await go_on.wait()
        await send(END)

    async with served(app) as port:
        reader, client = await connect(port, 8192)
        client.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await soon(full.wait())
        (writer,) = writers
        assert 0 < len(written) < 64_000_000 and not writer.ready
        reading = asyncio.create_task(reader.read())
        await wait_for(lambda: writer.ready)
        go_on.set()
        await soon(reading)
        response = httpx_body(reading.result())
        assert response == b"begin " + written + b"end"
        client.close()


@pytest.mark.anyio
async def test_a_connection_that_is_closed_takes_nothing() -> None:
    writers: list[ChunkWriter] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        writer = chunk_writer(scope)
        assert writer is not None
        await send(START)
        await send({**END, "more_body": True})
        writers.append(writer)
        while (await receive())["type"] != "http.disconnect":
            pass

    async with served(app) as port:
        _, client = await connect(port)
        client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await wait_for(lambda: writers)
        assert writers[0].ready
        client.close()
        await wait_for(lambda: not writers[0].ready)


def httpx_body(response: bytes) -> bytes:
    """The body of a chunked response."""
    rest, body = response.partition(b"\r\n\r\n")[2], b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, ended, rest = body + rest[:length], rest[length : length + 2], rest[length + 2 :]
        assert ended == b"\r\n"
        if not length:
            assert not rest
            return body


# -- a box -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    return module_box("--model", "fake:1=fake:0", config=UNDRAFTED)


PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Count."}]},
    "/v1/completions": {"prompt": "Count."},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_slow_reader_gets_all_of_the_answer_once(here: Box, path: str) -> None:
    host, port = here.url.removeprefix("http://").split(":")
    body = {
        **PATHS[path], "model": "fake:1", "stream": True, "ignore_eos": True,
        "max_tokens": TOKENS, "temperature": 0,
    }  # fmt: skip
    content = json.dumps(body)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.settimeout(180)
        client.connect((host, int(port)))
        client.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {here.key}\r\n"
            f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()
        )
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(4096)
        head = data.partition(b"\r\n\r\n")[0].decode().lower()
        request_id = head.partition("x-request-id: ")[2].split()[0]
        # The box is done with it, and most of it was not read.
        wait_until(lambda: receipt(here, request_id) == 200, "the receipt")
        while part := client.recv(65536):
            data += part
    lines = httpx_body(data).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line[0] != ":"]
    text = "".join(text_of(choice) for chunk in chunks for choice in chunk["choices"])
    whole = (SENTENCE * (TOKENS // len(SENTENCE) + 2)).decode()
    assert len(text) == TOKENS and text in whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


def receipt(box: Box, request_id: str) -> int:
    found: httpx.Response = box.http("GET", f"/v1/receipts/{request_id}")
    return found.status_code
