"""A limit on the scans of a JPEG: a few hundred kilobytes can ask for minutes of work on an image of honest size.

A progressive JPEG refines all coefficients with each scan, and a scan that changes nothing takes a few hundred bytes:
https://libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf
"""

from __future__ import annotations

import re

import numpy as np

MOST_SCANS = 100
"""Encoders make ten, and those that search for the smallest file some twenty. libtiff has the same limit."""

_START_OF_IMAGE = b"\xff\xd8"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE})
"""Segments that say nothing of scans; thumbnails lie in some, with scans of their own."""
# As in libjpeg's next_marker: fill bytes, stuffed zeros, restarts and reserved codes begin no segment.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")


def refuse_scan_bomb(data: bytes) -> None:
    """Raise ValueError for a JPEG of more than MOST_SCANS scans; says nothing of what is no JPEG.

    Runs before every decode, and costs microseconds: where the first scan holds every component, as in nearly all
    baseline JPEGs, libjpeg reads no second one, and nothing behind is looked at. Else all is searched for what may be a
    scan, and only a file with too many of those is gone through segment by segment.
    """
    if not data.startswith(_START_OF_IMAGE):
        return
    place, scans, components, progressive = 2, 0, b"", False
    while marker := _MARKER.search(data, _behind_tables(data, place)):
        kind, start = data[marker.end() - 1], marker.end()
        if kind == _END_OF_IMAGE:
            return
        if kind in _FRAMES:
            progressive, components = kind in _PROGRESSIVE, data[start + 7 : start + 8]
        elif kind == _START_OF_SCAN:
            scans += 1
            if scans == 1 and not progressive and data[start + 2 : start + 3] == components:
                return
            if scans == 1 and _likenesses(data, start) < MOST_SCANS:
                return
            if scans > MOST_SCANS:
                raise ValueError(f"the JPEG has more than {MOST_SCANS} scans")
        place = start + max(2, int.from_bytes(data[start : start + 2], "big"))


def _behind_tables(data: bytes, place: int) -> int:
    """The place after the segments that stand before frame and scan; quicker than a search."""
    try:
        while data[place] == 0xFF and data[place + 1] in _TABLES:
            place += 2 + (data[place + 2] << 8 | data[place + 3])
    except IndexError:
        pass
    return place


def _likenesses(data: bytes, start: int) -> int:
    """How many pairs of bytes look like the marker of a scan; a quarter of what bytes.count takes."""
    octets = np.frombuffer(data, np.uint8, offset=start - 1)
    return int(np.count_nonzero((octets[:-1] == 0xFF) & (octets[1:] == _START_OF_SCAN)))
