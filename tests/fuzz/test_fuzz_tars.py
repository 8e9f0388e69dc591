"""Tars from elsewhere: odd members, odd headers, and bytes that were changed on the way."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
from fuzzing import Fuzz
from hypothesis import strategies as st
from mutations import damaged, json_documents, texts
from pipeline_tars import ranged

from pipeline.access.places import Listed
from pipeline.errors import clipped
from pipeline.image.photo import CorruptImage
from pipeline.ingest.source import Tar
from pipeline.ingest.source_tars import LISTING_VERSION, TarListing, listing_of
from pipeline.shard.index import Skipped
from pipeline.shard.tar_samples import Measured, TarContents, read_samples
from pipeline.shard.tar_scan import TarFault, TarMember, scan_tar

Draw = Callable[[st.SearchStrategy[Any]], Any]

NAMES = (
    "0001.jpg",
    "0001.cls",
    "0001.json",
    "a/b.png",
    "a/b.seg.png",
    "A.JPG",
    "x.tar",
    "../x.jpg",
    "/x.jpg",
    "./._x.jpg",
    "__meta__.json",
    ".hidden.jpg",
    "dir/",
    "n" * 120 + ".jpg",
    "d/" * 60 + "x.webp",
    "caf\u00e9.jpg",
    "\udce9.jpg",
    "no-suffix",
)
KINDS = (
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_SPARSE,
    b"V",
    b"g",
    b"x",
    b"L",
    b"K",
    b"9",
)
PAX_KEYS = (
    "path",
    "size",
    "linkpath",
    "mtime",
    "comment",
    "GNU.sparse.map",
    "GNU.sparse.major",
    "GNU.sparse.realsize",
    "hdrcharset",
)
contents = st.one_of(st.binary(max_size=40), st.sampled_from((b"", b"7", b"-1", b"cat", b'{"label": 3}', b"x" * 513)))
names = st.one_of(st.sampled_from(NAMES), texts.map(lambda text: f"{text}.jpg"))


@st.composite
def members(draw: Draw) -> tuple[tarfile.TarInfo, bytes]:
    """A member, its header and content."""
    info = tarfile.TarInfo(draw(names))
    info.type = draw(st.sampled_from(KINDS))
    data = draw(contents)
    info.size = len(data)
    info.linkname = draw(st.sampled_from(("", "0001.jpg", "/etc/passwd", "../x")))
    info.mtime = draw(st.sampled_from((0, 2**33, 1.5)))
    if draw(st.booleans()):
        info.pax_headers = draw(
            st.dictionaries(
                st.sampled_from(PAX_KEYS), st.sampled_from(("", "0", "-1", "5", "x.jpg", "1,2", str(2**70))), max_size=2
            )
        )
    return info, data


@st.composite
def tars(draw: Draw) -> bytes:
    """Some members, as one of three writers puts them together; some are bare."""
    output = io.BytesIO()
    form = draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)))
    with tarfile.open(fileobj=output, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in draw(st.lists(members(), max_size=5)):
            try:
                header = info.tobuf(form, "utf-8", "surrogateescape")
            except (ValueError, UnicodeError):  # what this format cannot say
                continue
            tar.fileobj.write(header + data + bytes(-len(data) % 512))  # type: ignore[union-attr]
            tar.offset += len(header) + len(data) + -len(data) % 512
    return output.getvalue()


@st.composite
def resealed(draw: Draw, data: bytes) -> bytes:
    """A tar with bytes of a header changed, and a checksum that fits."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        block = 512 * draw(st.integers(0, max(0, len(changed) // 512 - 1)))
        place = block + draw(
            st.sampled_from((0, 99, 100, 124, 125, 134, 135, 136, 156, 157, 257, 263, 345, 386, 482, 483, 499, 504))
        )
        piece = draw(
            st.one_of(
                st.binary(min_size=1, max_size=12),
                st.sampled_from((b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"0" * 12, b"-1\0")),
            )
        )
        changed[place : place + len(piece)] = piece
        header = changed[block : block + 512]
        header[148:156] = b" " * 8
        changed[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    return bytes(changed[: len(data)])


@st.composite
def odd_tars(draw: Draw) -> bytes:
    """Tars that are whole, damaged, or lie."""
    data = draw(tars())
    kind = draw(st.sampled_from(("whole", "damaged", "resealed", "twice")))
    if kind == "damaged":
        return draw(damaged(data))
    if kind == "twice":
        return data + draw(tars())
    return draw(resealed(data)) if kind == "resealed" and data else data


def measured(data: bytes) -> Measured:
    if not data:
        raise CorruptImage("it is empty")
    return Measured(len(data), 1, 1)


def check_contents(found: TarContents, data: bytes) -> None:
    """Every image lies in the tar, apart from all others; every fault has a place."""
    end = 0
    for image in found.images:
        assert end < image.offset <= image.offset + image.length <= len(data)
        end = image.offset
        assert image.label is None or 0 <= image.label < 2**63
        assert image.measured is None or image.measured.crc == image.length
        assert ".." not in image.member.split("/") and not image.member.startswith("/")
        assert image.member.isprintable() or image.member.encode("utf-8", "surrogateescape")
    for fault in found.faults:
        assert 0 <= fault.offset <= len(data)
    for skipped in found.skipped:
        assert skipped.reason


def test_a_tar_gives_images_that_lie_in_it(fuzz: Fuzz) -> None:
    def tar_bytes(data: bytes) -> None:
        for salvage in (True, False):
            with ranged(data) as file:
                found = read_samples(file, salvage=salvage, measure=measured)
            check_contents(found, data)
        listing = listing_of(Tar(Listed("x.tar"), len(data)), found)
        again = TarListing.from_bytes(listing.to_bytes())
        assert (again.tar, again.skipped, again.faults) == (listing.tar, listing.skipped, listing.faults)
        assert [again.folders[place] for place in again.places] == [listing.folders[place] for place in listing.places]

    fuzz(tar_bytes, odd_tars(), batch=80)


def test_members_of_a_whole_tar_are_those_that_tarfile_finds(fuzz: Fuzz) -> None:
    def tar_members(data: bytes) -> None:
        with ranged(data) as file:
            found = list(scan_tar(file))
        if any(isinstance(item, TarFault) for item in found):
            return
        try:
            with tarfile.open(fileobj=io.BytesIO(data), errorlevel=2, encoding="utf-8") as tar:
                expected = tar.getmembers()
        except (tarfile.TarError, ValueError, OverflowError):
            return  # of what tarfile refuses the test above says enough
        ours = [
            (item.name, item.data_offset, item.size)
            for item in found
            if isinstance(item, TarMember) and not item.obstacle
        ]
        wanted = [
            (member.name, member.offset_data, member.size)
            for member in expected
            if member.isreg() and not member.issparse() and _is_plain(member)
        ]
        assert ours == wanted

    fuzz(tar_members, odd_tars(), batch=80)


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member's name leads nowhere, by the words of the documentation."""
    name = member.name
    size = len(name.encode("utf-8", "surrogateescape"))
    return "\0" not in name and not name.startswith("/") and ".." not in name.split("/") and size <= 1024


LISTING = {
    "version": LISTING_VERSION,
    "tar": ["x.tar", 10240],
    "skipped": [["x.tar: a.jpg", "empty"]],
    "faults": [[512, "damaged"]],
    "bad_labels": 0,
}


@st.composite
def listings(draw: Draw) -> bytes:
    """The listing that an earlier ingest kept of a tar, as a stranger may have left it."""
    output = io.BytesIO()
    arrays: dict[str, Any] = {
        name: np.array(
            [draw(st.integers(-1, 2**62))] * draw(st.integers(0, 2)),
            draw(st.sampled_from(("<i8", "<i8", "<f4", "S3", "<U2"))),
        )
        for name in ("offsets", "lengths", "labels")
        if draw(st.integers(0, 9))
    }
    arrays["header"] = np.frombuffer(draw(json_documents(LISTING)), np.uint8)
    np.savez_compressed(output, **arrays)
    data = output.getvalue()
    return draw(damaged(data)) if draw(st.booleans()) else data


def test_a_kept_listing_is_one_or_is_made_again(fuzz: Fuzz) -> None:
    def tar_listings(data: bytes) -> None:
        try:
            found = TarListing.from_bytes(data)
        except ValueError:  # the tar is scanned again
            return
        assert isinstance(found.tar, Tar) and isinstance(found.tar.path, Listed) and type(found.tar.size_bytes) is int
        for column in (found.offsets, found.lengths, found.labels):
            assert column.dtype == np.dtype("<i8") and column.shape == (len(found),)
        assert all(
            isinstance(item, Skipped) and isinstance(item.path, str) and isinstance(item.reason, str)
            for item in found.skipped
        )
        assert all(type(fault.offset) is int and isinstance(fault.what, str) for fault in found.faults)
        assert json.dumps(found.bad_labels) and clipped(str(found.tar.path))

    fuzz(tar_listings, listings(), batch=100)
