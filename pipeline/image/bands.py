"""Images that are measurements: TIFF and PNG of 16 bits, or of other bands than gray or RGB, with no value changed.

A file has to hold the bands and bits that the data set has; nothing is converted, since nobody knows what a value
means. Values are shares of the largest one that the bits allow.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.image import other_formats
from pipeline.image.bare_image import bare_image

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

Values = npt.NDArray[np.uint8 | np.uint16]

FILE_EXTENSION = "tif"
"""Of the files that shards hold."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER_BYTES = 33
_PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}
"""By its colour type; of the missing one, values are places in a palette."""
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_COMPRESSIONS = frozenset({1, 5, 8, 32773, 32946, 50000})
"""None, LZW, deflate, PackBits and Zstandard: lossless, and decoded into as much memory as pixels need."""
_TIFF_UNSIGNED, _TIFF_KINDS = 1, {2: "signed integers", 3: "floating-point numbers"}
_WHITE_IS_ZERO, _TIFF_MEANINGS = 0, frozenset({0, 1, 2})
"""Photometric interpretations: brightness, either way round, and RGB. Others are no bands, such as a palette's."""
_ORIENTATION = 274
_MOST_BYTES_A_PIXEL = 3
"""Of the largest photograph, which has as many pixels as PIL's guard allows: no image may need more memory."""
_DEFLATE_LEVEL = 6


class _File(NamedTuple):
    """What a file's header says, and how to get the rest."""

    height: int
    width: int
    bands: int
    bits: int
    orientation: int
    """As EXIF counts them; 1 is upright."""
    values: Callable[[], Values]
    """Decodes it, to (height, width, bands)."""


def band_values(data: bytes, channels: int, bits: int) -> Values:
    """(H, W, channels) of uint8 or uint16: the values of a TIFF or PNG as they are, not turned by its orientation.

    The bands of a TIFF lie in its first page, beside each other or one after the other, or in as many pages.

    Args:
        data: Of the file.
        channels: Bands that it must have.
        bits: Of a value, that it must have.

    Raises:
        ValueError: It is no such file, a damaged one, or one that would take more memory than any photograph may.
    """
    with _read(data, channels, bits) as file:
        return _whole(file)


def upright_values(data: bytes, channels: int, bits: int) -> Values:
    """As `band_values`, turned as the file says that it is to be shown."""
    with _read(data, channels, bits) as file:
        return np.ascontiguousarray(_turned(_whole(file), file.orientation))


def band_size(data: bytes, channels: int, bits: int) -> tuple[int, int]:
    """Height and width by the header alone, of what `band_values` takes; raises ValueError as it does."""
    with _read(data, channels, bits) as file:
        return file.height, file.width


def file_bits(data: bytes, channels: int) -> int:
    """Bits of a value where a file is a TIFF or PNG of so many bands; else 8, as of a photograph."""
    for bits in (16, 8):
        try:
            band_size(data, channels, bits)
        except ValueError:
            continue
        return bits
    return 8


def encoded(values: Values) -> bytes:
    """A TIFF of one page and one strip, compressed without loss; the same values give the same bytes.

    Args:
        values: (H, W, C).
    """
    import tifffile

    height, _, channels = values.shape
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        values if channels > 1 else values[..., 0],
        photometric="minisblack",
        planarconfig="contig" if channels > 1 else None,
        compression="zlib",
        compressionargs={"level": _DEFLATE_LEVEL},
        predictor=True,
        rowsperstrip=height,
        metadata=None,
        software=False,
    )
    return file.getvalue()


@contextmanager
def _read(data: bytes, channels: int, bits: int) -> Iterator[_File]:
    """The header of a file, found to be as it must; every error is a ValueError."""
    try:
        with _opened(data, channels) as file:
            if (file.bands, file.bits) != (channels, bits):
                found, wanted = f"{file.bands} x {file.bits} bits", f"{channels} x {bits}"
                raise ValueError(f"a pixel has {found}, but in this data set {wanted}: bands x bits must be the same")
            _refuse_bomb(file.height * file.width * file.bands * file.bits // 8)
            other_formats.refuse_bomb(file.height, file.width)
            yield file
    except ValueError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them into
        raise ValueError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(data: bytes, channels: int) -> Iterator[_File]:
    if data.startswith(_PNG_START):
        yield _png(data)
    elif data.startswith(_TIFF_STARTS):
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of metadata changes no pixel
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            yield _tiff(file, channels)
    else:
        raise ValueError("it is no TIFF or PNG, the formats that are read band by band")


def _whole(file: _File) -> Values:
    values = file.values()
    if values.shape != (file.height, file.width, file.bands) or values.dtype.itemsize * 8 != file.bits:
        raise ValueError(f"it decodes to {values.shape} of {values.dtype}, which its header does not say")
    return values


def _png(data: bytes) -> _File:
    bare = bare_image(data)  # also compares checksums
    header = bare.data[len(_PNG_START) : _PNG_HEADER_BYTES]
    if len(header) < _PNG_HEADER_BYTES - len(_PNG_START) or header[4:8] != b"IHDR":
        raise ValueError("the PNG has no header")
    width, height = int.from_bytes(header[8:12], "big"), int.from_bytes(header[12:16], "big")
    bands = _PNG_BANDS.get(header[17])
    if bands is None:
        raise ValueError("its values are places in a palette; convert it to the values themselves")

    def orientation() -> Image.Exif:
        exif = Image.Exif()
        exif.load(bare.exif)
        return exif

    def values() -> Values:
        import imagecodecs

        found: Values = imagecodecs.png_decode(bare.data)
        return found.reshape(height, width, -1)

    return _File(height, width, bands, header[16], other_formats.orientation_of(orientation), values)


def _tiff(file: TiffFile, channels: int) -> _File:
    pages = _pages(file, channels)
    for page in pages:
        _check_page(page, pages[0])
    first = pages[0]
    tag = first.tags.get(_ORIENTATION)
    orientation = tag.value if tag is not None and isinstance(tag.value, int) else 1
    bands = sum(page.samplesperpixel for page in pages)
    values = partial(_tiff_values, pages)
    return _File(first.imagelength, first.imagewidth, bands, first.bitspersample, orientation, values)


def _pages(file: TiffFile, channels: int) -> list[TiffPage]:
    """The pages that hold the bands: the first, or as many as there are bands, if these are all that there are."""
    first: Any = file.pages[0]
    if first.samplesperpixel > 1 or channels == 1:
        return [first]
    found: list[Any] = []
    while len(found) <= channels:
        try:
            found.append(file.pages[len(found)])
        except IndexError:
            break
    return found if len(found) == channels else [first]


def _check_page(page: TiffPage, first: TiffPage) -> None:
    """Raise ValueError for what is no plain array of unsigned integers, or not all of it."""
    if page.sampleformat != _TIFF_UNSIGNED:
        kind = _TIFF_KINDS.get(page.sampleformat, "no plain numbers")
        remedy = "convert all images to unsigned integers by one scale"
        raise ValueError(f"its values are {kind}, whose range nobody knows; {remedy}")
    if page.compression not in _TIFF_COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise ValueError(f"its compression ({name}) is not read; save it with deflate or LZW")
    if page.photometric not in _TIFF_MEANINGS:
        name = getattr(page.photometric, "name", page.photometric)
        raise ValueError(f"its values are no bands ({name}); convert it to gray or to bands")
    like_first = page.shaped == first.shaped and page.dtype == first.dtype
    if not like_first or page.imagedepth != 1:
        raise ValueError("its pages differ in size or bits, or have a depth")
    segments, segment_values = prod(page.chunked), prod(page.chunks)
    _refuse_bomb(segments * segment_values * max(1, page.bitspersample // 8))
    if not page.is_contiguous or page.compression != 1:
        offsets, counts = page.dataoffsets, page.databytecounts
        if len(offsets) != segments or len(counts) != segments or not all(offsets) or not all(counts):
            raise ValueError("it does not hold all of its strips or tiles")


def _tiff_values(pages: list[TiffPage]) -> Values:
    planes = []
    for page in pages:
        separate, _, height, width, beside = page.shaped
        found = page.asarray(maxworkers=1).reshape(separate, height, width, beside)
        if page.photometric == _WHITE_IS_ZERO:
            found = ~found
        planes.append(found.transpose(1, 2, 0, 3).reshape(height, width, separate * beside))
    values: Values = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _turned(values: Values, orientation: int) -> Values:
    """(H, W, C) as it is to be shown."""
    if orientation in (5, 6, 7, 8):  # rows are columns
        values = values.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def _refuse_bomb(size_bytes: int) -> None:
    """Raise ValueError for more memory than the largest photograph takes."""
    if Image.MAX_IMAGE_PIXELS is not None and size_bytes > _MOST_BYTES_A_PIXEL * Image.MAX_IMAGE_PIXELS:
        most = _MOST_BYTES_A_PIXEL * Image.MAX_IMAGE_PIXELS
        raise ValueError(f"it decodes to {size_bytes} bytes, more than the {most} of the largest photograph; cut it up")
