"""An image file without its metadata, so that nothing that no pixel needs can make a decoder refuse it.

Texts, colour profiles, times, thumbnails, XMP and EXIF are taken out by the container's own structure before a decoder
sees the file: whatever they hold, and whether it is whole, the pixels are those of the same file without them. Of the
metadata only EXIF is used, for the orientation, and only as far as it can be read.

What pixels depend on stays as it is, and its damage with it: a decoder refuses that.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

JPEG_START = b"\xff\xd8"
LARGEST_EXIF_BYTES = 1 << 20
"""Of what the segments of a JPEG hold together, or a text in a PNG unpacks to."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_KIND = re.compile(rb"\w{4}")
_PNG_TRANSPARENCY = b"tRNS"
"""The one ancillary chunk that pixels depend on."""
_PNG_EXIF_TEXT = b"Raw profile type exif\0"
"""Where EXIF stood before there was a chunk for it."""
_RIFF_PIXELS = frozenset({b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"})
_VP8X_METADATA = 0x20 | 0x08 | 0x04
"""Flags that announce a colour profile, EXIF and XMP."""
_AVIF_METADATA = re.compile(rb"(infe(?:\x02.{3}.{4}|\x03.{3}.{6}))(?:Exif|mime)", re.DOTALL)
_JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\x00\x00\x01\x00\x01\x00\x00"
"""That a JPEG is one changes what the colours of some are; its version and density change nothing."""
_ADOBE_BYTES = 12
_ADOBE_TRANSFORMS = {3: (1, 0), 4: (2, 0)}
"""By the number of components; the first is what libjpeg takes an unknown one for."""
_APPLICATION = range(0xE0, 0xF0)
_COMMENT = 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SEGMENTS = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _COMMENT, *_APPLICATION}
"""Those that have a length, and stand before the first scan."""
_TIFF_ORIENTATION = 274
_TIFF_PIXELS = frozenset(
    {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 332}
    | {*range(336, 342), 347, *range(512, 522), *range(529, 533), 50674}
)
"""Tags that say how pixels are stored: sizes, strips, tiles, compression, colours."""


class BareImage(NamedTuple):
    """An image file in its parts."""

    data: bytes
    """The file without metadata, the same object where it had none."""
    exif: bytes = b""
    """Of a JPEG, PNG or WebP; empty where there is none, or a damaged one."""


def bare_image(data: bytes) -> BareImage:
    """Take the metadata out of a JPEG, PNG, WebP, AVIF or TIFF; others are given back as they are.

    Raises:
        ValueError: A chunk of a PNG that pixels depend on does not have its checksum; decoders do not check all.
    """
    if data.startswith(JPEG_START):
        return _bare_jpeg(data)
    if data.startswith(_PNG_START):
        return _bare_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _bare_webp(data)
    if data[4:8] == b"ftyp":
        return BareImage(_bare_avif(data))
    if data[:4] in _TIFF_LAYOUTS:
        return BareImage(_bare_tiff(data))
    return BareImage(data)


class _Pieces:
    """Ranges of a file that are kept; neighbours are copied as one."""

    def __init__(self, data: bytes, first: int) -> None:
        self._data = data
        self._ranges = [(0, first)]

    def keep(self, start: int, end: int) -> None:
        first, last = self._ranges[-1]
        if last == start:
            self._ranges[-1] = (first, end)
        else:
            self._ranges.append((start, end))

    def joined(self) -> bytes:
        if len(self._ranges) == 1:
            start, end = self._ranges[0]
            return self._data if (start, end) == (0, len(self._data)) else self._data[start:end]
        return b"".join(self._data[start:end] for start, end in self._ranges)


def _bare_png(data: bytes) -> BareImage:
    pieces, exif, place = _Pieces(data, len(_PNG_START)), b"", len(_PNG_START)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        is_needed = not kind[0] & 0x20 or kind == _PNG_TRANSPARENCY
        if end > len(data) or not _PNG_KIND.match(kind):
            if is_needed:
                pieces.keep(place, len(data))
            break
        is_whole = zlib.crc32(memoryview(data)[place + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if is_needed:
            if not is_whole:
                raise ValueError(f"the PNG's {kind.decode()} does not have its checksum")
            pieces.keep(place, end)
        elif is_whole:
            exif = exif or _png_exif(kind, data[place + 8 : end - 4])
        place = end
        if kind == b"IEND":
            break
    return BareImage(pieces.joined(), exif)


def _png_exif(kind: bytes, body: bytes) -> bytes:
    """The EXIF block in a chunk; empty where it holds something else."""
    if kind == b"eXIf":
        return body
    if kind not in (b"zTXt", b"tEXt") or not body.startswith(_PNG_EXIF_TEXT):
        return b""
    text = body[len(_PNG_EXIF_TEXT) :][:LARGEST_EXIF_BYTES]
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], LARGEST_EXIF_BYTES)
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except (ValueError, zlib.error):
        return b""


def _bare_webp(data: bytes) -> BareImage:
    kept, exif, claimed = [], b"", 4
    for kind, length, start in _riff_chunks(data):
        body = data[start : start + length]
        if kind in _RIFF_PIXELS:
            if kind == b"VP8X" and body:
                body = bytes([body[0] & ~_VP8X_METADATA]) + body[1:]
            is_whole = len(body) == length
            kept.append(kind + struct.pack("<I", length) + body + b"\0" * (length % 2 if is_whole else 0))
            claimed += 8 + length + length % 2
        elif kind == b"EXIF" and len(body) == length:
            exif = exif or body
    # What is claimed is what whole chunks would have: a decoder sees where one is cut off.
    return BareImage(b"RIFF" + struct.pack("<I", min(claimed, 0xFFFFFFFF)) + b"WEBP" + b"".join(kept), exif)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, length and place of the body of every chunk; the last may be cut off."""
    place, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while place + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, place)
        yield kind, length, place + 8
        place += 8 + length + length % 2


def _bare_avif(data: bytes) -> bytes:
    """An AVIF with its metadata renamed to what no decoder reads: taken out, every place in the file would change.

    An AVIF's orientation is a property of the image, not EXIF's.
    """
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"meta":
            end = min(len(data), place + size) if size else len(data)
            meta = _AVIF_METADATA.sub(rb"\1skip", data[place:end])
            return data[:place] + meta + data[end:]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:
            break
        place += size
    return data


class _TiffLayout(NamedTuple):
    """The layout of a TIFF's directory."""

    order: str
    number: str
    """Of entries."""
    place: str
    """Of what does not fit an entry; also of an entry's number of values."""

    @property
    def entry(self) -> struct.Struct:
        return struct.Struct(f"{self.order}HH{self.place}{struct.calcsize('=' + self.place)}s")


_TIFF_LAYOUTS = {
    b"II*\0": _TiffLayout("<", "H", "I"),
    b"MM\0*": _TiffLayout(">", "H", "I"),
    b"II+\0": _TiffLayout("<", "Q", "Q"),
    b"MM\0+": _TiffLayout(">", "Q", "Q"),
}


def _bare_tiff(data: bytes) -> bytes:
    """A TIFF with its first directory shortened in place, to the tags that say how pixels are stored and turned."""
    layout = _TIFF_LAYOUTS[data[:4]]
    width, counted = struct.calcsize("=" + layout.place), struct.Struct(layout.order + layout.number)
    start = int.from_bytes(data[width : 2 * width], "little" if layout.order == "<" else "big")
    if start + counted.size > len(data):
        return data
    (count,) = counted.unpack_from(data, start)
    entries = start + counted.size
    end = entries + count * layout.entry.size
    if end + width > len(data):
        return data
    fields = list(layout.entry.iter_unpack(data[entries:end]))
    kept = [layout.entry.pack(*field) for field in fields if field[0] in _TIFF_PIXELS or _is_turned(layout, *field)]
    shortened = counted.pack(len(kept)) + b"".join(kept) + bytes(width)  # no directory follows
    return data[:start] + shortened + data[start + len(shortened) :]


def _is_turned(layout: _TiffLayout, tag: int, kind: int, count: int, value: bytes) -> bool:
    """Whether a tag is a sound orientation: one SHORT from 1 to 8."""
    is_one_short = (tag, kind, count) == (_TIFF_ORIENTATION, 3, 1)
    return is_one_short and 1 <= struct.unpack_from(f"{layout.order}H", value)[0] <= 8


def _bare_jpeg(data: bytes) -> BareImage:
    kept, exif, components, place = [JPEG_START], bytearray(), 0, 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker not in _JPEG_SEGMENTS:
            break
        end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
        body = data[place + 4 : end]
        if marker in _FRAMES:
            components = body[5] if len(body) > 5 else 0
        if marker not in _APPLICATION and marker != _COMMENT:
            kept.append(data[place:end])
        elif marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
            kept.append(_JFIF)
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= _ADOBE_BYTES:
            kept.append(b"\xff\xee" + struct.pack(">H", 2 + _ADOBE_BYTES) + body[:_ADOBE_BYTES])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and len(exif) < LARGEST_EXIF_BYTES:
            exif += body[6:] if exif else body
        place = end
    bare = b"".join(_known_transform(segment, components) for segment in kept) + data[place:]
    return BareImage(data if bare == data else bare, bytes(exif))


def _known_transform(segment: bytes, components: int) -> bytes:
    """Adobe's segment with a colour transform that there is; others as they are."""
    if segment[:2] != b"\xff\xee":
        return segment
    known = _ADOBE_TRANSFORMS.get(components, (segment[-1],))
    return segment if segment[-1] in known else segment[:-1] + bytes(known[:1])
