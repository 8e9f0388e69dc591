"""Images that libjpeg-turbo's 8-bit decoder does not take: PNG, WebP, GIF, CMYK, 12 and 16 bit JPEG, and the like."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pipeline.image.bare_image import JPEG_START, BareImage, bare_image
from pipeline.image.channels import RGB_CHANNELS
from pipeline.image.jpeg_scans import refuse_scan_bomb

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""What PIL may take an image for, whatever its name. It knows more: for an EPS it starts Ghostscript."""

_UNREAD = {
    "HEIC": (4, (b"ftyphei", b"ftyphev", b"ftypmif1heic")),
    "JPEG XL": (0, (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    "JPEG 2000": (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    "compressed by gzip": (0, (b"\x1f\x8b",)),
    "a page (HTML or XML)": (0, (b"<",)),
}
"""Other files found under names of images, by the bytes at a place."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PIL_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its first frame decoded to the last row, whatever is wrong with its metadata.

    Raises:
        Exception: Whatever a decoder raises on bytes that it does not understand.
    """
    refuse_scan_bomb(data)
    with _whole_images_only(), _opened(bare_image(data)) as image:
        refuse_bomb(image.height, image.width)
        image.load()
        yield image


def pixels_of(data: bytes, channels: int = RGB_CHANNELS) -> npt.NDArray[np.uint8]:
    """(H, W, channels) pixels, RGB or gray, not turned by EXIF.

    Raises:
        ValueError: It is no image, a damaged one, or one whose values have no known range.
    """
    try:
        with opened(data) as image:
            shown = np.array(plain(image).convert("RGB" if channels == RGB_CHANNELS else "L"))
            return shown.reshape(*shown.shape[:2], channels)
    except UnidentifiedImageError as error:
        raise ValueError(unread(data)) from error
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width by the header alone, of any image that `pixels_of` takes; raises ValueError as it does."""
    refuse_scan_bomb(data)
    if data.startswith(JPEG_START):
        with contextlib.suppress(ValueError, KeyError):  # sampling factors that TurboJPEG has no name for
            height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
            return height, width
    try:
        with _header_of(bare_image(data)) as image:
            return image.height, image.width
    except UnidentifiedImageError as error:
        raise ValueError(unread(data)) from error
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """An opened image as its EXIF says that it is to be shown; as it is where that says nothing sound."""
    method = _TURNS.get(orientation_of(image.getexif))
    return image if method is None else image.transpose(method)


def is_upright(data: bytes) -> bool:
    """Whether EXIF leaves a JPEG as it is."""
    exif = Image.Exif()

    def loaded() -> Image.Exif:
        exif.load(bare_image(data).exif)
        return exif

    return orientation_of(loaded) not in _TURNS


def plain(image: Image.Image) -> Image.Image:
    """Gray or RGB of 8 bits, with transparent pixels on white: what lies under them was not meant to be seen."""
    image = _eight_bit(image)
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image if image.mode == "L" else image.convert("L" if image.mode in ("1", "LA") else "RGB")


def refuse_bomb(height: int, width: int) -> None:
    """Raise ValueError for more pixels than PIL's guard against decompression bombs allows."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise ValueError(f"{width} x {height} pixels are more than PIL's limit of {limit}")


def unread(data: bytes) -> str:
    """The reason for a file that is no image that we read; PIL's message holds a memory address."""
    if not data:
        return "not an image file: it is empty"
    kind = next((kind for kind, (place, starts) in _UNREAD.items() if data.startswith(starts, place)), "")
    return f"not an image file that is read: it is {kind}" if kind else "not an image file"


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS that this build of PIL has; without AVIF some do."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(bare: BareImage) -> Image.Image:
    try:
        return _header_of(bare)
    except UnidentifiedImageError:
        if not bare.data.startswith(JPEG_START):
            raise
    return Image.fromarray(_deep_pixels(bare.data))


def _header_of(bare: BareImage) -> Image.Image:
    """The image with nothing decoded yet; PIL's warnings are suppressed, both now and when it is decoded.

    Raises:
        Exception: Whatever PIL raises on bytes that it does not understand.
    """
    _silence_pil()
    image = Image.open(io.BytesIO(bare.data), formats=_formats())
    if bare.exif:
        image.info["exif"] = bare.exif
    return image


def _silence_pil() -> None:
    # Not by warnings.catch_warnings: threads that decode at the same time would undo each other's.
    if _PIL_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def orientation_of(exif: Callable[[], Image.Exif]) -> int:
    """As EXIF has it; 1, which is upright, where it has none or cannot be read."""
    _silence_pil()
    try:
        orientation = exif().get(ExifTags.Base.Orientation)
    except Exception:  # malformed EXIF says nothing about the pixels
        return 1
    return orientation if isinstance(orientation, int) else 1


def _deep_pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """A JPEG of 12 or 16 bits, or a lossless one, as 8-bit gray or RGB; PIL and simplejpeg know none of them."""
    import imagecodecs

    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError as error:  # libjpeg-turbo found no subsampling, nor PIL an image
        raise ValueError("the JPEG has no frame header that libjpeg-turbo knows") from error
    refuse_bomb(height, width)
    pixels: npt.NDArray[np.uint16] = imagecodecs.jpeg_decode(data)
    return (pixels >> max(0, _precision(data) - 8)).astype(np.uint8)


def _precision(data: bytes) -> int:
    """Bits of a sample, from the frame header; the segments before it are skipped by their lengths."""
    place = 2
    while place + 4 < len(data) and data[place] == 0xFF:
        if data[place + 1] in _FRAMES:
            return data[place + 4]
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ValueError("the JPEG has no frame header")


def _eight_bit(image: Image.Image) -> Image.Image:
    """PIL's own conversion clips 16-bit gray at 255 where it should scale."""
    if image.mode == "F":
        raise ValueError("the pixels are floating-point numbers, whose range nobody knows")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"gray values from {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
    """PIL refusing truncated images, whatever a library in this process has made of its globals."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    if not before:  # written only where it must be: other threads read it too
        yield
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
