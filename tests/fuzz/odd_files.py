"""JPEG, PNG and WebP files in parts, for tests that change, add and reorder them as their formats have it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
JPEG_METADATA = (*range(0xE0, 0xF0), 0xFE)
"""Markers of segments that say nothing of the pixels, but for JFIF's (E0) and Adobe's (EE) colour transform."""
JPEG_FREE = tuple(marker for marker in JPEG_METADATA if marker not in (0xE0, 0xEE))

Part = tuple[bytes, bytes]
"""Kind and content: of a JPEG the marker, of a PNG and a WebP the chunk's name."""


def picture(number: int, form: str, mode: str = "RGB", side: int = 24, **options: Any) -> bytes:
    """A small image file whose pixels depend on a number."""
    rows, columns = np.mgrid[0:side, 0 : side + 8]
    waves = [127.5 + 127.5 * np.sin((rows * (number % 5 + 1) + columns * (c + 1)) / 5.0 + number) for c in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)
    output = io.BytesIO()
    image.save(output, form, **options)
    return output.getvalue()


def jpeg_parts(data: bytes) -> list[Part]:
    """Segments up to the first scan; the scan and what follows is one part, of kind `DA`."""
    parts, place = [], 2
    while data[place + 1] != 0xDA:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        parts.append((data[place + 1 : place + 2], data[place + 4 : place + 2 + length]))
        place += 2 + length
    return [*parts, (b"\xda", data[place + 2 :])]


def jpeg_of(parts: Sequence[Part]) -> bytes:
    """The JPEG that has these segments; one too long for its length field is cut."""
    pieces = [b"\xff\xd8"]
    for kind, content in parts:
        held = content[:65533]
        pieces.append(
            b"\xff\xda" + content if kind == b"\xda" else b"\xff" + kind + struct.pack(">H", len(held) + 2) + held
        )
    return b"".join(pieces)


def png_parts(data: bytes) -> list[Part]:
    """Chunks, in order."""
    parts, place = [], len(PNG_START)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return parts


def png_of(parts: Sequence[Part], wrong_crcs: frozenset[int] = frozenset()) -> bytes:
    """The PNG that has these chunks; those with these places have a CRC that does not fit."""
    pieces = [PNG_START]
    for place, (kind, content) in enumerate(parts):
        crc = zlib.crc32(kind + content) ^ (0x5A5A5A5A if place in wrong_crcs else 0)
        pieces.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc))
    return b"".join(pieces)


def webp_parts(data: bytes) -> list[Part]:
    """Chunks, in order."""
    parts, place = [], 12
    while place < len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        parts.append((data[place : place + 4], data[place + 8 : place + 8 + length]))
        place += 8 + length + length % 2
    return parts


def webp_of(parts: Sequence[Part]) -> bytes:
    """The WebP that has these chunks."""
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in parts
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def extended_webp(data: bytes, metadata: Sequence[Part]) -> bytes:
    """A simple WebP in the extended form, which has metadata: a header that announces it, the image, and then it."""
    image = webp_parts(data)
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    flags = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
    announced = 0
    for kind, _ in metadata:
        announced |= flags.get(kind, 0)
    header = bytes([announced, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    profiles = [part for part in metadata if part[0] == b"ICCP"]
    rest = [part for part in metadata if part[0] != b"ICCP"]
    return webp_of([(b"VP8X", header), *profiles, *image, *rest])
