from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import webdataset
from pipeline_tars import ranged, tar_bytes

from pipeline.shard.tar_scan import RangedFile, TarFault, TarMember, scan_tar

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder-of-thirty-characters-12/" * 6
RNG = np.random.default_rng(0)
MEMBERS = [(f"{LONG if n % 3 else ''}{n:03d}.jpg", RNG.bytes(2500 * n + 1)) for n in range(12)]


def members(data: bytes, *, salvage: bool = True) -> tuple[list[TarMember], list[TarFault]]:
    items = list(scan_tar(ranged(data), salvage=salvage))
    found = [item for item in items if isinstance(item, TarMember)]
    return found, [item for item in items if isinstance(item, TarFault)]


@pytest.mark.parametrize("form", FORMS)
def test_every_member_is_found_where_it_lies(form: str) -> None:
    data = tar_bytes([(f"é{name}", content) for name, content in MEMBERS], FORMS[form])

    found, faults = members(data)

    assert faults == []
    assert [(item.name, data[item.data_offset : item.data_offset + item.size]) for item in found] == [
        (f"é{name}", content) for name, content in MEMBERS
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [0, 1, 5, 11])
@pytest.mark.parametrize("byte", [0, 130, 150, 300])
def test_a_damaged_header_is_named_with_its_offset_and_costs_one_member(form: str, number: int, byte: int) -> None:
    data = bytearray(tar_bytes(MEMBERS, FORMS[form]))
    good, _ = members(bytes(data))
    header = good[number].data_offset - 512
    data[header + byte] ^= 0x55

    found, faults = members(bytes(data))

    assert [fault.offset for fault in faults] == [good[number].offset]
    assert found == [item for place, item in enumerate(good) if place != number]
    assert members(bytes(data), salvage=False) == (good[:number], faults)


def test_webdataset_loses_what_is_reported_here() -> None:
    data = bytearray(tar_bytes(MEMBERS))
    data[members(bytes(data))[0][5].offset] ^= 0x55

    seen = list(webdataset.tariterators.tar_file_iterator(io.BytesIO(bytes(data))))

    assert len(seen) == 5
    assert len(members(bytes(data))[1]) == 1


def test_a_header_of_zeros_is_not_taken_for_the_end() -> None:
    data = bytearray(tar_bytes(MEMBERS[::3]))
    good, _ = members(bytes(data))
    data[good[1].offset : good[1].offset + 512] = bytes(512)

    found, faults = members(bytes(data))

    assert [fault.offset for fault in faults] == [good[1].offset]
    assert found == [good[0], *good[2:]]


def test_tars_written_one_behind_the_other_are_reported_and_all_found() -> None:
    first, second = tar_bytes(MEMBERS[:3]), tar_bytes(MEMBERS[3:])

    found, faults = members(first + second)

    assert [item.name for item in found] == [name for name, _ in MEMBERS]
    assert len(faults) == 1 and f"more follows at byte {len(first)}" in faults[0].what


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_is_reported_and_what_lies_before_is_found(form: str) -> None:
    data = tar_bytes(MEMBERS[:5], FORMS[form])
    good, _ = members(data)
    end = good[-1].data_offset + -(-good[-1].size // 512) * 512
    for cut in [0, 1, 511, 512, *range(700, end, 977), end - 1, end, end + 100]:
        found, faults = members(data[:cut])

        assert len(faults) == 1, cut
        assert faults[0].offset <= cut
        assert found == [item for item in good if item.data_offset + item.size <= cut]


def test_what_is_no_tar_is_reported() -> None:
    found, faults = members(b"this is no tar" * 100)

    assert found == []
    assert faults[0].offset == 0


def test_folders_and_pipes_are_ignored() -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"a{kind!r}")
            member.type, member.linkname = kind, "b"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("b"))

    assert [item.name for item in members(output.getvalue())[0]] == ["b"]
    assert members(output.getvalue())[1] == []


def test_only_a_few_chunks_are_held_and_each_is_read_once() -> None:
    data = tar_bytes(MEMBERS)
    reads: list[int] = []
    lock = threading.Lock()

    def read(offset: int, length: int) -> bytes:
        with lock:
            reads.append(offset)
        return data[offset : offset + length]

    with RangedFile(read, len(data), 4096) as file:
        for item in scan_tar(file):
            assert isinstance(item, TarMember)
            file.seek(item.data_offset)
            assert len(file.read(item.size)) == item.size
            assert len(file._chunks) <= 3

    assert sorted(reads) == list(range(0, len(data), 4096))


def test_large_members_that_are_not_read_are_not_fetched() -> None:
    data = tar_bytes([("a.mp4", bytes(10**6)), ("b.jpg", b"1"), ("c.mp4", bytes(10**6)), ("d.jpg", b"2")])
    fetched = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal fetched
        fetched += length
        return data[offset : offset + length]

    with RangedFile(read, len(data), 10_240) as file:
        assert len(list(scan_tar(file))) == 4
    assert fetched < 120_000


def test_a_file_that_became_shorter_is_cut_off() -> None:
    data = tar_bytes(MEMBERS)
    with RangedFile(lambda offset, length: data[: len(data) // 2][offset : offset + length], len(data), 4096) as file:
        items = list(scan_tar(file))

    assert any(isinstance(item, TarFault) for item in items)


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_member_is_reported_and_what_follows_it_is_found(form: str, tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"1")
        file.truncate(10 << 20)
    (tmp_path / "b.jpg").write_bytes(b"2")
    made = tmp_path / "made.tar"
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", made, "-C", tmp_path, "a.jpg", "b.jpg"], check=True)

    found, faults = members(made.read_bytes())

    assert faults == []
    assert [(item.name, item.obstacle) for item in found] == [("a.jpg", "it is stored as a sparse file"), ("b.jpg", "")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_reported(kind: bytes) -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = kind, "a.jpg"
        tar.addfile(link)

    (found,), faults = members(output.getvalue())

    assert faults == []
    assert found.obstacle == "it is a link to a.jpg"


@pytest.mark.parametrize(("packer", "name"), [(gzip, "gzip"), (bz2, "bzip2"), (lzma, "xz")])
def test_a_compressed_tar_is_called_that(packer: ModuleType, name: str) -> None:
    _, faults = members(packer.compress(tar_bytes(MEMBERS)), salvage=False)

    assert faults == [TarFault(0, f"it is compressed by {name}; unpack it first")]


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (b"", "it is empty", "again"),
        (b"<html>404</html>", "a page (HTML or XML)", "download it again"),
        (
            b"\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "a page (HTML or XML)",
            "download it again",
        ),
        (b'{"error": "not found"}', "it is JSON", "download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
            "a pointer of Git LFS",
            "git lfs pull",
        ),
        (b"/annex/objects/SHA256E-s12--abc.tar\n", "a pointer of git-annex", "git annex get"),
        (b"\x89PNG\r\n\x1a\n" + bytes(600), "it is an image", ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_tar_is_called_what_it_is(data: bytes, what: str, remedy: str) -> None:
    found, (fault, *_) = members(data)

    assert found == []
    assert fault.offset == 0 and what in fault.what and remedy in fault.what
