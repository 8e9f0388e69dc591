"""JPEGs rewritten with restart markers, so that the part of one that a crop shows can be decoded by itself.

By jpegtran of libjpeg-turbo, as a program: no wheel has a lossless transformation that sets the restart interval. It
decodes and encodes the Huffman codes alone, and coefficients, tables and metadata stay as they are.
"""

from __future__ import annotations

import subprocess

import numpy as np

from pipeline.errors import SourceError
from pipeline.image.decode import decode_jpeg
from pipeline.image.jpeg_parts import Frame, MarkedJpeg

SEGMENT_PIXELS = 64
"""Most pixels of a row between two markers. Shorter segments fit crops better, and each takes some four bytes."""
PROGRAM = "jpegtran"


def with_restart_markers(data: bytes) -> bytes | None:
    """The JPEG with markers that divide its rows, and with Huffman codes of its own; None where it stays as it is.

    A progressive JPEG becomes a sequential one, since a scan of some of the coefficients cannot be cut.

    Args:
        data: A JPEG that `decode_jpeg` takes.

    Raises:
        SourceError: The program is not installed.
        RuntimeError: It was killed.
    """
    frame = Frame.of(data)
    if frame is None:
        return None
    command = [PROGRAM, "-copy", "all", "-optimize", "-restart", f"{interval(frame)}B"]
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError:
        rule = f"needs the program {PROGRAM} on every node that makes shards"
        remedy = "install libjpeg-turbo-progs, as Debian and Ubuntu call it, or leave the option out"
        raise SourceError("restart_markers", rule, True, remedy) from None
    if done.returncode < 0:
        raise RuntimeError(f"{PROGRAM} was ended by signal {-done.returncode}")
    if done.returncode or MarkedJpeg.of(done.stdout) is None:
        return None
    return done.stdout if np.array_equal(decode_jpeg(data), decode_jpeg(done.stdout)) else None


def interval(frame: Frame) -> int:
    """MCUs between two markers: the most that divide a row and have at most SEGMENT_PIXELS."""
    most = SEGMENT_PIXELS // frame.mcu_width
    return next(count for count in range(most, 0, -1) if frame.mcus_per_row % count == 0)
