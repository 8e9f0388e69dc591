"""What a user's image file becomes in a shard: the JPEG as it is where our decoder reads it, else an equal one."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.decode import KEPT_COLOURSPACES, decode

CONVERTED_QUALITY = 95
_ORIENTATION_TAG = 0x0112
_UPRIGHT = 1


class CorruptImage(Exception):  # noqa: N818
    """An image that does not decode; the text says why. Never leaves the shard's writer."""


@dataclass(frozen=True)
class Photo:
    """A JPEG that our decoder reads, shown upright without looking at EXIF."""

    data: bytes
    height: int
    width: int


def photo_from(data: bytes) -> Photo:
    """Check that an image file decodes to its last row; convert what is not an upright 8-bit JPEG.

    Gray, YCbCr and RGB JPEGs keep their bytes. PNG, WebP, CMYK, 16 bit, EXIF-rotated and the like become RGB JPEGs of
    quality 95.

    Raises:
        CorruptImage: It does not decode whole, or is larger than PIL's guard against decompression bombs.
    """
    try:
        if data.startswith(b"\xff\xd8") and _is_kept(data):
            return _checked(data)
        return _checked(_converted(data))
    except CorruptImage:
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them into
        raise CorruptImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What a decoder said, the same each time: the reason is part of the shard's index, and so of the digest."""
    if isinstance(error, UnidentifiedImageError):  # its message holds a memory address
        return "UnidentifiedImageError: not an image file"
    return f"{type(error).__name__}: {error}"


def _is_kept(data: bytes) -> bool:
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a chroma subsampling that libjpeg-turbo has no name for
        return False
    _refuse_bomb(height, width)
    return colourspace in KEPT_COLOURSPACES and _orientation(data) == _UPRIGHT and not _has_stray_bytes(data)


def _checked(data: bytes) -> Photo:
    height, width, _ = decode(data).shape
    return Photo(data, height, width)


def _has_stray_bytes(data: bytes) -> bool:
    """Whether there is junk between the JPEG's segments, which loses no pixel but which a strict decoder refuses."""
    try:
        decode(data)
    except ValueError as error:
        return "extraneous bytes" in str(error)
    return False


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_ORIENTATION_TAG, _UPRIGHT))
    except Exception:  # malformed EXIF says nothing about the pixels
        return _UPRIGHT


def _converted(data: bytes) -> bytes:
    with _whole_images_only(), Image.open(io.BytesIO(data)) as image:
        _refuse_bomb(image.height, image.width)
        image.load()
        upright = _eight_bit(ImageOps.exif_transpose(image))
        output = io.BytesIO()
        upright.convert("RGB").save(output, "JPEG", quality=CONVERTED_QUALITY)
        return output.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    """PIL's own conversion clips 16-bit gray at 255 where it should scale."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise CorruptImage(f"gray values from {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _refuse_bomb(height: int, width: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise CorruptImage(f"{width} x {height} pixels are more than PIL's limit of {limit}")


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
    """PIL as we need it, whatever a library in this process has made of its globals."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
