"""Images in prompts: what stands for them among the tokens, and what of them is to be computed.

Each cell of an image has a token id like those of text, beyond every vocabulary, that follows from
the digests of the image and of the projector.  So the prefix cache finds an image again that a
request of the same scope has sent, and the commitment to a prompt's tokens covers it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from pinaivu_box.engine.image_decoding import DecodedImage, ImageJob
from pinaivu_box.engine.runner import EncodedPiece, Projector
from pinaivu_box.engine.sandboxes import SandboxRun
from pinaivu_box.errors import BadRequest, InvalidBody
from pinaivu_box.sandbox import Cancellation, SandboxLimit

FIRST_IMAGE_TOKEN = 1 << 30
_DOMAIN = b"pinaivu/image-tokens/v1\n"
_MARK_DIGITS = 20


@dataclass(eq=False)
class PromptImage:
    """An image of one request: the file, and its size as it is decoded.

    `asked` is set once its `pieces` (those with cells) are being made, or known; `dropped`, once
    nobody wants them any more.
    """

    data: bytes
    digest: str
    width: int
    height: int
    asked: bool = False
    dropped: bool = False
    pieces: list[EncodedPiece] = field(default_factory=list)

    def forget(self) -> None:
        """Free what was made; it can be made again."""
        self.asked, self.pieces = False, []


@dataclass(eq=False)
class ImageSpan:
    """Where piece `number` (of those with cells) of an image is among a prompt's tokens."""

    image: PromptImage
    number: int
    start: int
    cells: int
    advance: int

    @property
    def end(self) -> int:
        return self.start + self.cells

    @property
    def piece(self) -> EncodedPiece | None:
        """None until it is made."""
        pieces = self.image.pieces
        return pieces[self.number] if pieces else None


def image_tokens(projector: str, digest: str, number: int, cells: int) -> list[int]:
    """The ids of a piece's cells, from the digests in hex; `docs/receipts.md` has the formula."""
    seed = bytes.fromhex(projector) + bytes.fromhex(digest) + struct.pack("<I", number)
    drawn = hashlib.shake_256(_DOMAIN + seed).digest(4 * cells)
    ids = np.frombuffer(drawn, "<u4").astype(np.int64) % FIRST_IMAGE_TOKEN + FIRST_IMAGE_TOKEN
    return [int(token) for token in ids]


class ImageReader:
    """Reads the images of requests for a projector.  For several threads."""

    def __init__(self, decode: SandboxRun, projector: Projector | None) -> None:
        self._decode, self._projector = decode, projector

    @property
    def projector(self) -> Projector:
        """Raises BadRequest if the model has none."""
        if self._projector is None:
            raise BadRequest("This model sees no images: send text only.", param="messages")
        return self._projector

    def read(
        self,
        messages: list[dict[str, Any]],
        files: dict[str, bytes],
        cancellation: Cancellation | None,
    ) -> list[PromptImage]:
        """The images of the messages, in their order.  Raises BadRequest, SandboxCancelled."""
        digests = list(digests_in(messages))
        if digests:
            _ = self.projector
        known = {digest: self._read(digest, files, cancellation) for digest in set(digests)}
        return [known[digest] for digest in digests]

    def _read(
        self, digest: str, files: dict[str, bytes], cancellation: Cancellation | None
    ) -> PromptImage:
        data = files.get(digest)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise InvalidBody("an image is not among the files of the request")
        decoded = self._decoded(data, cancellation, pixels=False)
        return PromptImage(data, digest, decoded.width, decoded.height)

    def encode(self, image: PromptImage) -> list[EncodedPiece]:
        """What the projector makes of it.  Raises BoxError."""
        decoded = self._decoded(image.data, None, pixels=True)
        return self.projector.encode(decoded.width, decoded.height, decoded.rgb)

    def _decoded(
        self, data: bytes, cancellation: Cancellation | None, *, pixels: bool
    ) -> DecodedImage:
        try:
            answer = self._decode(msgspec.msgpack.encode(ImageJob(data, pixels)), cancellation)
        except SandboxLimit as error:
            why = f"Decoding an image {error.reason}: send a smaller one."
            raise BadRequest(why, param="messages") from None
        return msgspec.msgpack.decode(answer, type=DecodedImage)

    def tokens(self, images: list[PromptImage], begin: int) -> tuple[list[int], list[ImageSpan]]:
        """The tokens of images that stand at `begin` in a prompt, one after another."""
        tokens: list[int] = []
        spans: list[ImageSpan] = []
        for image in images:
            number = 0
            for piece in self.projector.pieces(image.width, image.height):
                if not piece.cells:
                    tokens += piece.tokens
                    continue
                start = begin + len(tokens)
                spans.append(ImageSpan(image, number, start, piece.cells, piece.advance))
                tokens += image_tokens(self.projector.digest, image.digest, number, piece.cells)
                number += 1
        return tokens, spans

    def found(self, images: list[PromptImage], prompt: list[int]) -> list[ImageSpan]:
        """Where the images are in a prompt that was read before.  Raises BadRequest if it was read
        with another projector."""
        spans: list[ImageSpan] = []
        at = 0
        for image in images:
            for span in self.tokens([image], 0)[1]:
                ids = image_tokens(self.projector.digest, image.digest, span.number, span.cells)
                try:
                    span.start = prompt.index(ids[0], at)
                except ValueError:
                    span.start = len(prompt)
                at = span.end
                if prompt[span.start : at] != ids:
                    why = "The prompt was read with another projector for images: send it again."
                    raise BadRequest(why, param="messages")
                spans.append(span)
        if sum(span.cells for span in spans) != sum(token >= FIRST_IMAGE_TOKEN for token in prompt):
            raise BadRequest("The prompt has images that the messages do not.", param="messages")
        return spans


def digests_in(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Of the images in messages (see `gateway.backend.Job`), in their order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "image":
                yield part["sha256"]


class ImageMarks:
    """Marks in place of the images of one prompt while a template writes it: random, so that no
    message can hold one, and of digits, which filters of templates leave alone."""

    def __init__(self) -> None:
        self._mark = f"{secrets.randbits(64):0{_MARK_DIGITS}d}"
        self._any = re.compile(f"{self._mark}([0-9]{{6}})")
        self._count = 0

    def marked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With text as their contents."""
        return [
            {**message, "content": "".join(map(self._text, message["content"]))}
            if isinstance(message.get("content"), list)
            else message
            for message in messages
        ]

    def _text(self, part: dict[str, Any]) -> str:
        if part["type"] != "image":
            return str(part["text"])
        self._count += 1
        return f"{self._mark}{self._count - 1:06d}"

    def split(self, text: str) -> list[str]:
        """The text without its marks; between two of the pieces was one."""
        return self._any.split(text)[::2]

    def check(self, text: str) -> None:
        """Raises BadRequest unless the template has written all images, once and in their order."""
        if list(map(int, self._any.findall(text))) != list(range(self._count)):
            raise BadRequest(
                "The model's chat template leaves out images of these messages: send them in "
                "messages of the user.",
                param="messages",
            )
