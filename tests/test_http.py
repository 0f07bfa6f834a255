"""What is HTTP's rather than an API's: compressed bodies, pages from elsewhere, `/`, HEAD, and a
path before all paths."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

from pinaivu_box import __version__
from pinaivu_box.server.codings import decoded
from pinaivu_box.server.endpoints import ENDPOINTS
from tests.support.process_box import Box, StartBox

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FAKE = "fake:1"
LIMIT = 300_000
APP = "https://app.example"


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    return module_box(
        config=f'[server]\nmax_body_bytes = {LIMIT}\ncors_origins = ["*", "{APP}"]\n'
        f'[[model]]\nname = "{FAKE}"\npath = "fake:0"\ncontext = 200000\n'
        "[engine]\nkv_tokens = 200000\n"
    )


# -- compressed bodies -----------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    maker = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return maker.compress(data) + maker.flush()


def in_members(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: compress(data[:9]) + compress(b"") + compress(data[9:])


CODED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "none": ("identity", bytes),
    "empty": ("", bytes),
    "gzip": ("gzip", gzip.compress),
    "in capitals": ("GZIP", gzip.compress),
    "its older name": ("x-gzip", gzip.compress),
    "beside identity": ("identity, gzip", gzip.compress),
    "several members": ("gzip", in_members(gzip.compress)),
    "deflate": ("deflate", zlib.compress),
    "deflate, raw": ("deflate", raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "several frames": ("zstd", in_members(zstd.compress)),
}


def post(box: Box, path: str, data: Any, coding: str) -> httpx.Response:
    return box.http("POST", path, content=data, headers={"Content-Encoding": coding})


def chat_of(size: int) -> bytes:
    messages = [{"role": "user", "content": "Ünicode " + "x" * size}]
    return json.dumps({"model": FAKE, "messages": messages, "max_tokens": 1}).encode()


@pytest.mark.parametrize("name", CODED)
def test_a_compressed_body_is_what_it_was(here: Box, name: str) -> None:
    coding, compress = CODED[name]
    for size in (10, 100_000):  # decoded at once, and in a child
        data = chat_of(size)
        plain = here.http("POST", "/v1/chat/completions", content=data).json()
        for sent in (compress(data), iter([compress(data)])):  # with a length, and in chunks
            answer = post(here, "/v1/chat/completions", sent, coding)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    created = post(here, "/v1/admin/keys", compress(b'{"account": "owner"}'), coding)
    assert created.status_code == 200 and created.json()["key"]


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, zstd", "gzip,gzip", "nonsense\xe9"])
def test_another_coding_is_refused_with_those_that_are_read(here: Box, coding: str) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/admin/keys"):
        headers = {"Content-Encoding": coding.encode("latin-1")}
        answer = here.http("POST", path, content=chat_of(10), headers=headers)
        assert answer.status_code == 415, answer.text
        assert answer.headers["accept-encoding"] == "gzip, deflate, zstd"
        error = answer.json()["error"]
        assert error["code"] == "unsupported_encoding" and "gzip, deflate, zstd" in error["message"]


CHECKED: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": lambda data: zstd.compress(data, options=CHECKED),
}
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:-5],
    "one byte": lambda data: data[:1],
    "goes on": lambda data: data + b"and more",
    "no such data": lambda data: b'{"model": "x"}',
    "damaged": lambda data: data[:12] + bytes([data[12] ^ 0xFF]) + data[13:-1] + b"\x00",
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("coding", CODERS)
def test_a_body_that_cannot_be_decompressed_is_refused_in_one_sentence(
    here: Box, coding: str, how: str
) -> None:
    for size in (10, 100_000):
        data = BROKEN[how](CODERS[coding](chat_of(size)))
        answer = post(here, "/v1/chat/completions", data, coding)
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert coding in message and "Content-Encoding" in message
    assert post(here, "/v1/chat/completions", b"", coding).json()["error"]["code"] == "invalid_json"


def peak_of(box: Box) -> int:
    """The most memory that it has had, in bytes."""
    status = Path(f"/proc/{box.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def bomb(coding: str) -> bytes:
    """Three hundred megabytes of nothing."""
    if coding == "zstd":
        maker: Any = zstd.ZstdCompressor()
    else:
        maker = zlib.compressobj(1, wbits=31 if coding == "gzip" else 15)
    parts = [maker.compress(bytes(1_000_000)) for _ in range(300)]
    return b"".join([*parts, maker.flush()])


@pytest.mark.parametrize("coding", CODERS)
def test_a_body_is_bounded_once_it_is_decompressed(here: Box, coding: str) -> None:
    fits = chat_of(LIMIT - len(chat_of(0)))
    assert len(fits) == LIMIT
    assert post(here, "/v1/chat/completions", CODERS[coding](fits), coding).status_code != 413
    before = peak_of(here)
    for data in (CODERS[coding](fits + b" "), bomb(coding)[:LIMIT]):
        for path in ("/v1/chat/completions", "/v1/admin/keys"):
            answer = post(here, path, data, coding)
            assert answer.status_code == 413, answer.text
            assert answer.json()["error"]["code"] == "request_too_large"
    assert peak_of(here) - before < 50_000_000


def test_bytes_that_decompress_to_nothing_are_bounded_too(here: Box) -> None:
    for coding, compress in (("gzip", gzip.compress), ("zstd", zstd.compress)):
        answer = post(here, "/v1/chat/completions", compress(b"") * 5000, coding)
        assert answer.status_code == 400 and "after its end" in answer.text
    begun = zlib.compressobj(wbits=31)
    empty_blocks = b"\x00\x00\x00\xff\xff" * 5000
    endless = iter([begun.compress(b"") + begun.flush(zlib.Z_FULL_FLUSH), *[empty_blocks] * 30])
    answer = post(here, "/v1/chat/completions", endless, "gzip")
    assert answer.status_code == 413


def test_a_window_of_zstd_is_bounded() -> None:
    wide: dict[int, int] = {zstd.CompressionParameter.window_log: 27}
    maker = zstd.ZstdCompressor(options=wide)
    data = maker.compress(b"x" * 1000) + maker.flush()
    with pytest.raises(Exception, match="damaged or in another format"):
        whole(data, "zstd", len(data))


def whole(data: bytes, coding: str, step: int) -> bytes:
    """Decompressed as it comes in parts of so many bytes."""

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(data), step):
            yield data[at : at + step]

    async def read() -> bytes:
        slices = [one async for one in decoded(parts(), coding)]
        assert all(0 < len(one) <= 65_536 for one in slices)
        return b"".join(slices)

    return asyncio.run(read())


@pytest.mark.parametrize("name", [name for name, (coding, _) in CODED.items() if "," not in coding])
@pytest.mark.parametrize("step", [1, 7, 1000, 10**6])
def test_it_does_not_matter_in_which_parts_it_comes(name: str, step: int) -> None:
    coding, compress = CODED[name]
    coding = coding.lower().removeprefix("x-")
    for data in (b"{}", bytes(200_000), bytes(range(256)) * 40):
        if coding in CODERS:
            assert whole(compress(data), coding, step) == data


# -- pages from elsewhere --------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["Private-Network", "Local-Network"])
def test_a_page_reaches_a_private_network_if_its_origin_is_named(here: Box, network: str) -> None:
    allow = f"access-control-allow-{network.lower()}"

    def preflight(origin: str, **more: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **more}
        answer = here.http("OPTIONS", "/v1/chat/completions", key="", headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["access-control-allow-origin"] in ("*", origin)
        return answer

    asks = {f"Access-Control-Request-{network}": "true"}
    granted = preflight(APP, **asks)
    assert granted.headers[allow] == "true" and "Origin" in granted.headers["vary"]
    others = [preflight(APP), preflight(APP, **{f"Access-Control-Request-{network}": "false"})]
    others += [
        preflight(origin, **asks) for origin in ("https://other.example", f"{APP}.x", "null")
    ]
    for answer in others:
        assert not [name for name in answer.headers if "network" in name]


def test_a_page_may_read_what_was_passed_over(here: Box) -> None:
    body = {"model": FAKE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = here.http(
        "POST", "/v1/chat/completions", json={**body, "colour": 1}, headers={"Origin": APP}
    )
    assert answer.headers["x-pinaivu-ignored"] == "colour"
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-pinaivu-ignored", "request-id", "x-request-id"} <= set(exposed.split(", "))


# -- / and HEAD ------------------------------------------------------------------------------------


def test_the_root_says_what_there_is(here: Box) -> None:
    for accept in ("*/*", "application/json"):  # browsers: tests/test_login_links.py
        answer = here.http("GET", "/", key="", headers={"Accept": accept})
        assert answer.status_code == 200
        told = answer.json()
        assert told["version"] == __version__ and told["name"]
        assert {"/v1", "/docs", "/openapi.json", "/health"} <= set(told.values())
    for path in (told["docs"], told["openapi"], told["health"]):
        assert here.http("GET", path, key="").status_code == 200
    head = here.http("HEAD", "/", key="")
    assert head.status_code == 200 and head.content == b""


def test_head_is_get_without_the_body(here: Box) -> None:
    paths = {route.path for route in ENDPOINTS if "GET" in (route.methods or ())}
    with httpx.Client(
        base_url=here.url,
        headers={"Authorization": f"Bearer {here.key}"},
        timeout=60,
        trust_env=False,
    ) as client:  # over one connection, where a body would be taken for the next answer
        stream = client.head("/v1/admin/events", headers={"accept": "text/event-stream"})
        assert stream.headers["content-type"].startswith("text/event-stream")
        for path in sorted(paths):
            path = path.replace("{model:path}", FAKE).replace("{", "").replace("}", "")
            got, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            assert head.headers.get("content-type") == got.headers.get("content-type"), path
            assert int(head.headers["content-length"]) > 0 or got.is_redirect, path
        assert client.head("/v1/chat/completions").status_code == 405
        assert client.head("/v1/nothing").status_code == 404
    assert here.http("HEAD", "/v1/models", key="").status_code == 401


# -- a path before all paths -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "prefix"),
    [
        (None, ""), ("/box", "/box"), ("/box/", "/box"), ("/a/b-1", "/a/b-1"), ("/a, /b", "/a/b"),
        ("", ""), ("/", ""), ("//evil.example", ""), ("https://evil.example", ""), ("/a b", ""),
        ("/\"><script>", ""), ("/" + "a" * 300, ""),
    ],
)  # fmt: skip
def test_the_document_says_where_the_api_is(here: Box, header: str | None, prefix: str) -> None:
    headers = {} if header is None else {"X-Forwarded-Prefix": header}
    document = here.http("GET", "/openapi.json", key="", headers=headers).json()
    (server,) = document["servers"]
    # As RFC 3986 resolves it, where the proxy shows the document.
    shown = f"https://home.example{prefix}/openapi.json"
    assert urljoin(shown, server["url"]).rstrip("/") == f"https://home.example{prefix}"
    # A proxy that says nothing: the address is relative to the document's.
    if not prefix:
        under = urljoin("https://home.example/box/openapi.json", server["url"])
        assert under == "https://home.example/box/"
    told = here.http("GET", "/", key="", headers=headers).json()
    assert (told["api"], told["docs"]) == (f"{prefix}/v1", f"{prefix}/docs")


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_page_finds_its_document_under_a_prefix(here: Box, path: str) -> None:
    for prefix in ("", "/box"):
        headers = {"X-Forwarded-Prefix": prefix} if prefix else {}
        page = here.http("GET", path, key="", headers=headers).text
        assert f'data-document="{prefix}/openapi.json"' in page
