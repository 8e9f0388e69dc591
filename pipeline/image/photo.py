"""A user's image file as a shard holds it: the JPEG as it is where our decoder reads it, else an equal one."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, replace
from typing import Any

import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.errors import SourceError
from pipeline.image import bands, other_formats
from pipeline.image.bare_image import JPEG_START, bare_image
from pipeline.image.channels import DEEP_BITS, MOST_CHANNELS, PHOTOGRAPH_BITS, PixelKind
from pipeline.image.decode import KEPT_COLOURSPACES, is_convertible, readable_jpeg, resize
from pipeline.image.restart_markers import with_restart_markers

CONVERTED_QUALITY = 95
LONGEST_JPEG_SIDE = 65500
"""libjpeg's limit."""


class CorruptImage(Exception):  # noqa: N818
    """An image that does not decode; the text says why. Never leaves the shard's writer."""


@dataclass(frozen=True)
class Photo:
    """A JPEG that our decoder reads, or a TIFF of bands; shown upright without looking at EXIF."""

    data: bytes
    height: int
    width: int
    extension: str = "jpg"


@dataclass(frozen=True)
class Encoding:
    """Changes to images on their way into a shard; by default as few as possible."""

    max_side: int | None = None
    """Larger images are shrunk until their longer side has this many pixels."""
    quality: int | None = None
    """JPEG quality, 1 to 100, at which every image is encoded again; None: only those that must be, at 95."""
    restart_markers: bool = False
    """Whether JPEGs get restart markers, without a change to their pixels, so that crops of them decode faster."""
    bands: PixelKind | None = None
    """What each image has to hold where these are no photographs: they become TIFFs, and no value changes."""

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise SourceError("max_side", "must be at least 1 pixel", self.max_side, "omit it to keep sizes")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise SourceError("quality", "must be from 1 to 100", self.quality, "omit it to keep original bytes")
        if self.bands:
            self._check_bands(self.bands)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values; without those of later releases where nobody asks for them."""
        fields = asdict(self)
        if not self.restart_markers:
            del fields["restart_markers"]
        if self.bands is None:
            del fields["bands"]
        return fields

    def _check_bands(self, given: PixelKind) -> None:
        if not 1 <= given.channels <= MOST_CHANNELS:
            raise SourceError("bands", f"must be from 1 to {MOST_CHANNELS}", given.channels, "choose fewer bands")
        if given.bits not in (PHOTOGRAPH_BITS, DEEP_BITS):
            rule = f"must be {PHOTOGRAPH_BITS} or {DEEP_BITS}"
            raise SourceError("bits", rule, given.bits, "convert all images to one of them, by one scale")
        if given.is_photographic:
            remedy = "give --bits 16 for images of 16 bits; for those of 8, leave it out, with --gray for gray ones"
            raise SourceError("bands", f"must not be 1 or 3 with {given.bits} bits", given.channels, remedy)
        if self.quality is not None:
            rule = "must not be given with bands, which are stored without loss"
            raise SourceError("quality", rule, self.quality, "leave it out")
        if self.restart_markers:
            raise SourceError(
                "restart_markers", "must not be given with bands, which are no JPEGs", True, "leave it out"
            )


ORIGINAL = Encoding()


def photo_from(data: bytes, encoding: Encoding = ORIGINAL) -> Photo:
    """Check that an image file decodes to its last row; convert what is not an upright 8-bit JPEG.

    Gray, YCbCr and RGB JPEGs keep their bytes, unless the encoding says otherwise, or lose the metadata that decoders
    stumble over. PNG, WebP, CMYK, 12 and 16 bit, EXIF-rotated and the like become gray or RGB JPEGs. Transparent pixels
    are laid on white; of an animation the first frame counts. Restart markers come last, where they can be set. Bands
    become TIFFs with the same values.

    Raises:
        CorruptImage: It does not decode whole, has more pixels than PIL's guard against decompression bombs allows, or
            more scans than any encoder makes.
        SourceError: Restart markers are wanted, and what writes them is not installed.
    """
    try:
        if encoding.bands:
            return _banded(data, encoding.bands, encoding.max_side)
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


def _banded(data: bytes, wanted: PixelKind, max_side: int | None) -> Photo:
    values = bands.upright_values(data, wanted.channels, wanted.bits)
    height, width = values.shape[:2]
    if max_side is not None and max(height, width) > max_side:
        height, width = _shrunk_sides(height, width, max_side)
        values = resize(values, height, width).transpose(1, 2, 0)
    return Photo(bands.encoded(values), height, width, bands.FILE_EXTENSION)


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
    height, width = _shrunk_sides(image.height, image.width, max_side)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _shrunk_sides(height: int, width: int, max_side: int) -> tuple[int, int]:
    ratio = max_side / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))
