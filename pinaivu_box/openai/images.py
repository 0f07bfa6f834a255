"""Images in the messages of a chat, as clients send them and as everything behind them reads them.

In messages as `request.normalise` and its like make them, the content of a message with images is a
list of `{"type": "text", "text": ...}` and, for each image, first a reference (`image_part`), and
once the file is here (`server.images`) `{"type": "image", "sha256": ...}`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pinaivu_box.errors import InvalidBody, quoted

MAX_IMAGES = 100  # of one request, as in Anthropic's API
Part = str | dict[str, Any]
Message = dict[str, Any]

_DATA = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100}){0,4};base64,", re.IGNORECASE)
_URL = "url"


def image_part(url: str, *at: str | int) -> Part:
    """An image that is at that URL; `at` is the path of the field in the body."""
    return {"type": "image", _URL: url, "at": at}


def data_url(data: str) -> str:
    """The URL of an image that is given as base64."""
    return f"data:;base64,{data}"


def content_of(parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    """The content of a message from texts and images: text, if there is no image."""
    if all(isinstance(part, str) for part in parts):
        return "".join(map(str, parts))
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, dict):
            content.append(part)
        elif content and content[-1]["type"] == "text":
            content[-1]["text"] += part
        elif part:
            content.append({"type": "text", "text": part})
    return content


def parts_of(content: str | list[dict[str, Any]]) -> list[Part]:
    """What `content_of` makes that content of."""
    if isinstance(content, str):
        return [content]
    return [str(part["text"]) if part["type"] == "text" else part for part in content]


def references(messages: Sequence[Message]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """The URL of each image of which the file is not here yet, and where the body has it."""
    for part in _images(messages):
        if _URL in part:
            yield part[_URL], part["at"]


def _images(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image":
                yield part


def resolved(messages: Sequence[Message], files: Mapping[str, bytes]) -> list[Message]:
    """The messages with digests in place of the URLs in `files`."""
    digests = {url: digest_of(data) for url, data in files.items()}

    def known(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image" and _URL in part:
            return {"type": "image", "sha256": digests[part[_URL]]}
        return part

    return [
        {**message, "content": [known(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def data_in(url: str, *at: str | int) -> bytes | None:
    """The bytes in a `data:` URL; None for another one.  Raises InvalidBody."""
    if url[:5].lower() != "data:":
        return None
    head = _DATA.match(url[:1000])
    if head is None:
        raise InvalidBody("a data: URL of an image has to end in base64", loc=("body", *at))
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidBody("the image is not valid base64", loc=("body", *at)) from None


def read_all(messages: Sequence[Message], fetched: Callable[[str], bytes | None]) -> list[Message]:
    """The messages with the digests of their images, of which `fetched` has those that are not in
    their URLs.  Raises InvalidBody for one that it has not."""
    files: dict[str, bytes] = {}
    for url, at in references(messages):
        data = data_in(url, *at) if url not in files else files[url]
        data = fetched(url) if data is None else data
        if data is None:
            raise InvalidBody(
                f"the image {quoted(url)} is not in the request: put it in a data: URL",
                loc=("body", *at),
            )
        files[url] = data
    return resolved(messages, files)
