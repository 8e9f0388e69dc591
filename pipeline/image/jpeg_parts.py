"""A part of a JPEG as a JPEG of its own, cut out of the bytes between restart markers, so that it alone is decoded.

At a restart marker an entropy decoder begins anew. Where every row of the picture is divided by them, the segments
that a crop needs are copied behind the same tables; then markers are numbered anew, and the frame gets the part's size.
Every block is decoded as in the whole picture. Only libjpeg's interpolation of chroma looks across blocks, by one
sample, and at the edges of a picture has none there: so a part has a margin. Its pixels inside the margin are those of
the whole picture, bit for bit.

Hand-written, since no library cuts in this way: jpegtran's crop decodes all that lies before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_START = b"\xff\xd8"
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_HUFFMAN_FRAMES = _SEQUENTIAL | {0xC2}
"""Those that libjpeg-turbo reads in every build: baseline, extended, progressive."""
_SKIPPED = frozenset({0xC4, 0xDB, 0xFE, *range(0xE0, 0xF0)})
"""Tables and metadata: copied as they are."""
_RESTART_INTERVAL, _START_OF_SCAN, _FIRST_RESTART, _END_OF_IMAGE = 0xDD, 0xDA, 0xD0, 0xD9
_NUMBERS = 8
"""Restart markers are numbered from 0 to 7, and over again."""
_BLOCK_PIXELS = 8
_MARGIN_PIXELS = 2
"""Of the decoded part, where chroma has fewer samples: one sample, which stands for two pixels."""
_NARROWEST_PIXELS = 16
"""libjpeg does not interpolate chroma of one or two samples a row, so a part must not be the last few columns alone."""
_WHOLE_SPECTRUM = b"\0\x3f\0"
_FACTORS = frozenset({1, 2, 4})

Int64s = npt.NDArray[np.int64]


class Frame(NamedTuple):
    """What a JPEG says before the data of its first scan."""

    height: int
    width: int
    mcu_height: int
    """Pixels of what is coded together."""
    mcu_width: int
    size_at: int
    """Byte at which height and width are."""
    data_at: int
    """Byte behind the header of the scan."""
    restart_interval: int
    """In MCUs; 0: no markers."""
    is_one_scan: bool
    """Whether that scan has all there is."""

    @property
    def mcus_per_row(self) -> int:
        """Of the picture."""
        return -(-self.width // self.mcu_width)

    @property
    def is_divided(self) -> bool:
        """Whether every row of MCUs begins at a restart marker."""
        return self.restart_interval > 0 and self.mcus_per_row % self.restart_interval == 0

    @classmethod
    def of(cls, data: bytes) -> Frame | None:
        """Read it; None for what is no JPEG of 8 bits, gray or with chroma sampled by the same factors."""
        if not data.startswith(_START):
            return None
        frame, sizes, components, interval, place = 0, 0, b"", 0, 2
        while place + 4 <= len(data) and data[place] == 0xFF:
            kind, body = data[place + 1], place + 4
            end = place + 2 + (data[place + 2] << 8 | data[place + 3])
            if end > len(data) or end < body:
                return None
            if kind in _HUFFMAN_FRAMES and not frame and end - body >= 6 and data[body] == 8:
                frame, sizes, components = kind, body + 1, data[body + 5 : end]
            elif kind == _RESTART_INTERVAL and end - body == 2:
                interval = data[body] << 8 | data[body + 1]
            elif kind == _START_OF_SCAN:
                mcu = _mcu_pixels(components)
                if mcu is None:
                    return None
                height, width = (data[at] << 8 | data[at + 1] for at in (sizes, sizes + 2))
                is_one_scan = frame in _SEQUENTIAL and _is_whole_scan(components, data[body:end])
                return cls(height, width, *mcu, sizes, end, interval, is_one_scan) if height and width else None
            elif kind not in _SKIPPED:
                return None
            place = end
        return None


def _mcu_pixels(components: bytes) -> tuple[int, int] | None:
    """Height and width of an MCU in pixels; None for sampling that is not told apart by luma's factors alone."""
    count, rest = components[:1], components[1:]
    if count == b"\x01" and len(rest) == 3:
        return _BLOCK_PIXELS, _BLOCK_PIXELS  # whatever the factors: a scan of one component has blocks, not MCUs
    if count != b"\x03" or len(rest) != 9 or rest[4] != 0x11 or rest[7] != 0x11:
        return None
    across, down = rest[1] >> 4, rest[1] & 15
    return (_BLOCK_PIXELS * down, _BLOCK_PIXELS * across) if {across, down} <= _FACTORS else None


def _is_whole_scan(components: bytes, scan: bytes) -> bool:
    """Whether a scan has all components, in order, with all their coefficients."""
    count = components[0]
    return (
        scan[:1] == components[:1]
        and scan[1:-3:2] == components[1::3]
        and len(scan) == 4 + 2 * count
        and (scan[-3:] == _WHOLE_SPECTRUM)
    )


class JpegPart(NamedTuple):
    """Some MCUs of a picture, which hold a crop and its margin."""

    data: bytes
    """A JPEG."""
    top: int
    """Of its first pixel in the picture."""
    left: int


@dataclass(frozen=True, eq=False)
class MarkedJpeg:
    """A JPEG whose rows are divided by restart markers."""

    data: bytes
    frame: Frame
    ends: Int64s
    """(rows, segments of a row): bytes at which segments end, each in a marker."""

    @classmethod
    def of(cls, data: bytes) -> MarkedJpeg | None:
        """Find the markers; None where they are not exactly those that such a JPEG has."""
        frame = Frame.of(data)
        if frame is None or not frame.is_one_scan or not frame.is_divided:
            return None
        per_row = frame.mcus_per_row // frame.restart_interval
        count = per_row * -(-frame.height // frame.mcu_height)
        octets = np.frombuffer(data, np.uint8)
        at = np.flatnonzero(octets[frame.data_at : -1] == 0xFF) + frame.data_at
        at = at[octets[at + 1] != 0][:count]  # a zero behind it makes it data
        kinds = octets[at + 1]
        if len(at) < count or kinds[-1] != _END_OF_IMAGE or (kinds[:-1] != _numbered(count - 1)).any():
            return None
        return cls(data, frame, at.reshape(-1, per_row))

    def part(self, top: int, left: int, height: int, width: int, shrunk: int = 1) -> JpegPart | None:
        """The part that shows a rectangle of pixels; None where that is the whole picture.

        Args:
            top: Of the rectangle, in pixels of the picture.
            left: Likewise.
            height: Likewise.
            width: Likewise.
            shrunk: By how much the part will be shrunk as it is decoded: 1, 2, 4 or 8.
        """
        frame = self.frame
        segment_width = frame.restart_interval * frame.mcu_width
        margins = (_margin(frame.mcu_height, shrunk), _margin(frame.mcu_width, shrunk))
        first_row, stop_row = _covering(top, height, margins[0], frame.mcu_height, len(self.ends))
        first, stop = _covering(left, width, margins[1], segment_width, self.ends.shape[1])
        if first and min(frame.width, stop * segment_width) - first * segment_width < _NARROWEST_PIXELS * shrunk:
            first -= 1
        if (stop_row - first_row, stop - first) == self.ends.shape:
            return None
        shown_height = min(frame.height, stop_row * frame.mcu_height) - first_row * frame.mcu_height
        shown_width = min(frame.width, stop * segment_width) - first * segment_width
        header = bytearray(self.data[: frame.data_at])
        header[frame.size_at : frame.size_at + 4] = shown_height.to_bytes(2, "big") + shown_width.to_bytes(2, "big")
        data = bytes(header) + self._segments(first_row, stop_row, first, stop)
        return JpegPart(data, first_row * frame.mcu_height, first * segment_width)

    def _segments(self, first_row: int, stop_row: int, first: int, stop: int) -> bytes:
        """The coded data of some segments of some rows, with markers numbered from 0."""
        ends = self.ends[first_row:stop_row, first:stop]
        before = np.arange(first_row, stop_row) * self.ends.shape[1] + first - 1
        starts, stops = self.ends.ravel()[before] + 2, ends[:, -1] + 2
        if before[0] < 0:
            starts[0] = self.frame.data_at
        places = np.cumsum(stops - starts) - (stops - starts)
        view = memoryview(self.data)
        rows = zip(starts.tolist(), stops.tolist(), strict=True)
        joined = bytearray().join([view[start:stop] for start, stop in rows])
        octets = np.frombuffer(joined, np.uint8)
        kinds = _numbered(ends.size)
        kinds[-1] = _END_OF_IMAGE
        octets[(ends - starts[:, None] + places[:, None]).ravel() + 1] = kinds
        return bytes(joined)


def _margin(mcu_pixels: int, shrunk: int) -> int:
    """Pixels that a part needs beside those that it shows, whose edges are rounded when it is shrunk."""
    is_interpolated = mcu_pixels > _BLOCK_PIXELS
    return (_MARGIN_PIXELS if is_interpolated else 0) * shrunk + shrunk // 2


def _covering(start: int, length: int, margin: int, unit: int, units: int) -> tuple[int, int]:
    """First and last unit, exclusive, that hold a range and its margin."""
    return max(0, start - margin) // unit, min(units, -(-(start + length + margin) // unit))


def _numbered(count: int) -> npt.NDArray[np.uint8]:
    """The kinds of the first markers."""
    return (_FIRST_RESTART + np.arange(count) % _NUMBERS).astype(np.uint8)
