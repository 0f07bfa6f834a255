"""Compressed bodies (`Content-Encoding`, RFC 9110, section 8.4)."""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncIterator, Sequence

from pinaivu_box.errors import BadRequest, UnsupportedEncoding, quoted

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CODINGS = ("gzip", "deflate", "zstd")
_SLICE_BYTES = 64 * 1024  # decompressed before other tasks run
_MAX_MEMBERS = 1024  # of one body; each starts a new decompressor
_MAX_WINDOW_BITS = 23  # of zstd: 8 MB, the limit of RFC 9659


def coding_of(values: Sequence[str]) -> str:
    """The coding in the values of the header, "" if there is none.  Raises UnsupportedEncoding."""
    names = [name.strip().lower() for value in values for name in value.split(",")]
    names = [name.removeprefix("x-") for name in names if name not in ("", "identity")]
    if len(names) > 1 or not set(names) <= set(CODINGS):
        raise UnsupportedEncoding(
            f"The Content-Encoding '{quoted(', '.join(names))}' is not supported: send the body "
            f"uncompressed, or in one of {', '.join(CODINGS)}."
        )
    return names[0] if names else ""


async def decoded(parts: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """Yields the body in slices of at most 64 kB, and lets other tasks run between them.  Raises
    BadRequest for data that is truncated or damaged."""
    decoder: zstd.ZstdDecompressor | _Inflate | None = None
    members = 0
    async for part in parts:
        while part or (decoder is not None and not decoder.needs_input):
            if decoder is None:
                if members == (1 if coding == "deflate" else _MAX_MEMBERS):
                    raise _invalid(coding, "continues after its end")
                decoder, members = _decoder(coding, part), members + 1
            try:
                data = decoder.decompress(part, _SLICE_BYTES)
            except (zlib.error, zstd.ZstdError) as error:
                raise _invalid(coding, "is damaged or in another format") from error
            part = b""
            if decoder.eof:
                part, decoder = decoder.unused_data, None
            if data:
                yield data
            await asyncio.sleep(0)
    if decoder is not None:
        raise _invalid(coding, "is truncated")


def _invalid(coding: str, problem: str) -> BadRequest:
    return BadRequest(f"The body's Content-Encoding is {coding}, but it {problem}: send it again.")


class _Inflate:
    """zlib's decompressor with the interface of `ZstdDecompressor`: it keeps the input that was not
    consumed yet."""

    def __init__(self, bits: int) -> None:
        self._inner = zlib.decompressobj(bits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        output = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(output) < max_length
        return output


def _decoder(coding: str, beginning: bytes) -> zstd.ZstdDecompressor | _Inflate:
    if coding == "zstd":
        return zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_BITS}
        )
    if coding == "gzip":
        return _Inflate(16 + zlib.MAX_WBITS)
    # Some clients send raw deflate data without zlib's header, which begins with an 8.
    return _Inflate(zlib.MAX_WBITS if beginning[0] & 0x0F == 8 else -zlib.MAX_WBITS)
