"""Images by URL: what is fetched, and what is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pinaivu_box.errors import ApiError, BodyTooLarge, InvalidBody, UnsupportedParameter
from pinaivu_box.server.image_fetch import fetch
from tests.support.image_server import RED, ImageServer, image_server

pytestmark = pytest.mark.anyio
AT = ("messages", 0, "content", 0, "image_url")
LOCAL = ("127.0.0.1", "localhost")


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with image_server() as started:
        yield started


async def got(url: str, *hosts: str, max_bytes: int = 1_000_000) -> bytes:
    return await fetch(url, AT, hosts, max_bytes)


async def refusal(url: str, *hosts: str) -> ApiError:
    with pytest.raises(ApiError) as raised:
        await got(url, *hosts)
    return raised.value


async def test_an_image_of_a_listed_host_is_fetched(server: ImageServer) -> None:
    for path in ("/red.png", "/moved", "/red.png#top"):
        assert await got(server.url(path), *LOCAL) == RED
    assert await got(server.url("/red.png"), "127.0.0.0/8") == RED
    assert await got(server.url("/red.png", "localhost"), *LOCAL) == RED


@pytest.mark.parametrize("hosts", [(), ("images.example.com",), ("10.0.0.0/8",)])
async def test_other_hosts_are_not_asked(server: ImageServer, hosts: tuple[str, ...]) -> None:
    error = await refusal(server.url("/red.png"), *hosts)
    assert isinstance(error, UnsupportedParameter) and "[server] image_hosts" in error.message
    assert error.param == "messages.0.content.0.image_url"
    assert not server.requests


async def test_a_listed_name_may_not_lead_to_an_address_that_is_not_listed(
    server: ImageServer,
) -> None:
    error = await refusal(server.url("/red.png", "localhost"), "localhost")
    assert "private address" in error.message
    assert not server.requests


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/elsewhere", "another host"),
        ("/file", "no http: or https: URL"),
        ("/again", "from one place to another"),
        ("/missing", "404"),
    ],
)
async def test_what_is_not_there_is_a_sentence(server: ImageServer, path: str, words: str) -> None:
    error = await refusal(server.url(path), *LOCAL)
    assert isinstance(error, InvalidBody) and words in error.message


async def test_a_large_one_is_not_read_to_its_end(server: ImageServer) -> None:
    with pytest.raises(BodyTooLarge):
        await got(server.url("/large"), *LOCAL)


@pytest.mark.parametrize(
    "url",
    ["ftp://127.0.0.1/x", "http://", "http://user:secret@127.0.0.1/x", "http://[::1", "nothing",
     "http://127.0.0.1:99999/x", "file:///etc/passwd"],
)  # fmt: skip
async def test_what_is_no_url_of_a_web_server_is_refused(url: str) -> None:
    error = await refusal(url, *LOCAL)
    assert error.status == 422 and "data: URL" in error.message


async def test_a_server_that_does_not_answer_is_a_sentence() -> None:
    assert "cannot be reached" in (await refusal("http://127.0.0.1:1/x.png", *LOCAL)).message
