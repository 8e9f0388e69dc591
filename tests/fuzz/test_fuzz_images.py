"""Image files: bytes that were changed, and metadata of all kinds around pixels that are sound."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from fuzzing import Fuzz
from hypothesis import strategies as st
from mutations import damaged
from odd_files import (
    JPEG_FREE,
    Part,
    extended_webp,
    jpeg_of,
    jpeg_parts,
    picture,
    png_of,
    png_parts,
    webp_of,
    webp_parts,
)
from PIL import Image

from pipeline.image import other_formats
from pipeline.image.augment import Crop
from pipeline.image.decode import decode
from pipeline.image.decode_crop import decode_crop
from pipeline.image.photo import CorruptImage, Photo, photo_from

Draw = Callable[[st.SearchStrategy[Any]], Any]

JPEGS = [
    picture(1, "JPEG"),
    picture(2, "JPEG", "L"),
    picture(3, "JPEG", progressive=True),
    picture(4, "JPEG", "CMYK"),
    picture(5, "JPEG", subsampling=1, restart_marker_blocks=1),
    picture(6, "JPEG", quality=100, optimize=True, icc_profile=b"x" * 300, comment=b"hello"),
]
MARKED = [
    picture(1, "JPEG", subsampling=2, restart_marker_blocks=1),
    picture(2, "JPEG", subsampling=1, restart_marker_blocks=1),
    picture(3, "JPEG", subsampling=0, restart_marker_blocks=1),
    picture(4, "JPEG", "L", restart_marker_blocks=1),
]
PNGS = [
    picture(1, "PNG"),
    picture(2, "PNG", "L"),
    picture(3, "PNG", "P"),
    picture(4, "PNG", "RGBA"),
    picture(5, "PNG", "1"),
    picture(6, "PNG", "I;16"),
]
WEBPS = [picture(1, "WEBP"), picture(2, "WEBP", lossless=True), picture(3, "WEBP", "RGBA", lossless=True)]
OTHERS = [
    picture(1, "GIF"),
    picture(2, "BMP"),
    picture(3, "TIFF"),
    picture(4, "TIFF", compression="tiff_lzw"),
    picture(5, "AVIF"),
]


MOST_BYTES = 2 << 30
"""Pillow's guard lets 89 million pixels pass, of which decoders hold a few copies."""

# What is not sound


def check_decoders(data: bytes) -> None:
    """All that looks at an image file agrees on it, and says of what it cannot use that it cannot."""
    pixels = _or_refused(lambda: decode(data), ValueError)
    size = _or_refused(lambda: other_formats.size_of(data), ValueError)
    photo = _or_refused(lambda: photo_from(data), CorruptImage)
    if pixels is not None:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert size == pixels.shape[:2], "an index made of headers has another size than the decoder"
    if photo is not None:
        assert isinstance(photo, Photo)
        assert decode(photo.data).shape == (photo.height, photo.width, 3)
        assert photo_from(photo.data).data == photo.data


def _or_refused(call: Callable[[], Any], refusal: type[Exception]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return call()
        except refusal as error:
            assert str(error) and str(error) == _again(call, refusal), "the reason is part of an index"
            return None


def _again(call: Callable[[], Any], refusal: type[Exception]) -> str:
    try:
        call()
    except refusal as error:
        return str(error)
    return ""


@st.composite
def changed_parts(draw: Draw, parts: list[Part]) -> list[Part]:
    """Parts of a file, of which some are changed, gone, said twice, or elsewhere."""
    found = list(parts)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(found) - 1))
        kind, content = found[place]
        match draw(st.sampled_from(("content", "content", "drop", "twice", "move", "kind"))):
            case "content":
                found[place] = (kind, draw(damaged(content, most=3)))
            case "drop" if len(found) > 1:
                del found[place]
            case "twice":
                found.insert(place, found[place])
            case "move":
                found.insert(draw(st.integers(0, len(found) - 1)), found.pop(place))
            case "kind":
                found[place] = (draw(st.binary(min_size=len(kind), max_size=len(kind))), content)
    return found


def _damaged_files(
    files: list[bytes], parts_of: Callable[[bytes], list[Part]], whole_of: Callable[[list[Part]], bytes]
) -> st.SearchStrategy[bytes]:
    sound = st.sampled_from(files)
    rebuilt = sound.flatmap(lambda data: changed_parts(parts_of(data))).map(whole_of)
    return st.one_of(sound.flatmap(damaged), rebuilt, rebuilt.flatmap(damaged))


def test_a_jpeg_of_any_bytes_is_an_image_or_refused(fuzz: Fuzz) -> None:
    def jpeg_bytes(data: bytes) -> None:
        check_decoders(data)

    fuzz(jpeg_bytes, _damaged_files(JPEGS, jpeg_parts, jpeg_of), batch=80, most_bytes=MOST_BYTES)


def check_crops(data: bytes, place: tuple[int, int, int, int]) -> None:
    """A part of a JPEG is decoded as it is in the whole, or not at all."""

    def choose(height: int, width: int) -> Crop:
        top, left, tall, wide = (part % side for part, side in zip(place, (height, width, height, width), strict=True))
        return Crop(top, left, min(tall + 1, height - top), min(wide + 1, width - left), flip=False)

    found = _or_refused(lambda: decode_crop(data, 3, choose, is_marked=True, least_shape=None), ValueError)
    scaled = _or_refused(lambda: decode_crop(data, 3, choose, is_marked=True, least_shape=(2, 2)), ValueError)
    whole = _or_refused(lambda: decode(data), ValueError)
    for pixels, crop in (each for each in (found, scaled) if each is not None):
        assert pixels.size and pixels.shape[0] <= crop.height and pixels.shape[1] <= crop.width
    if found is not None and whole is not None:
        pixels, crop = found
        assert np.array_equal(pixels, crop.of(whole))


def test_a_crop_of_a_jpeg_of_any_bytes_is_that_of_the_whole(fuzz: Fuzz) -> None:
    def jpeg_crops(example: tuple[bytes, tuple[int, int, int, int]]) -> None:
        check_crops(*example)

    place = st.tuples(*(st.integers(0, 200) for _ in range(4)))
    files = _damaged_files(MARKED, jpeg_parts, jpeg_of)
    fuzz(jpeg_crops, st.tuples(files, place), batch=80, most_bytes=MOST_BYTES)


def test_a_png_of_any_bytes_is_an_image_or_refused(fuzz: Fuzz) -> None:
    def png_bytes(data: bytes) -> None:
        check_decoders(data)

    fuzz(png_bytes, _damaged_files(PNGS, png_parts, png_of), batch=80, most_bytes=MOST_BYTES)


def test_a_webp_of_any_bytes_is_an_image_or_refused(fuzz: Fuzz) -> None:
    def webp_bytes(data: bytes) -> None:
        check_decoders(data)

    fuzz(webp_bytes, _damaged_files(WEBPS, webp_parts, webp_of), batch=50, most_bytes=MOST_BYTES)


def test_another_image_of_any_bytes_is_an_image_or_refused(fuzz: Fuzz) -> None:
    def other_image_bytes(data: bytes) -> None:
        check_decoders(data)

    fuzz(
        other_image_bytes,
        st.one_of(st.sampled_from(OTHERS).flatmap(damaged), st.binary(max_size=64)),
        batch=50,
        most_bytes=MOST_BYTES,
    )


# What is sound, with metadata that is not needed


@st.composite
def exif(draw: Draw) -> bytes:
    """An EXIF block: its directory has entries of any type, count and place."""
    order = draw(st.sampled_from(("<", ">")))
    entries = [
        struct.pack(
            f"{order}HHII",
            draw(st.sampled_from((0x0100, 0x010F, 0x0131, 0x011A, 0x8769, 0x8825, 0x927C, 0xA005, 0xFFFF))),
            draw(st.integers(0, 14)),
            draw(st.sampled_from((0, 1, 2, 7, 65535, 2**31, 2**32 - 1))),
            draw(st.sampled_from((0, 8, 10, 200, 2**31, 2**32 - 1))),
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    count = draw(st.sampled_from((len(entries), len(entries), 0, 65535)))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    block = (
        start
        + struct.pack(f"{order}H", count)
        + b"".join(entries)
        + struct.pack(f"{order}I", draw(st.sampled_from((0, 8, 2**31))))
    )
    return draw(st.one_of(st.just(block), damaged(block), st.just(b""), st.binary(max_size=30)))


garbage = st.one_of(st.binary(max_size=40), st.sampled_from((b"", bytes(65533), b"\xff" * 300, b"x\0" * 1000)), exif())


def upright(block: bytes) -> bool:
    """Whether no reader can find an orientation in a block: it holds the tag's number nowhere."""
    return b"\x12\x01" not in block and b"\x01\x12" not in block


@st.composite
def jpegs_with_metadata(draw: Draw) -> tuple[bytes, bytes]:
    """A JPEG, and the same with segments that say nothing of its pixels."""
    sound = draw(st.sampled_from(JPEGS))
    parts = jpeg_parts(sound)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(
            st.sampled_from(
                (
                    b"",
                    b"Exif\0\0",
                    b"Exif\0\0",
                    b"http://ns.adobe.com/xap/1.0/\0",
                    b"ICC_PROFILE\0\x01\x01",
                    b"MPF\0",
                    b"Photoshop 3.0\0",
                )
            )
        )
        block = draw(garbage.filter(upright))
        marker = draw(st.sampled_from(JPEG_FREE)) if not start.startswith(b"Exif") else 0xE1
        parts.insert(draw(st.integers(0, len(parts) - 1)), (bytes([marker]), start + block))
    return sound, jpeg_of(parts)


@st.composite
def pngs_with_metadata(draw: Draw) -> tuple[bytes, bytes]:
    """A PNG, and the same with chunks that say nothing of its pixels, some of them with a wrong CRC."""
    sound = draw(st.sampled_from(PNGS))
    parts = png_parts(sound)
    added = set()
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(
            st.sampled_from(
                (
                    b"tEXt",
                    b"zTXt",
                    b"iTXt",
                    b"eXIf",
                    b"iCCP",
                    b"tIME",
                    b"pHYs",
                    b"gAMA",
                    b"cHRM",
                    b"sRGB",
                    b"vpAg",
                    b"prVt",
                )
            )
        )
        place = draw(st.integers(1, len(parts) - 1))
        added = {other + (other >= place) for other in added} | {place}
        parts.insert(place, (kind, draw(garbage.filter(upright))))
    wrong = draw(st.sets(st.sampled_from(sorted(added))))
    return sound, png_of(parts, frozenset(wrong))


@st.composite
def webps_with_metadata(draw: Draw) -> tuple[bytes, bytes]:
    """A WebP, and the same in the extended form with metadata."""
    sound = draw(st.sampled_from(WEBPS[:2]))
    kinds = draw(st.lists(st.sampled_from((b"ICCP", b"EXIF", b"XMP ", b"junk")), min_size=1, max_size=3, unique=True))
    return sound, extended_webp(sound, [(kind, draw(garbage.filter(upright))) for kind in kinds])


def check_same_pixels(pair: tuple[bytes, bytes]) -> None:
    """Metadata costs no image, and no pixel of it; the expected ones are Pillow's of the file without it."""
    sound, dressed = pair
    if dressed.startswith(other_formats.JPEG_START):
        expected = decode(sound)
    else:
        with Image.open(io.BytesIO(sound)) as image:
            expected = np.array(other_formats.plain(image).convert("RGB"))
    assert np.array_equal(decode(dressed), expected)
    assert other_formats.size_of(dressed) == expected.shape[:2]
    photo, plain = photo_from(dressed), photo_from(sound)
    assert np.array_equal(decode(photo.data), decode(plain.data))


def test_metadata_costs_no_jpeg(fuzz: Fuzz) -> None:
    def jpeg_metadata(pair: tuple[bytes, bytes]) -> None:
        check_same_pixels(pair)

    fuzz(jpeg_metadata, jpegs_with_metadata(), batch=50)


def test_metadata_costs_no_png(fuzz: Fuzz) -> None:
    def png_metadata(pair: tuple[bytes, bytes]) -> None:
        check_same_pixels(pair)

    fuzz(png_metadata, pngs_with_metadata(), batch=50)


def test_metadata_costs_no_webp(fuzz: Fuzz) -> None:
    def webp_metadata(pair: tuple[bytes, bytes]) -> None:
        check_same_pixels(pair)

    fuzz(webp_metadata, webps_with_metadata(), batch=60)
