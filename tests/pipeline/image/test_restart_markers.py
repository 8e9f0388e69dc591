from __future__ import annotations

import io
import shutil
import subprocess
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.errors import SourceError
from pipeline.image.augment import Crop
from pipeline.image.decode import decode
from pipeline.image.decode_crop import decode_crop
from pipeline.image.jpeg_parts import Frame, MarkedJpeg
from pipeline.image.photo import CorruptImage, Encoding, photo_from
from pipeline.image.restart_markers import PROGRAM, interval, with_restart_markers

needs_jpegtran = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="no jpegtran here")
MARKED = Encoding(restart_markers=True)


def noise(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


def by_pil(mode: str = "RGB", size: tuple[int, int] = (120, 200), **options: Any) -> bytes:
    output = io.BytesIO()
    Image.fromarray(noise(*size)).convert(mode).save(output, "JPEG", **{"quality": 90} | options)
    return output.getvalue()


def by_simplejpeg(sampling: str) -> bytes:
    return bytes(simplejpeg.encode_jpeg(noise(120, 200), 90, "RGB", sampling))


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x010E] = "a description"
    return found


def gray_of_other_factors() -> bytes:
    data = bytearray(by_pil("L"))
    frame = Frame.of(bytes(data))
    assert frame is not None
    data[frame.size_at + 6] = 0x22
    return bytes(data)


PICTURES = {
    "4:2:0": by_pil(),
    "4:2:2": by_pil(subsampling=1),
    "4:4:4": by_pil(subsampling=0),
    "4:4:0": by_simplejpeg("440"),
    "4:1:1": by_simplejpeg("411"),
    "gray": by_pil("L"),
    "gray of other factors": gray_of_other_factors(),
    "rgb": by_pil(keep_rgb=True, subsampling=0),
    "progressive": by_pil(progressive=True),
    "optimised": by_pil(optimize=True),
    "with markers already": by_pil(restart_marker_blocks=3),
    "prime number of MCUs": by_pil(size=(90, 13 * 16 - 5)),
    "metadata": by_pil(exif=exif(), icc_profile=b"a profile" * 9000, comment=b"hello", dpi=(300, 300)),
    "one MCU": by_pil(size=(5, 7)),
}


def coefficients(data: bytes) -> bytes:
    """A JPEG of the same coefficients and tables that depends on nothing else."""
    command = [PROGRAM, "-copy", "none", "-optimize", "-restart", "0"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def metadata(data: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(data)) as image:
        kept = {"icc_profile", "exif", "comment", "jfif", "jfif_version", "jfif_density", "jfif_unit", "dpi"}
        kept |= {"adobe", "adobe_transform"}
        return {name: value for name, value in image.info.items() if name in kept}


@needs_jpegtran
@pytest.mark.parametrize("name", PICTURES)
def test_markers_change_no_coefficient_no_pixel_and_no_metadata(name: str) -> None:
    data = PICTURES[name]

    rewritten = with_restart_markers(data)

    assert rewritten is not None and rewritten != data
    assert coefficients(rewritten) == coefficients(data)
    assert np.array_equal(decode(rewritten), decode(data))
    assert np.array_equal(decode(rewritten, 1), decode(data, 1))
    assert metadata(rewritten) == metadata(data)
    assert with_restart_markers(rewritten) == rewritten


@needs_jpegtran
@pytest.mark.parametrize("name", sorted(PICTURES.keys() - {"one MCU"}))
def test_a_crop_of_what_was_rewritten_has_the_pixels_of_the_whole(name: str) -> None:
    data = with_restart_markers(PICTURES[name])
    assert data is not None
    whole, random, parts = decode(data), np.random.default_rng(0), 0
    height, width = whole.shape[:2]
    for _ in range(200):
        tall, wide = (int(random.integers(1, side + 1)) for side in (height, width))
        top, left = int(random.integers(0, height - tall + 1)), int(random.integers(0, width - wide + 1))
        crop = Crop(top, left, tall, wide, flip=False)
        found = decode_crop(data, 3, lambda *_, crop=crop: crop, is_marked=True, least_shape=None)  # type: ignore[misc]
        parts += found is not None
        assert found is None or np.array_equal(found[0], crop.of(whole))

    assert parts > 100


@needs_jpegtran
def test_segments_are_at_most_64_pixels_wide_and_divide_the_rows() -> None:
    for width in range(1, 700, 7):
        for sampling in (0, 2):
            data = with_restart_markers(by_pil(size=(24, width), subsampling=sampling))
            jpeg = MarkedJpeg.of(data or b"")
            assert jpeg is not None
            assert jpeg.frame.restart_interval == interval(jpeg.frame)
            assert jpeg.frame.restart_interval * jpeg.frame.mcu_width <= 64
            assert jpeg.frame.mcus_per_row % jpeg.frame.restart_interval == 0


@needs_jpegtran
def test_photos_get_markers_where_they_are_wanted() -> None:
    plain, converted = PICTURES["4:2:0"], io.BytesIO()
    Image.fromarray(noise(60, 90)).save(converted, "PNG")

    kept = photo_from(plain, MARKED)
    made = photo_from(converted.getvalue(), MARKED)

    assert (kept.height, kept.width) == (120, 200)
    assert MarkedJpeg.of(kept.data) and MarkedJpeg.of(made.data)
    assert photo_from(plain).data == plain
    with pytest.raises(CorruptImage):
        photo_from(plain[:-900], MARKED)


@needs_jpegtran
def test_a_jpeg_that_cannot_be_divided_keeps_its_bytes() -> None:
    lossless = imagecodecs.jpeg8_encode(noise(40, 50), lossless=True)
    decode(lossless)

    assert with_restart_markers(lossless) is None
    assert photo_from(lossless, MARKED) == photo_from(lossless)


def test_without_the_program_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(SourceError) as caught:
        photo_from(PICTURES["4:2:0"], MARKED)

    assert caught.value.field == "restart_markers"
    assert "libjpeg-turbo-progs" in caught.value.remedy
    assert photo_from(PICTURES["4:2:0"]).data == PICTURES["4:2:0"]
