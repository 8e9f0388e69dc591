"""TIFF and PNG whose values are kept: real files of the kinds that microscopes, scanners and satellites give."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from pipeline.errors import SourceError
from pipeline.image.bands import band_size, band_values, encoded, file_bits, upright_values
from pipeline.image.channels import PixelKind
from pipeline.image.decode import decode, resize
from pipeline.image.other_formats import opened, upright
from pipeline.image.photo import CorruptImage, Encoding, photo_from

Values = npt.NDArray[Any]


def values(bits: int, *shape: int) -> Values:
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(0).integers(0, 1 << bits, shape, dtype)


def tiff(array: Values, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


BESIDE = {"photometric": "minisblack", "planarconfig": "contig"}
APART = {"photometric": "minisblack", "planarconfig": "separate"}
FILES = {
    "16-bit gray": (16, tiff(values(16, 40, 50)), values(16, 40, 50, 1)),
    "white is zero": (16, tiff(values(16, 40, 50), photometric="miniswhite"), 65535 - values(16, 40, 50, 1)),
    "16-bit RGB, deflate": (
        16,
        tiff(values(16, 40, 50, 3), photometric="rgb", compression="zlib", predictor=True),
        values(16, 40, 50, 3),
    ),
    "8-bit RGB and infrared, tiled, LZW": (
        8,
        tiff(values(8, 40, 50, 4), **BESIDE, compression="lzw", tile=(16, 32)),
        values(8, 40, 50, 4),
    ),
    "13 bands one after the other, Zstandard": (
        16,
        tiff(values(16, 13, 40, 50), **APART, compression="zstd", tile=(32, 32)),
        values(16, 13, 40, 50).transpose(1, 2, 0),
    ),
    "big-endian, a page for each band": (
        16,
        tiff(values(16, 4, 40, 50), photometric="minisblack", byteorder=">"),
        values(16, 4, 40, 50).transpose(1, 2, 0),
    ),
    "BigTIFF in strips": (
        16,
        tiff(values(16, 40, 50, 2), **BESIDE, bigtiff=True, rowsperstrip=7),
        values(16, 40, 50, 2),
    ),
    "16-bit gray PNG": (16, imagecodecs.png_encode(values(16, 40, 50)), values(16, 40, 50, 1)),
    "16-bit RGB PNG": (16, imagecodecs.png_encode(values(16, 40, 50, 3)), values(16, 40, 50, 3)),
    "8-bit RGBA PNG": (8, imagecodecs.png_encode(values(8, 40, 50, 4)), values(8, 40, 50, 4)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_value_is_as_it_was_written(name: str) -> None:
    bits, data, expected = FILES[name]
    channels = expected.shape[2]

    found = decode(data, channels, bits)

    assert found.dtype == (np.uint8 if bits == 8 else np.uint16) and found.dtype.isnative
    np.testing.assert_array_equal(found, expected)
    assert band_size(data, channels, bits) == (40, 50) and file_bits(data, channels) == bits


@pytest.mark.parametrize("name", FILES)
def test_a_shard_holds_the_same_values_and_the_same_bytes_each_time(name: str) -> None:
    bits, data, expected = FILES[name]
    encoding = Encoding(bands=PixelKind(expected.shape[2], bits))

    photo = photo_from(data, encoding)

    assert (photo.extension, photo.height, photo.width) == ("tif", 40, 50)
    np.testing.assert_array_equal(decode(photo.data, expected.shape[2], bits), expected)
    assert photo_from(photo.data, encoding).data == photo.data


def test_what_is_smooth_is_stored_in_fewer_bytes() -> None:
    smooth = np.repeat(np.arange(200, dtype=np.uint16)[:, None, None] * 300, 100, axis=1).repeat(2, axis=2)

    assert len(encoded(smooth)) < smooth.nbytes / 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_photographs_are(orientation: int) -> None:
    array = values(16, 6, 9)
    exif, png = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray((array >> 8).astype(np.uint8)).save(png, "PNG", exif=exif)

    found = upright_values(tiff(array, extratags=[(274, 3, 1, orientation, True)]), 1, 16)

    with opened(png.getvalue()) as image:
        np.testing.assert_array_equal(found[..., 0] >> 8, np.asarray(upright(image)))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


REFUSED = {
    "other bands": (FILES["16-bit RGB, deflate"][1], r"3 x 16 bits, but in this data set 1 x 16"),
    "other bits": (tiff(values(8, 40, 50)), r"1 x 8 bits, but in this data set 1 x 16"),
    "floats": (tiff(np.zeros((40, 50), np.float32)), "floating-point numbers, whose range nobody knows; convert"),
    "half floats": (tiff(np.zeros((40, 50), np.float16)), "floating-point numbers"),
    "signed": (tiff(np.zeros((40, 50), np.int16)), "signed integers, whose range nobody knows"),
    "JPEG": (b"\xff\xd8\xff", "no TIFF or PNG"),
    "lossy": (
        tiff(values(16, 40, 50), compression="jpeg2000"),
        r"its compression \(.*2000.*\) is not read; save it with deflate or LZW",
    ),
    "palette": (
        tiff(values(8, 40, 50), photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
        "its values are no bands",
    ),
    "cut plain": (cut(FILES["16-bit gray"][1]), "."),
    "cut deflate": (cut(tiff(values(16, 40, 50), compression="zlib")), "."),
    "cut PNG": (cut(FILES["16-bit gray PNG"][1]), "."),
    "empty": (b"II*\0", "."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_image_is_refused_with_the_reason(name: str) -> None:
    data, reason = REFUSED[name]

    with pytest.raises(CorruptImage, match=reason):
        photo_from(data, Encoding(bands=PixelKind(1, 16)))


def with_tag(data: bytes, tag: int, value: int) -> bytes:
    """A TIFF whose first directory says something else."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages[0].tags[tag].offset  # type: ignore[union-attr]
    changed = (4).to_bytes(2, "little") + data[place + 4 : place + 8] + value.to_bytes(4, "little")
    return data[: place + 2] + changed + data[place + 12 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_tag(with_tag(tiff(values(16, 40, 50)), 256, 60_000), 257, 60_000), "more than"),
        (with_tag(tiff(values(16, 40, 48), tile=(16, 16), compression="zlib"), 322, 1 << 30), "more than"),
        (with_tag(tiff(values(16, 64, 50), rowsperstrip=1, compression="zlib"), 257, 128), "all of its strips"),
    ],
    ids=["pixels", "tile", "strips"],
)
def test_a_header_that_asks_for_too_much_is_refused_before_memory_is(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        band_values(data, 1, 16)


def test_many_bands_count_against_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 50)
    with pytest.raises(ValueError, match="bytes, more than the 6000 of the largest photograph"):
        band_values(FILES["13 bands one after the other, Zstandard"][1], 13, 16)
    assert band_values(FILES["16-bit gray"][1], 1, 16).shape == (40, 50, 1)


@pytest.mark.parametrize("bits", [8, 16])
def test_bands_are_resized_each_by_itself(bits: int) -> None:
    pixels = values(bits, 50, 60, 5)

    found = resize(pixels, 20, 24)

    each = [resize(np.ascontiguousarray(pixels[..., band : band + 1]), 20, 24)[0] for band in range(5)]
    assert found.dtype == pixels.dtype
    np.testing.assert_allclose(found.astype(int), np.stack(each).astype(int), atol=1)


def test_16_bits_are_resized_as_8_are_but_finer() -> None:
    small = values(8, 50, 60, 3)

    found = resize(small.astype(np.uint16) * np.uint16(257), 20, 24)

    assert np.abs(found / 257 - resize(small, 20, 24).astype(int)).max() < 1.5
    assert len(np.unique(found)) > 256


def test_larger_images_are_shrunk() -> None:
    photo = photo_from(FILES["16-bit RGB, deflate"][1], Encoding(max_side=25, bands=PixelKind(3, 16)))

    expected = resize(values(16, 40, 50, 3), 20, 25).transpose(1, 2, 0)
    assert (photo.height, photo.width) == (20, 25)
    np.testing.assert_array_equal(decode(photo.data, 3, 16), expected)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"bands": PixelKind(0, 16)}, "bands"),
        ({"bands": PixelKind(65, 16)}, "bands"),
        ({"bands": PixelKind(3, 8)}, "bands"),
        ({"bands": PixelKind(1, 8)}, "bands"),
        ({"bands": PixelKind(4, 12)}, "bits"),
        ({"bands": PixelKind(4, 8), "quality": 90}, "quality"),
    ],
)
def test_bands_that_cannot_be_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(SourceError) as error:
        Encoding(**given)
    assert error.value.field == field and error.value.remedy


def test_shards_of_photographs_are_those_that_they_were_before_there_were_bands() -> None:
    assert Encoding(quality=90).to_json() == {"max_side": None, "quality": 90}
    assert Encoding(bands=PixelKind(4)).to_json()["bands"] == {"channels": 4, "bits": 8}
