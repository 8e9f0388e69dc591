"""Images made to do harm: refused by name, in little time and memory; honest odd ones are not."""

from __future__ import annotations

import ast
import io
import stat
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.image import other_formats
from pipeline.image.decode import decode
from pipeline.image.jpeg_scans import MOST_SCANS, refuse_scan_bomb
from pipeline.image.photo import CorruptImage, photo_from

MakeJpeg = Callable[..., bytes]
PIPELINE = Path(__file__).parents[3] / "pipeline"


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def many_scans(scans: int, side: int = 64) -> bytes:
    """A gray progressive JPEG that refines one coefficient again and again, without changing it."""
    blocks = (side // 8) ** 2
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64)
    data += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    data += segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00" + b"\x10\x01" + bytes(15) + b"\x00")
    data += segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes(blocks // 8)
    return data + (segment(0xDA, b"\x01\x01\x00\x01\x01\x00") + bytes(blocks // 8)) * (scans - 1) + b"\xff\xd9"


def unmixed(scans: int) -> bytes:
    """A baseline JPEG of three colours that has a scan for each, the last of them again and again."""
    frame = struct.pack(">BHHB", 8, 64, 64, 3) + b"\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64) + segment(0xC0, frame)
    data += segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00" + b"\x10\x01" + bytes(15) + b"\x00")
    for scan in range(scans):
        data += segment(0xDA, bytes([1, min(scan + 1, 3), 0, 0, 63, 0])) + bytes(16)
    return data + b"\xff\xd9"


@pytest.mark.parametrize("make", [many_scans, unmixed])
def test_a_jpeg_that_goes_over_its_pixels_too_often_is_refused(make: Callable[[int], bytes]) -> None:
    assert decode(make(MOST_SCANS)).shape == (64, 64, 3)

    bomb = make(MOST_SCANS + 1)
    for refuse in (decode, other_formats.pixels_of, other_formats.size_of):
        with pytest.raises(ValueError, match="more than 100 scans"):
            refuse(bomb)
    with pytest.raises(CorruptImage, match="more than 100 scans"):
        photo_from(bomb)


@pytest.mark.parametrize("hidden", [b"\xff" * 9, b"junk", b"\xff\x00\xff\xd3"])
def test_what_libjpeg_skips_hides_no_scan(hidden: bytes) -> None:
    with pytest.raises(ValueError, match="more than 100 scans"):
        refuse_scan_bomb(many_scans(MOST_SCANS + 1).replace(b"\xff\xda", hidden + b"\xff\xda"))


def test_twenty_thousand_scans_are_refused_at_once() -> None:
    bomb = many_scans(20_000, 512)

    began = time.monotonic()
    with pytest.raises(ValueError, match="more than 100 scans"):
        decode(bomb)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_scans_of_thumbnails_and_of_what_follows_the_image_do_not_count(
    jpeg: MakeJpeg, options: dict[str, bool]
) -> None:
    image = jpeg(1, **options)
    thumbnails = b"".join(segment(marker, b"x" + many_scans(200)) for marker in (0xE1, 0xE2, 0xFE))
    scan = image.rindex(b"\xff\xda")
    for honest in (
        image[:2] + thumbnails + image[2:],
        image[:scan] + segment(0xFE, b"\xff\xda" * 500) + image[scan:],
        image + many_scans(200),
    ):
        refuse_scan_bomb(honest)
        assert other_formats.size_of(honest) == (40, 56)
        assert photo_from(honest).height == 40


@pytest.mark.parametrize("length", range(0, 700, 7))
def test_a_jpeg_that_ends_anywhere_is_counted_without_a_fault(jpeg: MakeJpeg, length: int) -> None:
    refuse_scan_bomb(jpeg(1, progressive=True)[:length])
    refuse_scan_bomb(b"\xff\xd8" + b"\xff" * length)


def test_an_eps_is_no_image_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL would start Ghostscript, an interpreter of programs, on it."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(ghostscript.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"

    for refuse in (decode, other_formats.pixels_of, other_formats.size_of):
        with pytest.raises(ValueError, match="not an image file"):
            refuse(eps)
    with pytest.raises(CorruptImage, match="not an image file"):
        photo_from(eps)
    assert not (tmp_path / "started").exists()


def test_only_promised_formats_are_images() -> None:
    image = Image.new("RGB", (8, 8))
    for form, promised in {
        "PNG": True,
        "WEBP": True,
        "BMP": True,
        "GIF": True,
        "TIFF": True,
        "PPM": False,
        "TGA": False,
    }.items():
        output = io.BytesIO()
        image.save(output, form)
        if promised:
            assert other_formats.size_of(output.getvalue()) == (8, 8)
        else:
            with pytest.raises(ValueError, match="not an image file"):
                other_formats.size_of(output.getvalue())


@pytest.mark.parametrize("path", sorted(PIPELINE.glob("*.py")), ids=lambda path: path.stem)
def test_every_image_is_opened_by_a_list_of_formats(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
            assert "formats" in {keyword.arg for keyword in node.keywords}


def test_what_pil_warns_of_does_not_reach_the_terminal(jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warnings name files of this machine, and a dataset of millions of images would have as many."""
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(1, 200))
    rotated = jpeg(1)[:2] + segment(0xE1, exif) + jpeg(1)[2:]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert other_formats.size_of(tiff.getvalue()) == (8, 8)  # a decompression bomb, to PIL
        monkeypatch.undo()
        photo_from(rotated)
        decode(tiff.getvalue())

    assert warned == []
