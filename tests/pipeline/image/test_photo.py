"""Re-encoding and rarer formats; that plain JPEGs keep their bytes is tested with shards."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.image.decode import decode
from pipeline.image.photo import CorruptImage, Encoding, photo_from

MakeJpeg = Callable[..., bytes]
GOLDEN = Path(__file__).parents[2] / "golden"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


@pytest.mark.parametrize(("height", "width", "expected"), [(40, 80, (16, 32)), (80, 40, (32, 16)), (3, 900, (1, 32))])
def test_larger_images_are_shrunk_to_the_longer_side(
    jpeg: MakeJpeg, height: int, width: int, expected: tuple[int, int]
) -> None:
    photo = photo_from(jpeg(1, height, width), Encoding(max_side=32))

    assert (photo.height, photo.width) == expected == decode(photo.data).shape[:2]


def test_shrinking_keeps_the_picture(jpeg: MakeJpeg) -> None:
    data = jpeg(1, 64, 96, quality=95)

    photo = photo_from(data, Encoding(max_side=48, quality=100))

    expected = Image.open(io.BytesIO(data)).resize((48, 32), Image.Resampling.BICUBIC)
    assert np.abs(decode(photo.data).astype(int) - np.asarray(expected)).mean() < 5


def test_images_that_fit_keep_their_bytes_unless_a_quality_is_given(jpeg: MakeJpeg) -> None:
    data = jpeg(1, 30, 40)

    assert photo_from(data, Encoding(max_side=40)).data == data
    assert len(photo_from(data, Encoding(max_side=40, quality=20)).data) < len(data)
    assert len(photo_from(data, Encoding(quality=20)).data) < len(photo_from(data, Encoding(quality=60)).data)


def test_the_same_image_is_encoded_to_the_same_bytes(jpeg: MakeJpeg) -> None:
    photos = [photo_from(jpeg(2, 50, 70), Encoding(max_side=32, quality=80)) for _ in range(2)]

    assert photos[0] == photos[1]


def test_exif_turns_before_it_shrinks(jpeg: MakeJpeg) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8

    photo = photo_from(jpeg(1, 40, 80, exif=exif), Encoding(max_side=40))

    assert (photo.height, photo.width) == (40, 20)


@pytest.mark.parametrize("options", [{"max_side": 0}, {"quality": 0}, {"quality": 101}])
def test_impossible_encodings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(SourceError):
        Encoding(**options)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("WEBP", "RGBA"), ("PNG", "LA")])
def test_transparent_pixels_become_white(kind: str, mode: str) -> None:
    image = Image.new(mode, (32, 24), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    image.paste((0, 255) if mode == "LA" else (0, 0, 0, 255), (0, 0, 16, 24))

    pixels = decode(photo_from(encoded(image, kind)).data)

    assert pixels[:, :14].max() < 10
    assert pixels[:, 18:].min() > 245


def test_a_palette_with_a_transparent_colour_becomes_white_there() -> None:
    image = Image.new("P", (32, 24), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])

    pixels = decode(photo_from(encoded(image, "PNG", transparency=1)).data)

    assert pixels.min() > 245


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        photo = photo_from(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))

        assert np.abs(decode(photo.data).astype(int) - [255, 0, 0]).mean() < 5, kind


@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray_stays_gray(mode: str) -> None:
    photo = photo_from(encoded(Image.new(mode, (16, 16)), "PNG"))

    assert Image.open(io.BytesIO(photo.data)).mode == "L"


def test_floating_point_images_are_corrupt() -> None:
    with pytest.raises(CorruptImage, match="floating-point"):
        photo_from(encoded(Image.new("F", (16, 16)), "TIFF"))


def expected_gray() -> np.ndarray:
    rows, columns = np.mgrid[0:24, 0:32]
    return (columns * 100 + rows * 20) >> 4


@pytest.mark.parametrize("name", ["gray-12-bit.jpg", "rgb-16-bit-lossless.jpg"])
def test_deep_jpegs_are_scaled_to_eight_bits(name: str) -> None:
    pytest.importorskip("imagecodecs")
    data = (GOLDEN / name).read_bytes()

    photo = photo_from(data)

    assert (photo.height, photo.width) == (24, 32)
    assert np.abs(decode(photo.data)[..., 0].astype(int) - expected_gray()).mean() < 3
    assert np.abs(decode(data)[..., 0].astype(int) - expected_gray()).max() <= 1


def test_a_damaged_deep_jpeg_is_corrupt() -> None:
    data = (GOLDEN / "gray-12-bit.jpg").read_bytes()

    with pytest.raises(CorruptImage):
        photo_from(data[:150])


def test_what_no_jpeg_can_hold_says_so() -> None:
    output = io.BytesIO()
    Image.new("L", (70_000, 2)).save(output, "PNG")

    with pytest.raises(CorruptImage, match="70000 x 2 pixels do not fit a JPEG"):
        photo_from(output.getvalue())


def test_a_jpeg_that_is_only_its_first_mark_says_what_is_missing() -> None:
    with pytest.raises(CorruptImage, match="no frame header"):
        photo_from(b"\xff\xd8")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image file: it is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "not an image file that is read: it is HEIC"),
        (b"\xff\x0a" + bytes(200), "not an image file that is read: it is JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "not an image file that is read: it is JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200), "not an image file that is read: it is JPEG 2000"),
        (b"\x1f\x8b\x08" + bytes(200), "not an image file that is read: it is compressed by gzip"),
        (b"<!doctype html><html>404</html>", "not an image file that is read: it is a page (HTML or XML)"),
        (b"anything else", "not an image file"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImage) as shard:
        photo_from(data)
    with pytest.raises(ValueError) as training:
        decode(data)

    assert str(shard.value) == str(training.value) == reason
