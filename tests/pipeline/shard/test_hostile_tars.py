"""Tars, and names of tars, made to do harm: each is a fault, in time and memory that fit its bytes."""

from __future__ import annotations

import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_tars import ranged, tar_bytes

from pipeline.access.places import Listed
from pipeline.errors import SourceError
from pipeline.ingest.braces import MOST_NAMES, expanded
from pipeline.ingest.index_tar import IndexTask, index_tar
from pipeline.ingest.source import Tar, Tars
from pipeline.ingest.source_tars import matching_tars
from pipeline.ingest.sources import find_sources
from pipeline.shard.index import ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.tar_headers import LARGEST_NAME_BYTES, MOST_EXTENDED_HEADERS
from pipeline.shard.tar_samples import TarContents, read_samples
from pipeline.shard.tar_scan import MOST_FAULTS, RangedFile, TarFault, scan_tar
from pipeline.shard.verify import verify_shard
from pipeline.store.storage import Storage

pytestmark = pytest.mark.timeout(60)  # some of these were endless

MakeJpeg = Callable[..., bytes]
END = bytes(1024)
PAX, GLOBAL, LONG_NAME = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, *, raw_size: bytes = b"") -> bytes:
    """One block; `raw_size` goes into the field of the size as it is."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124 : 124 + len(raw_size)] = raw_size
    return signed(block)


def signed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes = b"1") -> bytes:
    return header(name, len(data)) + padded(data)


def extended(kind: bytes, data: bytes) -> bytes:
    return header("PaxHeader", len(data), kind) + padded(data)


def record(key: str, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key.encode(), value)
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def pax(**values: bytes) -> bytes:
    return extended(PAX, b"".join(record(key.replace("__", "."), value) for key, value in values.items()))


def contents(*parts: bytes) -> TarContents:
    with ranged(b"".join(parts), chunk_bytes=1 << 20) as file:
        return read_samples(file, salvage=True)


def found_names(found: TarContents) -> list[str]:
    return [image.member for image in found.images]


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def base_256(number: int) -> bytes:
    return (b"\xff" if number < 0 else b"\x80") + (number % 2**88).to_bytes(11, "big")


# Sizes


@pytest.mark.parametrize(
    "broken",
    [
        header("b.txt", raw_size=b"-0000001000\0"),
        header("b.txt", raw_size=base_256(-512)),
        header("b.txt", raw_size=base_256(2**80)),
        header("b.txt", kind=LONG_NAME, raw_size=base_256(-512)),
        pax(size=b"-1536") + header("b.txt"),
        pax(GNU__sparse__realsize=b"-1536") + header("b.txt"),
        pax(size=b"9" * 400) + header("b.txt"),
        pax(size=b"0" * 20 + b"9" * 400) + header("b.txt"),
        pax(size=b"1_0") + header("b.txt"),
    ],
)
def test_a_size_that_cannot_be_is_a_fault_and_never_leads_back(broken: bytes) -> None:
    before = member("a.jpg")

    found = contents(before, broken, member("c.jpg"), END)

    (fault,) = found.faults
    assert fault.offset == len(before)
    assert "damaged header (a " in fault.what and len(fault.what) < 400
    assert found_names(found) == ["a.jpg", "c.jpg"]


def test_sizes_of_large_members_are_still_read() -> None:
    large = header("a.bin", raw_size=base_256(1 << 34))
    ((fault),) = contents(large, END).faults

    assert f"a.bin is cut off, {(1 << 34) - 1024} bytes are missing" in fault.what
    assert found_names(contents(pax(size=b"600") + header("a.jpg"), bytes(1024), member("b.jpg"), END)) == [
        "a.jpg",
        "b.jpg",
    ]


# Headers before a member


@pytest.mark.parametrize(
    "data",
    [
        b"1" * 200_000,
        b"2 " * 100_000 + b"=",
        b"5 a=\n" + b"0 b=\n",
        b"6 a=12\n",
        b"7 a=12 ",
        b"900 a=1\n",
        b"5 abc\n",
        b"5 =a\n",
        b"+6 a=1\n",
        b"99999999999999999999999 a=1\n",
        "٦ a=1\n".encode(),
    ],
)
def test_pax_records_that_are_none_are_a_fault_at_once(data: bytes) -> None:
    before = member("a.jpg")
    began = time.process_time()

    peak = peak_bytes(lambda: contents(before, extended(PAX, data), member("b.jpg"), END))

    found = contents(before, extended(PAX, data), member("b.jpg"), END)
    assert time.process_time() - began < 5
    assert peak < 8 << 20
    assert [fault.offset for fault in found.faults] == [len(before)]
    assert "a pax record that is none" in found.faults[0].what and len(found.faults[0].what) < 400
    assert found_names(found) == ["a.jpg", "b.jpg"]


def test_a_good_record_of_digits_takes_no_time() -> None:
    """`tarfile` looks for `[0-9]+ hdrcharset=` in all of it, from each digit on."""
    data = record("comment", b"1" * 200_000) + record("path", b"c.jpg")
    began = time.process_time()

    found = contents(extended(PAX, data), member("b.jpg"), END)

    assert time.process_time() - began < 5
    assert found_names(found) == ["c.jpg"]


@pytest.mark.parametrize("charset", [b"BINARY", b"ISO-IR 10646 2000 UTF-8"])
def test_names_of_honest_pax_headers_are_still_read(charset: bytes) -> None:
    name = "é".encode() if charset != b"BINARY" else b"\xe9"
    records = record("hdrcharset", charset) + record("mtime", b"1.5") + record("path", name + b".jpg") + bytes(7)

    (image,) = contents(extended(GLOBAL, record("comment", b"x" * 5000)), extended(PAX, records), member("z")).images

    assert image.member.encode("utf-8", "surrogateescape") == name + b".jpg"


def test_a_global_header_of_many_keys_is_not_scanned_for_every_member() -> None:
    keys = b"".join(record(f"k{number:06d}", b"") for number in range(70_000))
    members = [pax(path=b"%d.jpg" % number) + member("z") for number in range(1500)]
    began = time.process_time()

    found = contents(extended(GLOBAL, keys), *members, END)

    assert time.process_time() - began < 5
    assert len(found.images) == 1500 and found.faults == []


def test_a_global_header_gives_no_long_name_to_every_member() -> None:
    found = contents(extended(GLOBAL, record("path", b"/" * 100_000)), member("a.jpg"), END)

    assert "a global pax header with a name of more than" in found.faults[0].what
    assert found_names(found) == ["a.jpg"]


@pytest.mark.parametrize("link", [extended(LONG_NAME, b"long.jpg\0"), pax(path=b"p.jpg"), extended(GLOBAL, b"")])
def test_a_long_chain_of_headers_is_a_fault(link: bytes) -> None:
    found = contents(link * 3000, member("a.jpg"), END)

    assert f"more than {MOST_EXTENDED_HEADERS} extended headers before one member" in found.faults[0].what
    assert len(found.images) == 1
    assert len(found.faults) < 3000 / MOST_EXTENDED_HEADERS


def test_a_few_headers_before_a_member_are_none() -> None:
    chain = extended(GLOBAL, record("comment", b"x")) + pax(mtime=b"1.5") + extended(LONG_NAME, b"long.jpg\0")

    found = contents(*[chain + member("z"), member("y.jpg")] * 20, END)

    assert found.faults == []
    assert found_names(found) == ["long.jpg", "y.jpg"]


# Sparse files


def sparse(blocks: int) -> bytes:
    """Of old GNU tar, with a map of that many blocks behind the header."""
    head = bytearray(header("s.jpg", kind=tarfile.GNUTYPE_SPARSE))
    head[482:495] = b"\x0100000001000\0"
    block = bytearray(b"00000000001\x0000000000001\x00" * 21 + bytes(8))
    return signed(head) + (bytes(block[:504]) + b"\x01" + bytes(7)) * (blocks - 1) + bytes(block)


def newest_sparse(holes: int) -> bytes:
    data = b"%d\n" % holes + b"0\n" * 2 * holes
    keys = {"major": b"1", "minor": b"0", "name": b"s.jpg", "realsize": b"5"}
    head = b"".join(record(f"GNU.sparse.{key}", value) for key, value in keys.items())
    return extended(PAX, head) + member("z", data)


@pytest.mark.parametrize(
    "made",
    [
        sparse(4000),
        newest_sparse(500_000),
        pax(GNU__sparse__map=b"1,1," * 100_000 + b"x", path=b"s.jpg") + header("z"),
        pax(GNU__sparse__size=b"5", path=b"s.jpg", comment=b"1" * 100_000) + header("z"),
    ],
    ids=["old", "1.0", "0.1", "0.0"],
)
def test_the_map_of_a_sparse_file_is_not_taken_into_memory(made: bytes) -> None:
    def scan() -> TarContents:
        with ranged(made + member("b.jpg") + END, chunk_bytes=1 << 18) as file:
            return read_samples(file, salvage=False)

    assert peak_bytes(scan) < 4 << 20
    assert (found_names(scan()), scan().faults) == (["b.jpg"], [])
    assert [item.reason for item in scan().skipped] == ["it is stored as a sparse file"]


def test_a_map_that_is_cut_off_is_a_fault() -> None:
    (fault,) = contents(sparse(5)[:-1024]).faults

    assert "the map of a sparse file is cut off" in fault.what


# Names and labels


@pytest.mark.parametrize("length", [LARGEST_NAME_BYTES + 1, 65_000, 70_000])
def test_an_image_with_a_long_name_is_skipped_and_its_name_not_quoted_whole(length: int) -> None:
    good = "n" * (LARGEST_NAME_BYTES - 4) + ".jpg"
    long = b"n" * (length - 4) + b".jpg"

    found = contents(pax(path=good.encode()), member("z"), pax(path=long), member("z"), END)

    assert found_names(found) == [good]
    (skipped,) = found.skipped
    assert skipped.reason == f"its name has {length} bytes, more than {LARGEST_NAME_BYTES}"
    assert skipped.path.startswith("nnn") and "... at byte" in skipped.path and len(skipped.path) < 300


def test_names_are_quoted_in_part_where_they_are_long() -> None:
    link = header("a.jpg", kind=tarfile.SYMTYPE)
    found = contents(pax(linkpath=b"l" * 5000), link, pax(path=b"c" * 5000), header("z", 10**6), END)

    assert len(found.skipped[0].reason) < 300
    assert "... is cut off" in found.faults[0].what and len(found.faults[0].what) < 300


@pytest.mark.parametrize("name", [b"a\0.jpg", b"a\0b.jpg", b"a.jpg\0.jpg"])
def test_an_image_with_a_nul_in_its_name_is_skipped(name: bytes) -> None:
    """An index pads names with NUL, so that it would have another name there."""
    found = contents(pax(path=name), member("z"), END)

    assert found.images == []
    assert found.skipped[0].reason == "its name has a NUL in it"


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 100_000])
def test_json_without_end_is_no_label(data: bytes) -> None:
    found = contents(member("a.jpg"), member("a.json", data), END)

    assert [image.label for image in found.images] == [None]
    assert found.bad_labels == 1


@pytest.mark.parametrize("text", ["1_0", "+5", "٣", "1 0", "9" * 5000, "0x1", "1.0", "\0" + "1"])
def test_what_python_alone_takes_for_a_number_is_no_label(text: str) -> None:
    found = contents(member("a.jpg"), member("a.cls", text.encode()), END)

    assert [image.label for image in found.images] == [None]
    assert found.bad_labels == 1


def test_a_list_has_labels_of_plain_digits_that_an_index_can_hold(tmp_path: Path) -> None:
    (tmp_path / "huge.txt").write_text("a.jpg\t" + "9" * 5000)
    (tmp_path / "arabic.txt").write_text("a.jpg\t٣\n", encoding="utf-8")

    with pytest.raises(SourceError, match="label in line 1: must be at most 9223372036854775807") as caught:
        find_sources(Storage(), str(tmp_path / "huge.txt"))
    assert len(str(caught.value)) < 400
    with pytest.raises(SourceError, match="label in line 1: must be an integer of at least 0, or a name, got '٣'"):
        find_sources(Storage(), str(tmp_path / "arabic.txt"))


# Many faults


def test_a_tar_that_is_all_damage_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shard.tar_scan.MOST_FAULTS", 50)
    places = [header(f"{number}.txt") + b"\x01" * 512 for number in range(1000)]

    found = contents(member("a.jpg"), *places, member("b.jpg"), END)

    assert len(found.faults) == 51
    assert "more than 50 damaged places; the rest was not looked at" in found.faults[-1].what
    assert found_names(found) == ["a.jpg"]
    assert MOST_FAULTS == 100_000


@pytest.mark.parametrize("kind", ["sparse", "pax", "chain"])
def test_no_byte_is_scanned_again_for_every_header_that_claims_it(kind: str) -> None:
    """Each block is a header that claims the blocks behind it, with a fault at the end."""
    head = bytearray(header("5 a=\n" * 15, 1 << 19, PAX if kind == "pax" else LONG_NAME))
    if kind == "sparse":
        head[156:157], head[482], head[504] = tarfile.GNUTYPE_SPARSE, 1, 1
    data = signed(head) * 2000 + b"\x01" * 512
    taken = 0

    class Counting(RangedFile):
        def read(self, size: int = -1) -> bytes:
            nonlocal taken
            piece = super().read(size)
            taken += len(piece)
            return piece

    with Counting(lambda offset, length: data[offset : offset + length], len(data)) as file:
        assert any(isinstance(item, TarFault) for item in scan_tar(file))
    assert taken < 3 * len(data)


def test_the_beginning_is_not_read_again_at_every_fault() -> None:
    data = b"".join([member("a.jpg"), *[header(f"{n}.txt") + b"\x01" * 512 for n in range(100)], END])
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        return data[offset : offset + length]

    with RangedFile(read, len(data), 4096) as file:
        assert sum(isinstance(item, TarFault) for item in scan_tar(file)) == 100
    assert sorted(reads) == list(range(0, len(data), 4096))


def test_what_was_salvaged_of_a_hostile_tar_verifies(
    tmp_path: Path, jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.shard.tar_scan.MOST_FAULTS", 5)
    parts = [member("a.jpg", jpeg(1)), member("a.cls", b"3"), pax(path=b"b\0.jpg"), member("z", jpeg(2))]
    parts += [header("x.txt") + b"\x01" * 512] * 20 + [member("c.jpg", jpeg(3)), END]
    (tmp_path / "t.tar").write_bytes(b"".join(parts))
    task = IndexTask(str(tmp_path), Tar(Listed("t.tar"), len(b"".join(parts))), deep=False, salvage=True)

    report = index_tar(Storage(), str(tmp_path), task).report

    assert report is not None and report.samples == 1
    verdict = verify_shard(Storage(), str(tmp_path), report.entry, deep=True)
    assert verdict.faults == ()
    assert ShardIndex.from_bytes((tmp_path / "t.index").read_bytes(), "t").table["label"].tolist() == [3]


# Names of tars


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_a_tar_whose_name_is_no_text_is_refused_before_it_is_read(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.jpg", b"1")]))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar")).write_bytes(tar_bytes([("a.jpg", b"1")]))

    with pytest.raises(SourceError, match="must have a name in UTF-8") as caught:
        find_sources(Storage(), str(tmp_path / pattern))
    assert "udcff.tar" in str(caught.value) and str(caught.value).isascii()


@pytest.mark.parametrize(
    "pattern",
    [
        "/tmp/x/{0..99999999999}.tar",
        "/tmp/x/{1..1" + "0" * 400 + "}.tar",
        "/tmp/x/{0..1..9" + "9" * 5000 + "}.tar",
        "/tmp/x/" + "{0..9}" * 9 + ".tar",
        "/tmp/x/" + "{a..z}" * 5 + ".tar",
        "/tmp/x/{" + "{a,b}" * 60 + "}.tar",
        "http://127.0.0.1:1/{0..99999999}.tar",
    ],
)
def test_braces_of_too_many_names_are_refused_before_one_is_made(pattern: str) -> None:
    with pytest.raises(SourceError, match=f"must stand for at most {MOST_NAMES} names") as caught:
        matching_tars(Storage(), pattern)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("pattern", ["/tmp/x/{0..9.tar", "/tmp/x/{a}}{.tar", "/tmp/x/" + "{" * 5000 + "}" * 5000])
def test_braces_that_do_not_match_or_go_too_deep_are_refused(pattern: str) -> None:
    with pytest.raises(SourceError, match=r"must have braces in pairs|must nest braces at most 10 deep"):
        matching_tars(Storage(), pattern)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("{00..99}{00..99}", 10**4), ("a{0..9..3}{b,c{1..2}}", 12), (r"a\{0..9\}", 1), ("{c..a}{}", 3)],
)
def test_braces_of_many_names_are_fine(pattern: str, count: int) -> None:
    assert sum(1 for _ in expanded(pattern)) == count
    assert next(expanded("{000..999}{000..999}")) == "000000"  # as many as there may be


def test_a_manifest_is_still_written_of_names_that_are_not_ascii(tmp_path: Path, jpeg: MakeJpeg) -> None:
    (tmp_path / "é.tar").write_bytes(tar_bytes([("a.jpg", jpeg(1))]))
    found = find_sources(Storage(), str(tmp_path))
    assert isinstance(found, Tars)
    task = IndexTask(found.root, found.tars[0], deep=False, salvage=False)

    report = index_tar(Storage(), str(tmp_path), task).report

    assert report is not None
    assert Manifest.of([task], [report], ()).samples == 1
