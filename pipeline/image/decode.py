"""Image bytes to pixels, and pixels to the size that the model wants; the hot calls release the GIL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg

from pipeline.image import bands, other_formats
from pipeline.image.bare_image import JPEG_START, bare_image
from pipeline.image.channels import GRAY_CHANNELS, PHOTOGRAPH_BITS, RGB_CHANNELS, PixelKind
from pipeline.image.jpeg_scans import refuse_scan_bomb

Pixels = npt.NDArray[np.uint8 | np.uint16]
"""Of 8 or of 16 bits, each value a share of the largest."""
Decoder = Callable[[bytes], Pixels]
"""(H, W, C) of a file; raises ValueError as `decode` does."""
_COLOURSPACES = {GRAY_CHANNELS: "Gray", RGB_CHANNELS: "RGB"}

KEPT_COLOURSPACES = frozenset({"YCbCr", "Gray", "RGB"})
"""What libjpeg-turbo converts to RGB by itself; CMYK and YCCK need a colour conversion."""
_CONVERTIBLE = ("extraneous bytes", "Unsupported", "Could not determine subsampling")


def decode(data: bytes, channels: int = RGB_CHANNELS, bits: int = PHOTOGRAPH_BITS) -> Pixels:
    """(H, W, channels) pixels of an image: our own JPEGs by libjpeg-turbo, other formats in slower ways.

    With 16 bits, or with other channels than 1 or 3, the bands of a TIFF or PNG as they are; see `bands`.

    Args:
        data: Of the file.
        channels: 3 for RGB, of gray images too; 1 for the brightness, of coloured images too (ITU-R 601).
        bits: Of a value, 8 or 16.

    Raises:
        ValueError: The bytes are no image, or a damaged one; nothing is patched up with grey.
    """
    if not PixelKind(channels, bits).is_photographic:
        return bands.band_values(data, channels, bits)
    if not data.startswith(JPEG_START):
        return other_formats.pixels_of(data, channels)
    try:
        return readable_jpeg(data, channels)[1]
    except ValueError as error:
        if not is_convertible(error):
            raise
    return other_formats.pixels_of(data, channels)


def readable_jpeg(data: bytes, channels: int = RGB_CHANNELS) -> tuple[bytes, Pixels]:
    """A JPEG that `decode_jpeg` takes, and its pixels: as it is, or without metadata where only that is odd.

    Raises:
        ValueError: It takes neither.
    """
    try:
        return data, decode_jpeg(data, channels)
    except ValueError:
        bare = bare_image(data).data
        if bare is data:
            raise
    return bare, decode_jpeg(bare, channels)


def decode_jpeg(data: bytes, channels: int = RGB_CHANNELS, shrink: int = 1) -> Pixels:
    """(H, W, channels) pixels of a gray, YCbCr or RGB JPEG of 8 bits.

    Args:
        data: Of the file.
        channels: 3 for RGB, 1 for the brightness.
        shrink: 1, or 2, 4 or 8 to decode at this fraction of height and width, which are rounded up.

    Raises:
        ValueError: The bytes are no such JPEG, a damaged one, or one of more pixels than PIL's guard or more scans than
            `jpeg_scans` allows.
    """
    refuse_scan_bomb(data)
    height = width = 0
    with contextlib.suppress(ValueError, KeyError):  # the decoder says it better
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    other_formats.refuse_bomb(height, width)  # before memory is asked for
    least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
    pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace=_COLOURSPACES[channels], strict=True, **least)
    return pixels


def is_convertible(error: ValueError) -> bool:
    """Whether decode_jpeg refused a JPEG of which no pixel is lost.

    Junk between segments, 12 or 16 bits, lossless compression, sampling factors that TurboJPEG has no name for.
    """
    return any(word in str(error) for word in _CONVERTIBLE)


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """(C, height, width) bicubic, antialiased; within rounding of PIL's BICUBIC.

    Args:
        pixels: (H, W, C); a view of a crop is fine.
        height: Of the result.
        width: Of the result.
    """
    import torch  # seconds, and 200 MB, which those who only decode are spared

    if pixels.dtype != np.uint8:  # torch resizes no other integers
        values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
        scaled = torch.nn.functional.interpolate(values, (height, width), mode="bicubic", antialias=True)
        most = np.iinfo(pixels.dtype).max
        deep: Pixels = scaled[0].round().clamp(0, most).numpy().astype(pixels.dtype)
        return deep
    # A channels-last view: torch has a uint8 kernel for it that resizes interleaved pixels in place.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    result: Pixels = resized[0].numpy()
    return result
