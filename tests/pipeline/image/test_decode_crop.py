from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.image.augment import Crop
from pipeline.image.decode import Pixels, decode, decode_jpeg
from pipeline.image.decode_crop import decode_crop
from pipeline.image.jpeg_parts import Frame, MarkedJpeg

FULL, HALF, QUARTER = 0, 1, 2
"""PIL's numbers for 4:4:4, 4:2:2 and 4:2:0."""


def marked(height: int, width: int, blocks: int, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG with restart markers, of noise: each sample of chroma differs from its neighbours."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, shape, np.uint8)
    output = io.BytesIO()
    Image.fromarray(noise).save(output, "JPEG", quality=92, restart_marker_blocks=blocks, **options)
    return output.getvalue()


LAYOUTS = [
    pytest.param({"subsampling": FULL}, 8, id="4:4:4"),
    pytest.param({"subsampling": HALF}, 16, id="4:2:2"),
    pytest.param({"subsampling": QUARTER}, 16, id="4:2:0"),
    pytest.param({"mode": "L"}, 8, id="gray"),
    pytest.param({"subsampling": FULL, "keep_rgb": True}, 8, id="rgb"),
]


def decoded_crop(
    data: bytes, crop: Crop, channels: int = 3, least_shape: tuple[int, int] | None = None, *, is_marked: bool = True
) -> Pixels | None:
    found = decode_crop(data, channels, lambda *_: crop, is_marked=is_marked, least_shape=least_shape)
    return None if found is None else found[0]


def crops(height: int, width: int) -> Iterator[Crop]:
    """Corners, single pixels at each place of an MCU and a half, and some at random."""
    for top, left in itertools.product((0, height // 2, height - 9), (0, width // 2, width - 9)):
        yield Crop(top, left, 9, 9, flip=False)
    for place in range(24):
        yield Crop(place, width - 1 - place, 1, 1, flip=False)
        yield Crop(height - 1 - place, place, 1, 1, flip=False)
    random = np.random.default_rng(height)
    for _ in range(60):
        tall, wide = random.integers(1, height + 1), random.integers(1, width + 1)
        top, left = random.integers(0, height - tall + 1), random.integers(0, width - wide + 1)
        yield Crop(int(top), int(left), int(tall), int(wide), flip=False)


@pytest.mark.parametrize(("options", "mcu_width"), LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(96, 128), (97, 115), (83, 81), (64, 98), (50, 65)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_has_the_pixels_of_the_whole_image(
    options: dict[str, Any], mcu_width: int, height: int, width: int, channels: int
) -> None:
    per_row = -(-width // mcu_width)
    parts = 0
    for blocks in (count for count in range(1, per_row + 1) if per_row % count == 0):
        data = marked(height, width, blocks, **options)
        whole = decode(data, channels)
        for crop in crops(height, width):
            found = decoded_crop(data, crop, channels)
            if found is not None:
                parts += 1
                assert np.array_equal(found, crop.of(whole)), (blocks, crop)

    assert parts > 100


@pytest.mark.parametrize(("options", "mcu_width"), LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(320, 384), (331, 361)])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_crop_that_is_shrunk_has_the_pixels_of_the_whole_image_that_is_shrunk(
    options: dict[str, Any], mcu_width: int, height: int, width: int, shrink: int
) -> None:
    per_row = -(-width // mcu_width)
    blocks = next(count for count in range(6, 0, -1) if per_row % count == 0)
    data = marked(height, width, blocks, **options)
    whole = decode_jpeg(data, shrink=shrink)
    assert whole.shape == (-(-height // shrink), -(-width // shrink), 3)
    wanted = (16, 16)
    parts = 0
    for crop in crops(height, width):
        if min(crop.height, crop.width) // 16 not in range(shrink, 2 * shrink if shrink < 8 else 99):
            continue
        bottom, right = crop.top + crop.height, crop.left + crop.width
        top, left, bottom, right = (int(edge / shrink + 0.5) for edge in (crop.top, crop.left, bottom, right))
        expected = whole[top:bottom, left:right]
        for is_marked in (True, False):
            found = decoded_crop(data, crop, least_shape=wanted, is_marked=is_marked)
            assert found is not None and np.array_equal(found, expected), crop
        parts += MarkedJpeg.of(data).part(crop.top, crop.left, crop.height, crop.width, shrink) is not None  # type: ignore[union-attr]

    assert parts > 2


def test_a_part_is_as_small_as_its_margin_allows() -> None:
    data = marked(160, 192, 2, subsampling=QUARTER)
    jpeg = MarkedJpeg.of(data)
    assert jpeg is not None

    part = jpeg.part(34, 66, 12, 28)
    wider = jpeg.part(34, 65, 12, 30)

    assert part is not None and wider is not None
    assert (part.top, part.left, Image.open(io.BytesIO(part.data)).size) == (32, 64, (32, 16))
    assert (wider.top, wider.left, Image.open(io.BytesIO(wider.data)).size) == (32, 32, (64 + 32, 16))
    assert len(part.data) < 2000 < len(data) // 10


def test_metadata_does_not_hide_the_markers() -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd0 and \xff\xd9 are markers"
    data = marked(96, 128, 4, exif=exif, icc_profile=b"\xff\xd0" * 99, comment=b"\xff\xda")

    found = decoded_crop(data, Crop(40, 70, 20, 20, flip=False))

    assert found is not None and np.array_equal(found, decode(data)[40:60, 70:90])


def test_without_a_fraction_or_markers_that_count_the_whole_image_is_decoded() -> None:
    crop = Crop(8, 8, 40, 40, flip=False)
    data = marked(96, 128, 4)

    assert decoded_crop(data, crop) is not None
    assert decoded_crop(data, crop, is_marked=False) is None
    assert decoded_crop(data, Crop(0, 0, 96, 128, flip=False)) is None
    assert decoded_crop(data, crop, is_marked=False, least_shape=(21, 21)) is None
    assert decoded_crop(data, crop, is_marked=False, least_shape=(20, 20)) is not None
    assert decoded_crop(b"no JPEG", crop) is None


def progressive() -> bytes:
    return marked(96, 128, 4, progressive=True)


def uneven() -> bytes:
    return marked(96, 128, 3)


def cmyk() -> bytes:
    output = io.BytesIO()
    Image.new("CMYK", (128, 96), (9, 99, 199, 20)).save(output, "JPEG", restart_marker_blocks=4)
    return output.getvalue()


@pytest.mark.parametrize("make", [progressive, uneven, cmyk])
def test_markers_that_do_not_divide_the_rows_are_not_used(make: Any) -> None:
    data = make()

    assert MarkedJpeg.of(data) is None
    assert decoded_crop(data, Crop(8, 8, 40, 40, flip=False)) is None
    decode(data)


def test_a_progressive_jpeg_is_shrunk_as_well() -> None:
    data = progressive()

    found = decoded_crop(data, Crop(8, 8, 40, 40, flip=False), least_shape=(20, 20))

    assert found is not None and np.array_equal(found, decode_jpeg(data, shrink=2)[4:24, 4:24])


SOUND = marked(96, 128, 4, subsampling=QUARTER)
FRAME = Frame.of(SOUND)
MARKERS = MarkedJpeg.of(SOUND)
assert FRAME and MARKERS
ENDS = MARKERS.ends.ravel().tolist()


def changed(at: int, *octets: int) -> bytes:
    return SOUND[:at] + bytes(octets) + SOUND[at + len(octets) :]


LYING = {
    "a marker is missing": SOUND[: ENDS[3]] + SOUND[ENDS[3] + 2 :],
    "a marker twice": SOUND[: ENDS[3]] + SOUND[ENDS[3] : ENDS[3] + 2] + SOUND[ENDS[3] :],
    "another number": changed(ENDS[3], 0xFF, 0xD7),
    "a fill byte": SOUND[: ENDS[3]] + b"\xff" + SOUND[ENDS[3] :],
    "cut short": SOUND[: ENDS[6]],
    "no end": SOUND[:-2],
    "more rows": changed(FRAME.size_at, 0x7F, 0xFF),
    "fewer rows": changed(FRAME.size_at, 0, 80),
    "more columns": changed(FRAME.size_at + 2, 0x7F, 0xFF),
    "fewer columns": changed(FRAME.size_at + 2, 0, 64),
    "no rows": changed(FRAME.size_at, 0, 0),
    "another interval": SOUND.replace(b"\xff\xdd\0\x04\0\x04", b"\xff\xdd\0\x04\0\x02"),
    "an interval of none": SOUND.replace(b"\xff\xdd\0\x04\0\x04", b"\xff\xdd\0\x04\0\0"),
    "other sampling": changed(FRAME.size_at + 6, 0x11),
    "only a header": SOUND[: FRAME.data_at],
    "half a header": SOUND[: FRAME.data_at - 5],
}


@pytest.mark.parametrize("what", LYING)
def test_what_is_said_of_markers_is_checked(what: str) -> None:
    assert MarkedJpeg.of(LYING[what]) is None
    assert decoded_crop(LYING[what], Crop(8, 8, 40, 40, flip=False)) is None


def test_a_damaged_segment_is_left_to_the_whole_decode() -> None:
    segment = 2 * 3 + 1  # in rows from 48 and columns from 64 on
    data = SOUND[: ENDS[segment - 1] + 40] + SOUND[ENDS[segment] :]
    with pytest.raises(ValueError):
        decode(data)

    assert MarkedJpeg.of(data) is not None
    assert decoded_crop(data, Crop(50, 100, 4, 4, flip=False)) is None


def test_an_image_beyond_the_guard_is_refused_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 - 1)
    with pytest.raises(ValueError) as whole:
        decode_jpeg(SOUND)

    with pytest.raises(ValueError) as part:
        decoded_crop(SOUND, Crop(8, 8, 40, 40, flip=False))

    assert str(part.value) == str(whole.value)


def test_sampling_that_simplejpeg_encodes_has_the_frame_that_it_says() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    sizes = {}
    for sampling in ("444", "422", "420", "440", "411", "Gray"):
        pixels, space = (noise[..., :1], "GRAY") if sampling == "Gray" else (noise, "RGB")
        frame = Frame.of(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, space, sampling))
        assert frame and (frame.height, frame.width, frame.is_one_scan) == (70, 90, True)
        sizes[sampling] = (frame.mcu_height, frame.mcu_width)

    assert sizes == {"444": (8, 8), "422": (8, 16), "420": (16, 16), "440": (16, 8), "411": (8, 32), "Gray": (8, 8)}
