"""Data made to do harm: each ends in a clear refusal, in bounded memory, and nothing is unpacked."""

from __future__ import annotations

import ast
import io
import json
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import simplejpeg
from pipeline_tars import ranged, tar_bytes

from pipeline.errors import DatasetError
from pipeline.image.decode import decode
from pipeline.image.photo import CorruptImage, photo_from
from pipeline.shard.manifest import Manifest
from pipeline.shard.tar_headers import LARGEST_HEADER_BYTES
from pipeline.shard.tar_samples import MOST_SKIPPED, TarContents, read_samples
from pipeline.shard.tar_scan import RangedFile
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]
ROOT = Path(__file__).parents[3]


def contents(data: bytes) -> TarContents:
    with ranged(data, chunk_bytes=1 << 20) as file:
        return read_samples(file, salvage=True)


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Most bytes that Python held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


# Tars


@pytest.mark.parametrize("name", ["../../etc/cron.d/x.jpg", "/etc/x.jpg", "a/../../x.jpg", "a/.."])
def test_names_that_lead_out_of_the_tar_are_refused(name: str, jpeg: MakeJpeg) -> None:
    found = contents(tar_bytes([(name, jpeg(1)), ("good.jpg", jpeg(1))]))

    assert [image.member for image in found.images] == ["good.jpg"]
    if name.endswith(".jpg"):
        (skipped,) = found.skipped
        assert "leads out of the folder" in skipped.reason


def test_two_dots_within_a_name_are_fine(jpeg: MakeJpeg) -> None:
    found = contents(tar_bytes([("a..b/c.jpg", jpeg(1))]))

    assert [image.member for image in found.images] == ["a..b/c.jpg"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_is_not_followed(kind: bytes) -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        link = tarfile.TarInfo("secret.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)

    found = contents(output.getvalue())

    assert found.images == []
    assert "it is a link to /etc/passwd" in found.skipped[0].reason


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_extended_header_is_refused_before_it_is_read(
    kind: bytes, peak: Callable[[], int], jpeg: MakeJpeg
) -> None:
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = kind, 1 << 30
    block = header.tobuf(tarfile.USTAR_FORMAT)

    def read(offset: int, length: int) -> bytes:
        return block[offset : offset + length].ljust(length, b"x")  # a gigabyte of x

    with RangedFile(read, 1 << 30, chunk_bytes=1 << 20) as file:
        found = read_samples(file, salvage=False)

    (fault,) = found.faults
    assert f"more than {LARGEST_HEADER_BYTES}" in fault.what
    assert peak() < 32 << 20


def test_long_names_of_honest_tars_are_still_read(jpeg: MakeJpeg) -> None:
    name = "/".join(["folder" * 10] * 8) + "/x.jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert [image.member for image in contents(tar_bytes([(name, jpeg(1))], form)).images] == [name]


def empty_members(count: int, suffix: str) -> RangedFile:
    """A tar of `count` empty members that is made while it is read: half a kilobyte each."""

    def header(number: int) -> bytes:
        return tarfile.TarInfo(f"{number:08d}{suffix}").tobuf(tarfile.USTAR_FORMAT)

    def read(offset: int, length: int) -> bytes:
        first, last = offset // 512, -(-(offset + length) // 512)
        blocks = b"".join(header(number) if number < count else bytes(512) for number in range(first, last))
        return blocks[offset - 512 * first :][:length]

    return RangedFile(read, 512 * (count + 2), chunk_bytes=1 << 16)


def test_a_million_empty_images_are_given_up_early(peak: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shard.tar_samples.MOST_SKIPPED", 500)

    def refuse(data: bytes) -> Any:
        raise CorruptImage("it is empty")

    with empty_members(10**6, ".jpg") as file:
        found = read_samples(file, salvage=True, measure=refuse)

    assert found.images == []
    assert "more than 500 of its images cannot be used" in found.faults[-1].what
    assert peak() < 64 << 20
    assert MOST_SKIPPED == 100_000


@pytest.mark.slow
def test_a_million_empty_members_of_no_meaning_take_no_memory(peak: Callable[[], int]) -> None:
    with empty_members(10**6, ".txt") as file:
        found = read_samples(file, salvage=True)

    assert (found.images, found.faults) == ([], [])
    assert peak() < 64 << 20


# Images


def bomb(side: int) -> bytes:
    """A JPEG of some hundred bytes whose header says that it is `side` pixels wide and high."""
    small = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))
    frame = small.find(b"\xff\xc0")
    small[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(small)


def test_a_dimension_bomb_is_refused_before_memory_is_asked_for() -> None:
    """12.9 GB, from 700 bytes."""
    with pytest.raises(ValueError, match="65500 x 65500 pixels are more than"):
        decode(bomb(65500))
    with pytest.raises(CorruptImage, match="65500 x 65500 pixels are more than"):
        photo_from(bomb(65500))


def test_an_image_of_honest_size_is_decoded(jpeg: MakeJpeg) -> None:
    assert decode(jpeg(1, 300, 200)).shape == (300, 200, 3)


# Manifests


def manifest(folder: Path, **changes: Any) -> str:
    """A dataset of one shard whose manifest was changed, with a checksum that fits."""
    shards: dict[str, Any] = {
        "name": ["shard-000000"],
        "samples": [1],
        "tar_bytes": [1024],
        "index_sha256": ["0" * 64],
        "key_bytes": [8],
        "extension_bytes": [3],
    }
    shards |= changes
    fields = {"format_version": 2, "sources_digest": "x", "classes": [], "skipped": 0, "shards": shards}
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    data = body[:-1] + b',"crc32c":"%08x"}' % google_crc32c.value(body)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    return str(folder)


def test_the_manifest_that_the_others_change_is_a_good_one(tmp_path: Path) -> None:
    assert Manifest.load(Storage(), manifest(tmp_path)).samples == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ["../../secrets/shard"]},
        {"name": ["/etc/shadow"]},
        {"name": ["http://169.254.169.254/latest"]},
        {"samples": [2**62]},
        {"samples": [10**400]},
        {"samples": [-1]},
        {"tar_bytes": [2**63]},
        {"key_bytes": [2**40]},
        {"extension_bytes": [2**31]},
        {"samples": [[1]]},
        {"samples": [1.5]},
        {"samples": ["1"]},
        {"name": [{"a": 1}]},
    ],
)
def test_a_hostile_manifest_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="manifest"):
        Manifest.load(Storage(), manifest(tmp_path, **changes))


def test_json_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"[" * 10**6)

    with pytest.raises(DatasetError, match="manifest"):
        Manifest.load(Storage(), str(tmp_path))


@pytest.mark.parametrize("place", ["/etc/passwd", "file:///etc/passwd", "local:///etc/passwd"])
def test_a_data_set_in_a_store_does_not_lead_to_files_of_this_machine(tmp_path: Path, place: str) -> None:
    storage = Storage()
    storage.write(
        "memory://hostile/manifest.json", (Path(manifest(tmp_path, tar=[place])) / "manifest.json").read_bytes()
    )

    with pytest.raises(DatasetError, match="must not lead from"):
        Manifest.load(storage, "memory://hostile")
    assert Manifest.load(storage, str(tmp_path)).samples == 1  # one's own folder may say where one's own tars lie


# Code


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("*.py")), ids=lambda path: path.stem)
def test_nothing_that_runs_code_is_read_from_a_data_set(path: Path) -> None:
    """No pickle, marshal or shelve; numpy and torch files only where they are set to refuse pickles."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "pickle.loads")
            assert called != "torch.load"
            if called in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False"
