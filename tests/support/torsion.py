"""Signatures with keys and points that no honest signer has, made with plain arithmetic."""

from __future__ import annotations

import hashlib

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]
NEUTRAL: Point = (0, 1)


def add(a: Point, b: Point) -> Point:
    product = D * a[0] * b[0] * a[1] * b[1]
    return (
        (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P) % P,
        (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P) % P,
    )


def times(scalar: int, point: Point) -> Point:
    result = NEUTRAL
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point, scalar = add(point, point), scalar >> 1
    return result


def with_y(y: int, odd: int = 0) -> Point | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    if x * x % P != square:
        return None
    return (P - x if x % 2 != odd else x) % P, y


def encode(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def number(value: int) -> bytes:
    return value.to_bytes(32, "little")


BASE = with_y(4 * pow(5, -1, P) % P)
assert BASE is not None


def _torsion() -> list[Point]:
    """The eight points of small order."""
    for y in range(2, 100):
        point = with_y(y)
        if point is not None:
            small = times(L, point)
            if times(4, small) != NEUTRAL:
                return [times(n, small) for n in range(8)]
    raise AssertionError("no point of order 8 was found")


def _signed(secret: int, key: bytes, r: int, r_bytes: bytes, message: bytes) -> bytes:
    k = int.from_bytes(hashlib.sha512(r_bytes + key + message).digest(), "little") % L
    return r_bytes + number((r + k * secret) % L)


def crafted_signatures() -> list[tuple[str, str, str]]:
    """Key, message and signature, in hex."""
    assert BASE is not None
    secret, r = 2**251 + 12345, 2**250 + 678
    public, point = times(secret, BASE), times(r, BASE)
    small = _torsion()
    made: list[tuple[bytes, bytes, bytes]] = []
    for message in (b"", b"pinaivu", b"torsion"):
        honest = _signed(secret, encode(public), r, encode(point), message)
        made.append((encode(public), message, honest))
        # S beyond the order, and other bits of it
        s = int.from_bytes(honest[32:], "little")
        made += [
            (encode(public), message, honest[:32] + number(s + n * L))
            for n in range(1, 15)
            if s + n * L < 2**256
        ]
        for torsion in small:
            # a key of mixed order, an R of mixed order, both, and neither part but the small one
            mixed_key, mixed_r = add(public, torsion), add(point, torsion)
            for key, r_point in ((mixed_key, point), (public, mixed_r), (mixed_key, mixed_r)):
                key_bytes, r_bytes = encode(key), encode(r_point)
                signature = _signed(secret, key_bytes, r, r_bytes, message)
                made.append((key_bytes, message, signature))
            made.append(
                (encode(torsion), message, _signed(0, encode(torsion), r, encode(point), message))
            )
            made.append((encode(torsion), message, encode(torsion) + number(0)))
            made.append(
                (
                    encode(public),
                    message,
                    _signed(secret, encode(public), 0, encode(torsion), message),
                )
            )
    # Spellings of y at and beyond p, and x = 0 with a sign.
    spellings = [number(y) for y in (0, 1, P - 1, P, P + 1, 2**255 - 1, 2**255 - 19 + 18)]
    spellings += [bytes([*text[:31], text[31] | 0x80]) for text in spellings]
    for text in spellings:
        made.append((text, b"m", encode(point) + number(r)))
        made.append((text, b"m", text + number(0)))
        made.append((encode(public), b"m", text + number(r)))
    # y that are of no point, and of points whose order is unknown
    for y in range(2, 40):
        made.append((number(y), b"m", encode(point) + number(y)))
        made.append((encode(public), b"m", number(y) + number(1)))
    return [(key.hex(), message.hex(), signature.hex()) for key, message, signature in made]
