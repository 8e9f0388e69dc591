"""A user's image file as a shard holds it: the JPEG as it is where our decoder reads it, else an equal one."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, replace
from typing import Any

import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.errors import SourceError
from pipeline.image import other_formats
from pipeline.image.bare_image import JPEG_START, bare_image
from pipeline.image.decode import KEPT_COLOURSPACES, is_convertible, readable_jpeg
from pipeline.image.restart_markers import with_restart_markers

CONVERTED_QUALITY = 95
LONGEST_JPEG_SIDE = 65500
"""libjpeg's limit."""


class CorruptImage(Exception):  # noqa: N818
    """An image that does not decode; the text says why. Never leaves the shard's writer."""


@dataclass(frozen=True)
class Photo:
    """A JPEG that our decoder reads, shown upright without looking at EXIF."""

    data: bytes
    height: int
    width: int


@dataclass(frozen=True)
class Encoding:
    """Changes to images on their way into a shard; by default as few as possible."""

    max_side: int | None = None
    """Larger images are shrunk until their longer side has this many pixels."""
    quality: int | None = None
    """JPEG quality, 1 to 100, at which every image is encoded again; None: only those that must be, at 95."""
    restart_markers: bool = False
    """Whether JPEGs get restart markers, without a change to their pixels, so that crops of them decode faster."""

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise SourceError("max_side", "must be at least 1 pixel", self.max_side, "omit it to keep sizes")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise SourceError("quality", "must be from 1 to 100", self.quality, "omit it to keep original bytes")

    def identity(self) -> dict[str, Any]:
        """What a digest has of it; without markers the same as before there were any."""
        fields = asdict(self)
        if not self.restart_markers:
            del fields["restart_markers"]
        return fields


ORIGINAL = Encoding()


def photo_from(data: bytes, encoding: Encoding = ORIGINAL) -> Photo:
    """Check that an image file decodes to its last row; convert what is not an upright 8-bit JPEG.

    Gray, YCbCr and RGB JPEGs keep their bytes, unless the encoding says otherwise, or lose the metadata that decoders
    stumble over. PNG, WebP, CMYK, 12 and 16 bit, EXIF-rotated and the like become gray or RGB JPEGs. Transparent pixels
    are laid on white; of an animation the first frame counts. Restart markers come last, where they can be set.

    Raises:
        CorruptImage: It does not decode whole, has more pixels than PIL's guard against decompression bombs allows, or
            more scans than any encoder makes.
        SourceError: Restart markers are wanted, and what writes them is not installed.
    """
    try:
        kept = _kept(data, encoding.max_side) if encoding.quality is None else None
        photo = kept or _converted(data, encoding)
    except Exception as error:  # decoders raise whatever a damaged file leads them into
        raise CorruptImage(_reason(error, data)) from error
    return replace(photo, data=with_restart_markers(photo.data) or photo.data) if encoding.restart_markers else photo


def _reason(error: Exception, data: bytes) -> str:
    """A decoder's message, the same each time: the reason is part of the shard's index, and so of the digest."""
    if isinstance(error, UnidentifiedImageError):
        return other_formats.unread(data)
    return f"{type(error).__name__}: {error}"


def _kept(data: bytes, max_side: int | None) -> Photo | None:
    """The JPEG as it is, after decoding it; None where it must be converted."""
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # sampling factors that TurboJPEG has no name for
        return None
    other_formats.refuse_bomb(height, width)
    fits = max_side is None or max(height, width) <= max_side
    if not fits or colourspace not in KEPT_COLOURSPACES or not other_formats.is_upright(data):
        return None
    try:
        kept, pixels = readable_jpeg(data)
    except ValueError as error:
        if is_convertible(error):
            return None
        raise
    return Photo(kept, *pixels.shape[:2])


def _converted(data: bytes, encoding: Encoding) -> Photo:
    result = _shrunk(_upright(data), encoding.max_side)
    if max(result.size) > LONGEST_JPEG_SIDE:
        raise ValueError(f"{result.width} x {result.height} pixels do not fit a JPEG ({LONGEST_JPEG_SIDE} a side)")
    output = io.BytesIO()
    result.save(output, "JPEG", quality=encoding.quality or CONVERTED_QUALITY)
    return Photo(output.getvalue(), result.height, result.width)


def _upright(data: bytes) -> Image.Image:
    """The image as it is shown, gray or RGB; what `decode` refuses is refused here."""
    if data.startswith(JPEG_START):
        try:
            kept, pixels = readable_jpeg(data)
        except ValueError as error:
            if not is_convertible(error):
                raise
        else:
            image = Image.fromarray(pixels[..., 0] if _is_gray(kept) else pixels)
            image.info["exif"] = bare_image(data).exif
            return other_formats.upright(image)
    with other_formats.opened(data) as image:
        return other_formats.plain(other_formats.upright(image))


def _is_gray(jpeg: bytes) -> bool:
    return bool(simplejpeg.decode_jpeg_header(jpeg, strict=False)[2] == "Gray")


def _shrunk(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is None or max(image.size) <= max_side:
        return image
    ratio = max_side / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
