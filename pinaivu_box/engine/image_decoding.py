"""Images as clients send them, to pixels.

The bytes are hostile: a few kilobytes can stand for gigabytes of pixels, and decoders have had
errors.  So this runs in a child with limits (see `sandboxes`), with Pillow, whose decoders are fed
with fuzzers and fixed for it.  What comes out is plain: three bytes for each pixel.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from pinaivu_box.errors import BadRequest

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000  # of a file, before it is made smaller
# The longer side of what a projector gets: OpenAI's API makes larger ones smaller as well, and most
# projectors do so again.
MAX_SIDE = 2048
# Projectors cut images into tiles, and some end the process on a tile of less than a pixel.
MIN_SIDE = 32
MAX_RATIO = MAX_SIDE // MIN_SIDE
_BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
_KINDS = "JPEG, PNG, WebP or GIF"


class ImageJob(msgspec.Struct, array_like=True, frozen=True):
    """Decode `data`; the pixels are only wanted if `pixels` is set."""

    data: bytes
    pixels: bool


class DecodedImage(msgspec.Struct, array_like=True, frozen=True):
    """`rgb` has three bytes for each pixel, line by line; empty if it was not wanted."""

    width: int
    height: int
    rgb: bytes = b""


def make(_: bytes) -> Callable[[bytes], bytes]:
    """The jobs' function (see `sandbox`): an ImageJob to a DecodedImage, both as msgpack.  Raises
    BadRequest for what is no image that is taken."""
    # Imported before the limit on memory is set: the child has it anyway.
    from PIL import (  # noqa: F401
        GifImagePlugin,
        Image,
        ImageOps,
        JpegImagePlugin,
        PngImagePlugin,
        WebPImagePlugin,
    )

    decoder = msgspec.msgpack.Decoder(ImageJob)
    Image.MAX_IMAGE_PIXELS = None  # `_opened` has its own limit, and its own words
    warnings.simplefilter("ignore")

    def run(payload: bytes) -> bytes:
        job = decoder.decode(payload)
        image = _decoded(job.data)
        rgb = image.tobytes() if job.pixels else b""
        return msgspec.msgpack.encode(DecodedImage(image.width, image.height, rgb))

    return run


def _decoded(data: bytes) -> Image:
    """The (first) image of the file: upright, in RGB, its sides from MIN_SIDE to MAX_SIDE."""
    image = _opened(data)
    try:
        # A JPEG file can be decoded at a half, a quarter or an eighth of its size.
        image.draft("RGB", (MAX_SIDE, MAX_SIDE))
        image.load()
        return _upright(_large_enough(_in_rgb(image)))
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder finds wrong
        raise BadRequest(f"An image is damaged: {_why(error)}.", param="messages") from None


def _opened(data: bytes) -> Image:
    """With its size and no pixels yet.  Raises BadRequest."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Exception:
        raise BadRequest(
            f"An image cannot be read: it must be a whole {_KINDS} file.", param="messages"
        ) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadRequest(
            f"An image has {image.width} x {image.height} pixels: at most {MAX_PIXELS // 10**6} "
            "million are allowed, so send a smaller one.",
            param="messages",
        )
    if max(image.size) > MAX_RATIO * min(image.size):
        raise BadRequest(
            f"An image has {image.width} x {image.height} pixels: one side may be at most "
            f"{MAX_RATIO} times as long as the other.",
            param="messages",
        )
    return image


def _in_rgb(image: Image) -> Image:
    """Small enough, and without transparency."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits for each pixel
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    image.thumbnail((MAX_SIDE, MAX_SIDE), reducing_gap=2.0)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _large_enough(image: Image) -> Image:
    if min(image.size) >= MIN_SIDE:
        return image
    factor = MIN_SIDE / min(image.size)
    width, height = (max(MIN_SIDE, min(MAX_SIDE, round(side * factor))) for side in image.size)
    return image.resize((width, height))


def _upright(image: Image) -> Image:
    """Turned as the camera's orientation (EXIF) says, if that can be read; other metadata has no
    effect."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # of metadata nobody needs
        return image


def _why(error: Exception) -> str:
    if "truncated" in str(error):
        return "it is cut off"
    return "its pixels cannot be decoded"
