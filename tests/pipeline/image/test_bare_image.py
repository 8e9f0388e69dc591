"""Metadata that no pixel needs does not cost an image: every odd file has the pixels of the same file without it."""

from __future__ import annotations

import io
import itertools
import math
import struct
import zlib
from collections.abc import Callable, Iterator

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.image import other_formats
from pipeline.image.bare_image import LARGEST_EXIF_BYTES, bare_image
from pipeline.image.decode import decode
from pipeline.image.photo import LONGEST_JPEG_SIDE, CorruptImage, Encoding, photo_from

HEIGHT, WIDTH = 48, 64
LARGE = 2 << 20
"""More than PIL unpacks of a text or a profile."""
TURNED = 6

Pixels = npt.NDArray[np.uint8]


def picture(mode: str = "RGB") -> Image.Image:
    cells = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(np.kron(cells, np.ones((8, 8, 1), np.uint8))).convert(mode)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    output = io.BytesIO()
    picture(mode).save(output, kind, **options)
    return output.getvalue()


PLAIN = {
    "jpeg": encoded("JPEG", quality=90),
    "progressive": encoded("JPEG", quality=90, progressive=True),
    "cmyk": encoded("JPEG", "CMYK", quality=90),
    "png": encoded("PNG"),
    "palette": encoded("PNG", "P"),
    "webp": encoded("WEBP", lossless=True),
    "lossy": encoded("WEBP", quality=80),
    "tiff": encoded("TIFF"),
    "lzw": encoded("TIFF", compression="tiff_lzw"),
    "avif": encoded("AVIF", quality=90),
    "gif": encoded("GIF", "P"),
    "bmp": encoded("BMP"),
}


def expected_pixels(name: str) -> Pixels:
    """What other libraries than ours make of the plain file; only PIL makes RGB of CMYK."""
    data = PLAIN[name]
    if name in ("jpeg", "progressive"):
        return np.asarray(imagecodecs.jpeg8_decode(data))
    if name == "palette":
        return np.asarray(imagecodecs.png_decode(data)[..., :3])
    readers = {"png": "png", "webp": "webp", "lossy": "webp", "tiff": "tiff", "lzw": "tiff", "avif": "avif"}
    if name in readers:
        return np.asarray(getattr(imagecodecs, f"{readers[name]}_decode")(data)[..., :3])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def assert_alike(pixels: Pixels, name: str) -> None:
    """PIL and simplejpeg round colours of CMYK otherwise."""
    assert np.abs(pixels.astype(int) - expected_pixels(name)).max() <= (1 if name == "cmyk" else 0)


def tiff_block(*entries: tuple[int, int, int, bytes], order: str = "<", tail: bytes = b"") -> bytes:
    """EXIF: a TIFF directory of (tag, type, count, value)."""
    body = b"".join(struct.pack(f"{order}HHI", *numbers) + value.ljust(4, b"\0") for *numbers, value in entries)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return start + struct.pack(f"{order}H", len(entries)) + body + bytes(4) + tail


def orientation(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack(f"{order}HH", value, 0))


EXIF = {
    "garbage": b"garbage!",
    "empty": b"",
    "one-byte": b"I",
    "header-alone": b"II*\0",
    "far-directory": b"II*\0" + struct.pack("<I", 1 << 30),
    "directory-at-itself": b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x8769, 4, 1, 8) + bytes(4),
    "cut-in-an-entry": tiff_block(orientation(1))[:15],
    "very-many-entries": b"II*\0" + struct.pack("<IH", 8, 65535) + b"\xff" * 40,
    "value-behind-the-end": tiff_block((0x011A, 5, 1, struct.pack("<I", 60000))),
    "unknown-type": tiff_block((0x011A, 77, 1, b"\1")),
    "zero-denominator": tiff_block((0x011A, 5, 1, struct.pack("<I", 26)), tail=struct.pack("<II", 72, 0)),
    "negative": tiff_block((0x9204, 10, 1, struct.pack("<I", 26)), tail=struct.pack("<ii", -1, 0)),
    "two-resolutions": tiff_block((0x011A, 5, 2, struct.pack("<I", 26)), tail=struct.pack("<IIII", 72, 1, 72, 1)),
    "xmp-of-shorts": tiff_block((0x02BC, 3, 2, struct.pack("<HH", 1, 2))),
    "no-text": tiff_block((0x010E, 2, 4, b"\xff\xfe\xfd\xfc")),
    "orientation-0": tiff_block(orientation(0)),
    "orientation-9": tiff_block(orientation(9)),
    "orientation-as-text": tiff_block((0x0112, 2, 2, b"6\0")),
    "orientation-as-float": tiff_block((0x0112, 11, 1, struct.pack("<f", 6.0))),
    "bigtiff": b"II+\0" + bytes(40),
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
}
"""Blocks that turn no image."""


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(plain: bytes, *segments: bytes) -> bytes:
    return plain[:2] + b"".join(segments) + plain[2:]


def without_jfif(plain: bytes) -> bytes:
    assert plain[2:4] == b"\xff\xe0"
    return plain[:2] + plain[4 + int.from_bytes(plain[4:6], "big") :]


def chunk(kind: bytes, body: bytes, *, sound: bool = True) -> bytes:
    crc = zlib.crc32(kind + body) ^ (0 if sound else 1)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png_with(plain: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    place = plain.rindex(b"IEND") - 4 if behind else 33
    return plain[:place] + b"".join(chunks) + plain[place:]


def png_chunks(plain: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Start, kind and end of each."""
    place = 8
    while place < len(plain):
        end = place + 12 + int.from_bytes(plain[place : place + 4], "big")
        yield place, plain[place + 4 : place + 8], end
        place = end


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp_with(plain: bytes, *chunks: bytes, flags: int = 0x08) -> bytes:
    """An extended WebP, of the same image and these chunks behind it."""
    header = struct.pack("<I", flags) + (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    body = b"WEBP" + riff_chunk(b"VP8X", header) + plain[12:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_with(plain: bytes, *entries: tuple[int, int, int, bytes]) -> bytes:
    """With more entries in its directory, which moves to the end."""
    start = int.from_bytes(plain[4:8], "little")
    count = int.from_bytes(plain[start : start + 2], "little")
    old = [plain[start + 2 + 12 * n : start + 14 + 12 * n] for n in range(count)]
    new = [struct.pack("<HHI", *numbers) + value.ljust(4, b"\0") for *numbers, value in entries]
    fields = sorted(old + new, key=lambda field: int.from_bytes(field[:2], "little"))
    body = plain + b"\0" * (len(plain) % 2)
    return (
        body[:4]
        + struct.pack("<I", len(body))
        + body[8:]
        + struct.pack("<H", len(fields))
        + b"".join(fields)
        + bytes(4)
    )


def avif_with(exif: bytes) -> bytes:
    """PIL takes no block that is none, so a sound one of the same length is overwritten."""
    sound = tiff_block((0x010E, 2, 200, struct.pack("<I", 26)), tail=b"x" * 199 + b"\0")
    data = encoded("AVIF", quality=90, exif=sound)
    place = data.index(sound)
    return data[:place] + exif[: len(sound)].ljust(len(sound), b"!") + data[place + len(sound) :]


def odd_jpegs() -> Iterator[tuple[str, str, bytes]]:
    for name in ("jpeg", "progressive", "cmyk"):
        plain = PLAIN[name]
        for kind, block in EXIF.items():
            yield f"exif-{kind}", name, jpeg_with(plain, segment(0xE1, b"Exif\0\0" + block))
        segments = {
            "no-exif": [segment(0xE1, b"garbage!")],
            "exif-without-end": [segment(0xE1, b"Exif")],
            "exif-in-parts": [segment(0xE1, b"Exif\0\0" + b"\xff" * 65000)] * 30,
            "xmp": [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'>\xff")],
            "short-jfif": [segment(0xE0, b"JFIF\0\1")],
            "short-adobe": [segment(0xEE, b"Adobe")],
            "icc-of-wrong-numbers": [segment(0xE2, b"ICC_PROFILE\0\3\2abc")] * 2,
            "icc-number-0": [segment(0xE2, b"ICC_PROFILE\0\0\0abc")],
            "short-icc": [segment(0xE2, b"ICC_PROFILE\0")],
            "large-icc": [segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 40]) + bytes(65000)) for n in range(1, 41)],
            "mpf": [segment(0xE2, b"MPF\0garbage")],
            "flashpix": [segment(0xE2, b"FPXR\0")],
            "photoshop": [segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff")],
            "comment": [segment(0xFE, b"\xff\xd9\xff\xda" * 50)],
            "empty": [b"\xff\xe5\0\2", b"\xff\xfe\0\2"],
            "length-0": [b"\xff\xe5\0\0", b"\xff\xfe\0\1"],
            "fill-bytes": [b"\xff" * 7],
            "all-applications": [segment(marker, b"\0") for marker in range(0xE1, 0xF0)],
        }
        for kind, some in segments.items():
            yield kind, name, jpeg_with(plain, *some)
    for version in (b"\0\0", b"\2\0", b"\xff\xff"):
        bare = without_jfif(PLAIN["jpeg"])
        yield "jfif-version", "jpeg", jpeg_with(bare, segment(0xE0, b"JFIF\0" + version + bytes(7)))
        yield "jfif-thumbnail", "jpeg", jpeg_with(bare, segment(0xE0, b"JFIF\0" + version + bytes(5) + b"\xff\xff"))
    yield "adobe-transform", "jpeg", jpeg_with(without_jfif(PLAIN["jpeg"]), segment(0xEE, b"Adobe\0\x64\0\0\0\0\7"))


def odd_pngs() -> Iterator[tuple[str, str, bytes]]:
    large = zlib.compress(bytes(LARGE))
    chunks = {
        "large-icc": chunk(b"iCCP", b"p\0\0" + large),
        "icc-of-no-zlib": chunk(b"iCCP", b"p\0\0notzlib"),
        "icc-of-unknown-method": chunk(b"iCCP", b"p\0\7" + large),
        "icc-name-alone": chunk(b"iCCP", b"p\0"),
        "empty-icc": chunk(b"iCCP", b""),
        "large-ztxt": chunk(b"zTXt", b"k\0\0" + large),
        "ztxt-of-unknown-method": chunk(b"zTXt", b"k\0\7x"),
        "large-itxt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large),
        "many-texts": b"".join(chunk(b"zTXt", b"%d\0\0" % n + zlib.compress(bytes(LARGE // 2))) for n in range(70)),
        "text-in-latin": chunk(b"tEXt", b"\xe9\0\xe9"),
        "itxt-of-no-utf8": chunk(b"iTXt", b"k\0\0\0\xff\0\xff\0\xff"),
        "exif-as-text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\nno hex")),
        "large-exif-as-text": chunk(b"zTXt", b"Raw profile type exif\0\0" + large),
        "damaged-exif-as-text": chunk(b"zTXt", b"Raw profile type exif\0\0notzlib"),
        **{f"short-{kind}": chunk(kind.encode(), b"\0") for kind in ("gAMA", "cHRM", "sRGB", "pHYs", "tIME", "acTL")},
        **{f"empty-{kind}": chunk(kind.encode(), b"") for kind in ("gAMA", "cHRM", "sRGB", "pHYs", "acTL", "sBIT")},
        "animation-of-one-frame": chunk(b"acTL", struct.pack(">II", 1, 0)),
        "animation-out-of-order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0\0\0\7" + bytes(22)),
        "private": chunk(b"prVt", b"x" * 500),
        **{
            f"wrong-crc-{kind}": chunk(kind.encode(), body, sound=False)
            for kind, body in [
                ("tEXt", b"k\0v"), ("zTXt", b"k\0\0x"), ("iTXt", b"k\0\0\0\0\0v"), ("iCCP", b"p\0\0x"),
                ("tIME", bytes(7)), ("eXIf", tiff_block(orientation(TURNED))), ("pHYs", bytes(9)), ("gAMA", bytes(4)),
                ("prVt", b"x"),
            ]
        },
        **{f"exif-{kind}": chunk(b"eXIf", block) for kind, block in EXIF.items()},
    }  # fmt: skip
    for (kind, odd), name, behind in itertools.product(chunks.items(), ("png", "palette"), (False, True)):
        yield f"{kind}{'-behind' if behind else ''}", name, png_with(PLAIN[name], odd, behind=behind)
    yield "cut-text-at-the-end", "png", PLAIN["png"][:-12] + struct.pack(">I4s", 1000, b"tEXt") + b"cut"
    yield "junk-at-the-end", "png", PLAIN["png"] + b"junk" * 99


def odd_webps() -> Iterator[tuple[str, str, bytes]]:
    for name in ("webp", "lossy"):
        plain = PLAIN[name]
        for kind, block in EXIF.items():
            yield f"exif-{kind}", name, webp_with(plain, riff_chunk(b"EXIF", block))
            yield f"exif-prefixed-{kind}", name, webp_with(plain, riff_chunk(b"EXIF", b"Exif\0\0" + block))
        yield "announced-but-not-there", name, webp_with(plain, flags=0x2C)
        yield "xmp", name, webp_with(plain, riff_chunk(b"XMP ", b"<x tiff:Orientation='6'>\xff"), flags=0x04)
        yield "large-icc", name, webp_with(plain, riff_chunk(b"ICCP", bytes(LARGE)), flags=0x20)
        yield "private", name, webp_with(plain, riff_chunk(b"prVt", bytes(99)))
        yield "twice", name, webp_with(plain, *[riff_chunk(b"EXIF", EXIF["garbage"])] * 2)
        yield "cut", name, webp_with(plain, riff_chunk(b"EXIF", bytes(1000)))[:-500]
        yield "cut-icc", name, webp_with(plain, riff_chunk(b"ICCP", bytes(1000)), flags=0x20)[:-500]
        yield "behind-the-end", name, plain + riff_chunk(b"EXIF", EXIF["garbage"])


def odd_tiffs() -> Iterator[tuple[str, str, bytes]]:
    entries = {
        "exif-far-away": (0x8769, 4, 1, struct.pack("<I", 1 << 30)),
        "exif-at-itself": (0x8769, 4, 1, struct.pack("<I", 8)),
        "exif-as-text": (0x8769, 2, 4, b"abc\0"),
        "gps-far-away": (0x8825, 4, 1, struct.pack("<I", 1 << 30)),
        "icc-behind-the-end": (34675, 7, 1 << 20, struct.pack("<I", 100)),
        "icc-of-shorts": (34675, 3, 2, b"abcd"),
        "xmp-of-shorts": (700, 3, 2, struct.pack("<HH", 1, 2)),
        "photoshop": (34377, 1, 1 << 28, struct.pack("<I", 1 << 28)),
        "unknown-type": (305, 77, 1, b"abcd"),
        "unknown-tag": (65000, 5, 1 << 27, struct.pack("<I", 8)),
        "no-text": (270, 2, 4, b"\xff\xfe\xfd\xfc"),
        "resolution": (282, 5, 1, struct.pack("<I", 1 << 30)),
        "resolution-unit": (296, 2, 4, b"inch"),
        "orientation-9": orientation(9),
        "orientation-0": orientation(0),
        "orientation-as-text": (0x0112, 2, 2, b"6\0"),
    }
    for name, (kind, entry) in itertools.product(("tiff", "lzw"), entries.items()):
        yield kind, name, tiff_with(PLAIN[name], entry)


def odd_others() -> Iterator[tuple[str, str, bytes]]:
    for kind, block in EXIF.items():
        yield f"exif-{kind}", "avif", avif_with(block)
    yield "xmp", "avif", encoded("AVIF", quality=90, xmp=b"\xff" * 99)
    yield "icc", "avif", encoded("AVIF", quality=90, icc_profile=b"garbage!")
    comment = b"\x21\xfe\x04\xff\xff\xff\xff\x00"
    start = PLAIN["gif"].index(b"\x2c", 13 + 3 * 2 ** ((PLAIN["gif"][10] & 7) + 1))
    for kind, extension in {
        "comment": comment * 20,
        "xmp": b"\x21\xff\x0bXMP DataXMP\x02\xff\xff\x00",
        "short-loop": b"\x21\xff\x0bNETSCAPE2.0\x01\x01\x00",
    }.items():
        yield kind, "gif", PLAIN["gif"][:start] + extension + PLAIN["gif"][start:]
    yield "cut-comment", "gif", PLAIN["gif"][:-1] + b"\x21\xfe\xffcut"


ODD = [*odd_jpegs(), *odd_pngs(), *odd_webps(), *odd_tiffs(), *odd_others()]


@pytest.mark.parametrize(("kind", "name", "data"), ODD, ids=[f"{name}-{kind}" for kind, name, _ in ODD])
def test_pixels_are_those_of_the_file_without_metadata(kind: str, name: str, data: bytes) -> None:
    assert data != PLAIN[name]

    assert_alike(decode(data), name)
    assert other_formats.size_of(data) == (HEIGHT, WIDTH)
    assert (decode(photo_from(data).data) == decode(photo_from(PLAIN[name]).data)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_decoded_as_others_do(name: str) -> None:
    assert_alike(decode(PLAIN[name]), name)


def sound_exif(value: int) -> list[tuple[str, bytes, bytes]]:
    """Kind, the image that sound EXIF turns, and the same without it."""
    little, big = tiff_block(orientation(value)), tiff_block(orientation(value, ">"), order=">")
    text = b"\nexif\n      26\n" + (b"Exif\0\0" + little).hex().encode()
    jpeg, cmyk, png, webp, tiff = (PLAIN[name] for name in ("jpeg", "cmyk", "png", "webp", "tiff"))
    large = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(LARGE)))
    damaged = segment(0xE2, b"ICC_PROFILE\0\3\2x")
    halves = [segment(0xE1, b"Exif\0\0" + half) for half in (little[:9], little[9:])]
    return [
        ("jpeg", jpeg_with(jpeg, segment(0xE1, b"Exif\0\0" + little)), jpeg),
        ("big endian", jpeg_with(jpeg, segment(0xE1, b"Exif\0\0" + big)), jpeg),
        ("two headers", jpeg_with(jpeg, segment(0xE1, b"Exif\0\0Exif\0\0" + little)), jpeg),
        ("beside damaged ICC", jpeg_with(jpeg, segment(0xE1, b"Exif\0\0" + little), damaged), jpeg),
        ("in parts", jpeg_with(jpeg, *halves), jpeg),
        ("cmyk", jpeg_with(cmyk, segment(0xEE, b"Adobe"), segment(0xE1, b"Exif\0\0" + little)), cmyk),
        ("png", png_with(png, chunk(b"eXIf", little)), png),
        ("png, behind", png_with(png, chunk(b"eXIf", little), behind=True), png),
        ("png, text", png_with(png, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))), png),
        ("png, beside large ICC", png_with(png, large, chunk(b"tEXt", b"x", sound=False), chunk(b"eXIf", little)), png),
        ("webp", webp_with(webp, riff_chunk(b"EXIF", little)), webp),
        ("webp, prefixed", webp_with(webp, riff_chunk(b"EXIF", b"Exif\0\0" + little)), webp),
        ("tiff", tiff_with(tiff, orientation(value), (0x8769, 4, 1, struct.pack("<I", 1 << 30))), tiff),
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "turn"), [
    (2, np.fliplr), (3, lambda p: np.rot90(p, 2)), (4, np.flipud), (5, lambda p: p.transpose(1, 0, 2)),
    (6, lambda p: np.rot90(p, -1)), (7, lambda p: np.rot90(p, 2).transpose(1, 0, 2)), (8, np.rot90),
])  # fmt: skip
def test_sound_exif_turns_an_image_on_its_way_into_a_shard(value: int, turn: Callable[[Pixels], Pixels]) -> None:
    """By numpy's own turns, within what encoding a turned image again changes."""
    for kind, odd, plain in sound_exif(value):
        photo = photo_from(odd)

        difference = np.abs(decode(photo.data).astype(int) - turn(decode(plain))).mean()
        assert (photo.height, photo.width) == turn(decode(plain)).shape[:2], kind
        assert difference < 10, kind  # of wrong turns it is 60 and more


def test_what_only_metadata_made_odd_is_kept_as_a_jpeg_and_not_encoded_again() -> None:
    odd = jpeg_with(PLAIN["jpeg"], segment(0xE2, b"ICC_PROFILE\0\3\2abc"))

    assert photo_from(odd).data == PLAIN["jpeg"]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damaged() -> Iterator[tuple[str, bytes]]:
    for name in ("png", "palette"):
        for start, kind, end in png_chunks(PLAIN[name]):
            if kind in (b"IHDR", b"PLTE", b"IDAT"):
                yield f"{name}: checksum of {kind.decode()}", flipped(PLAIN[name], end - 1)
                yield f"{name}: {kind.decode()}", flipped(PLAIN[name], start + 9)
    stored = png_with(encoded("PNG", compress_level=0), chunk(b"tEXt", b"x", sound=False))
    yield "png: a stored pixel", flipped(stored, len(stored) - 200)
    yield "png: transparency", png_with(PLAIN["png"], chunk(b"tRNS", bytes(6), sound=False))
    for name, data in PLAIN.items():
        if name not in ("gif", "bmp"):
            yield f"{name}: cut", data[: len(data) * 2 // 3]
    garbage = segment(0xE2, b"ICC_PROFILE\0\3\2abc")
    yield "jpeg: cut, with odd metadata", jpeg_with(PLAIN["jpeg"], garbage)[:-200]
    yield "png: cut, with odd metadata", png_with(PLAIN["png"], chunk(b"tEXt", b"x", sound=False))[:-100]
    for name in ("webp", "lossy"):
        yield f"{name}: cut, with odd metadata", webp_with(PLAIN[name][:-40], riff_chunk(b"EXIF", b""))
    yield "jpeg: metadata alone", PLAIN["jpeg"][:2] + garbage
    yield "png: metadata alone", PLAIN["png"][:8] + chunk(b"tEXt", b"k\0v")


DAMAGED = list(damaged())


@pytest.mark.parametrize(("kind", "data"), DAMAGED, ids=[kind for kind, _ in DAMAGED])
def test_damaged_pixels_stay_errors(kind: str, data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)
    with pytest.raises(CorruptImage):
        photo_from(data)


@pytest.mark.parametrize("name", ["jpeg", "cmyk", "png", "webp", "tiff", "avif"])
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_files_with_a_few_wrong_bytes_have_one_verdict(name: str, drawn: st.DataObject) -> None:
    """And no exception but the ones that are promised."""
    data = PLAIN[name]
    odd = bytearray(data[: drawn.draw(st.integers(0, len(data)) | st.just(len(data)))])
    for _ in range(drawn.draw(st.integers(0, 4)) if odd else 0):
        odd[drawn.draw(st.integers(0, min(len(odd), 700) - 1))] = drawn.draw(st.integers(0, 255))

    try:
        pixels: Pixels | None = decode(bytes(odd))
    except ValueError:
        pixels = None
    try:
        shard: Pixels | None = decode(photo_from(bytes(odd)).data)
    except CorruptImage:
        shard = None

    no_jpeg_holds_it = pixels is not None and max(pixels.shape) > LONGEST_JPEG_SIDE
    assert (shard is None) == (pixels is None or no_jpeg_holds_it)


def sampled(factors: tuple[int, ...], side: int = 96) -> bytes:
    """A gray JPEG of zeros, whose components have these sampling factors."""
    count = len(factors)
    units = math.prod(-(-side // (8 * max(f >> shift & 15 for f in factors))) for shift in (0, 4))
    bits = 2 * units * sum((f >> 4) * (f & 15) for f in factors)  # a code each for DC and AC of a block
    frame = b"".join(bytes([number, f, 0]) for number, f in enumerate(factors, 1))
    scan = b"".join(bytes([number, 0]) for number in range(1, count + 1))
    tables = segment(0xDB, b"\0" + b"\x01" * 64)
    tables += segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00" + b"\x10\x01" + bytes(15) + b"\x00")
    header = segment(0xC0, struct.pack(">BHHB", 8, side, side, count) + frame)
    pixels = bytes(bits // 8) + (bytes([0xFF >> bits % 8]) if bits % 8 else b"")
    return b"\xff\xd8" + tables + header + segment(0xDA, bytes([count]) + scan + b"\0\x3f\0") + pixels + b"\xff\xd9"


@pytest.mark.parametrize("first", [0x11, 0x22, 0x31, 0x13, 0x42, 0x24, 0x41])
def test_every_sampling_of_colours_has_one_verdict(first: int) -> None:
    """TurboJPEG has names for some."""
    data = sampled((first, 0x11, 0x11))

    assert other_formats.size_of(data) == (96, 96)
    assert np.ptp(decode(data)) == 0 and decode(data).shape == (96, 96, 3)
    assert photo_from(data).height == 96


@pytest.mark.parametrize("options", [{}, {"max_side": 32}, {"quality": 50}])
def test_damaged_jpegs_that_are_encoded_again_are_no_images_either(options: dict[str, int]) -> None:
    """PIL makes gray of what is missing, and says nothing."""
    turned = jpeg_with(PLAIN["jpeg"], segment(0xE1, b"Exif\0\0" + tiff_block(orientation(TURNED))))
    for sound in (PLAIN["cmyk"], turned, encoded("JPEG", "L")):
        photo_from(sound, Encoding(**options))
        scan = sound.rindex(b"\xff\xda")
        damaged = sound[: (scan + len(sound)) // 2] + b"\xff\xd9"

        with pytest.raises(CorruptImage):
            photo_from(damaged, Encoding(**options))
        with pytest.raises(ValueError):
            decode(damaged)


def test_gray_jpegs_that_are_encoded_again_stay_gray() -> None:
    turned = jpeg_with(encoded("JPEG", "L"), segment(0xE1, b"Exif\0\0" + tiff_block(orientation(TURNED))))

    assert Image.open(io.BytesIO(photo_from(turned).data)).mode == "L"


def test_a_bomb_stays_one_whatever_metadata_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    for odd in (
        png_with(PLAIN["png"], chunk(b"tEXt", b"x", sound=False)),
        webp_with(PLAIN["webp"], riff_chunk(b"EXIF", b"garbage!")),
        jpeg_with(PLAIN["jpeg"], segment(0xE2, b"ICC_PROFILE\0\3\2abc")),
    ):
        with pytest.raises(ValueError, match="more than PIL's limit"):
            decode(odd)
        with pytest.raises(CorruptImage, match="more than PIL's limit"):
            photo_from(odd)


def test_exif_of_many_segments_is_bounded() -> None:
    many = jpeg_with(PLAIN["jpeg"], segment(0xE1, b"Exif\0\0" + bytes(65000)) * 200)

    assert len(bare_image(many).exif) <= LARGEST_EXIF_BYTES + 65006


@pytest.mark.parametrize("name", ["png", "webp", "gif", "bmp", "cmyk"])
def test_files_without_metadata_are_left_alone(name: str) -> None:
    assert bare_image(PLAIN[name]).data == PLAIN[name]
