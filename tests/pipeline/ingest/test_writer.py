from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from PIL import Image, ImageFile

from pipeline.access.places import Given
from pipeline.errors import StorageError
from pipeline.image.decode import decode
from pipeline.image.photo import CorruptImage, photo_from
from pipeline.ingest.plan import Sharding, ShardTask, plan_shards
from pipeline.ingest.sources import Source, find_sources
from pipeline.ingest.writer import index_url, tar_url, write_shard
from pipeline.shard.index import NO_LABEL, ShardIndex
from pipeline.shard.table import ShardEntry
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]

JPEG_LOSS = 12
"""Mean difference per channel that compression may cost a small colourful image; a wrong channel or turn costs > 50."""


def encoded(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(pixels)
    output = io.BytesIO()
    (image.convert(mode) if mode else image).save(output, kind, **options)
    return output.getvalue()


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 10, columns * 7, rows * 3 + columns * 2], -1).astype(np.uint8)


@pytest.fixture
def task(photographs: Path) -> ShardTask:
    return plan_shards(find_sources(Storage(), str(photographs)), Sharding(20))[1]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_a_plain_jpeg_keeps_its_bytes(jpeg: MakeJpeg, options: dict[str, object]) -> None:
    data = jpeg(3, 30, 50, **options)

    photo = photo_from(data)

    assert photo.data == data
    assert (photo.height, photo.width) == (30, 50)


def test_a_gray_jpeg_keeps_its_bytes() -> None:
    data = encoded(gradient()[..., 0], "JPEG")

    assert photo_from(data).data == data


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient(), "PNG"),
        encoded(gradient(), "PNG", "RGBA"),
        encoded(gradient(), "PNG", "P"),
        encoded(gradient(), "WEBP", lossless=True),
        encoded(gradient(), "BMP"),
        encoded(gradient(), "TIFF"),
        encoded(gradient(), "JPEG", "CMYK", quality=95),
    ],
    ids=["png", "png-alpha", "png-palette", "webp", "bmp", "tiff", "jpeg-cmyk"],
)
def test_other_formats_become_equal_jpegs(data: bytes) -> None:
    photo = photo_from(data)

    assert photo.data != data
    assert (photo.height, photo.width) == (24, 32)
    assert np.abs(decode(photo.data).astype(int) - gradient()).mean() < JPEG_LOSS


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    gray = (np.mgrid[0:24, 0:32][1] * 2000).astype(np.uint16)

    photo = photo_from(encoded(gray, "PNG"))

    assert np.abs(decode(photo.data)[..., 0].astype(int) - (gray >> 8)).mean() < 2


def test_a_rotated_photo_is_turned_upright(jpeg: MakeJpeg) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6

    photo = photo_from(jpeg(1, 30, 50, exif=exif))

    assert (photo.height, photo.width) == (50, 30)
    expected = np.rot90(decode(jpeg(1, 30, 50)), -1)
    assert np.abs(decode(photo.data).astype(int) - expected).mean() < JPEG_LOSS


def test_stray_bytes_between_segments_cost_no_image(jpeg: MakeJpeg) -> None:
    data = jpeg(1)
    quantisation = data.index(b"\xff\xdb")

    photo = photo_from(data[:quantisation] + bytes(5) + data[quantisation:])

    assert np.abs(decode(photo.data).astype(int) - decode(data)).mean() < JPEG_LOSS


@pytest.mark.parametrize("truncated_globally", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_corrupt_whatever_pil_is_set_to(
    kind: str, truncated_globally: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated_globally)
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), kind)

    with pytest.raises(CorruptImage):
        photo_from(data[: len(data) // 2])
    assert truncated_globally == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\xff\xd8\xff"], ids=["empty", "text", "marker"])
def test_what_is_no_image_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptImage):
        photo_from(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1)

    with pytest.raises(CorruptImage, match="767"):
        photo_from(encoded(gradient(), kind))


def test_webdataset_reads_our_shards(task: ShardTask, tmp_path: Path, photographs: Path) -> None:
    report = write_shard(Storage(), str(tmp_path), task)

    samples = list(webdataset.WebDataset(tar_url(str(tmp_path), task.name), shardshuffle=False))

    assert len(samples) == report.samples == 20
    for number, (sample, source) in enumerate(zip(samples, task.sources, strict=True)):
        assert sample["__key__"] == f"{20 + number:08d}"
        assert sample["jpg"] == (photographs / source.path.text).read_bytes()
        assert int(sample["cls"]) == source.label


def test_the_index_finds_every_image(task: ShardTask, tmp_path: Path) -> None:
    report = write_shard(Storage(), str(tmp_path), task)
    index = ShardIndex.from_bytes(Storage().read(index_url(str(tmp_path), task.name)), "")
    tar = Path(tar_url(str(tmp_path), task.name)).read_bytes()

    assert report.tar_bytes == index.tar_bytes == len(tar)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        images = {member.name: archive.extractfile(member).read() for member in archive if member.name.endswith(".jpg")}
    for row, key in enumerate(index.table["key"]):
        start, length = int(index.table["offset"][row]), int(index.table["length"][row])
        image = tar[start : start + length]
        assert image == images[f"{key.decode()}.jpg"]
        assert google_crc32c.value(image) == index.table["crc"][row]
        assert decode(image).shape[:2] == (index.table["height"][row], index.table["width"][row])
    assert index.table["label"].tolist() == [source.label for source in task.sources]


def test_the_report_names_the_index(task: ShardTask, tmp_path: Path) -> None:
    entry = write_shard(Storage(), str(tmp_path), task).entry

    assert entry == ShardEntry.of(ShardIndex.from_bytes(Storage().read(entry.index_url(str(tmp_path))), ""))
    assert entry.tar_url(str(tmp_path)) == tar_url(str(tmp_path), task.name)
    assert entry.etag is None  # a folder has none


def test_the_same_task_writes_the_same_bytes(task: ShardTask, tmp_path: Path) -> None:
    first, second = str(tmp_path / "a"), str(tmp_path / "b")

    assert write_shard(Storage(), first, task) == write_shard(Storage(), second, task)
    for url in (tar_url, index_url):
        assert Storage().read(url(first, task.name)) == Storage().read(url(second, task.name))


def test_corrupt_and_vanished_images_are_skipped_and_listed(tmp_path: Path, jpeg: MakeJpeg) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.jpg").write_bytes(jpeg(0))
    (photos / "cut.jpg").write_bytes(jpeg(0)[:-300])
    sources = tuple(Source(Given(name), 1, None) for name in ("cut.jpg", "good.jpg", "gone.jpg"))
    task = ShardTask("shard-000000", str(photos), 0, sources)

    report = write_shard(Storage(), str(tmp_path / "out"), task)

    assert report.samples == 1
    assert [item.path for item in report.skipped] == ["cut.jpg", "gone.jpg"]
    assert "Premature end" in report.skipped[0].reason
    index = ShardIndex.from_bytes(Storage().read(index_url(str(tmp_path / "out"), task.name)), "")
    assert index.table["key"].tolist() == [b"00000001"] and index.table["label"].tolist() == [NO_LABEL]
    assert write_shard(Storage(), str(tmp_path / "out"), task) == replace(report, kept=True)


def test_a_shard_without_any_good_image_is_empty_and_kept(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    task = ShardTask("shard-000000", str(tmp_path), 0, (Source(Given("bad.jpg"), 3, None),))

    reports = [write_shard(Storage(), str(tmp_path / "out"), task) for _ in range(2)]

    assert [(report.samples, len(report.skipped), report.kept) for report in reports] == [(0, 1, False), (0, 1, True)]


def test_a_finished_shard_is_kept(task: ShardTask, tmp_path: Path) -> None:
    report = write_shard(Storage(), str(tmp_path), task)
    stamp = Path(tar_url(str(tmp_path), task.name)).stat()

    again = write_shard(Storage(), str(tmp_path), task)

    assert again == replace(report, kept=True)
    assert Path(tar_url(str(tmp_path), task.name)).stat().st_ino == stamp.st_ino


@pytest.mark.parametrize("damage", ["no index", "broken index", "short tar", "no tar", "other sources"])
def test_an_unfinished_shard_is_written_again(task: ShardTask, tmp_path: Path, damage: str) -> None:
    folder = str(tmp_path)
    report = write_shard(Storage(), folder, task)
    tar, index = Path(tar_url(folder, task.name)), Path(index_url(folder, task.name))
    whole = tar.read_bytes()
    if damage == "no index":
        index.unlink()
    elif damage == "broken index":
        index.write_bytes(index.read_bytes()[:100])
    elif damage == "short tar":
        tar.write_bytes(whole[:-1])
    elif damage == "no tar":
        tar.unlink()
    else:
        write_shard(Storage(), folder, replace(task, sources=task.sources[::-1]))

    assert write_shard(Storage(), folder, task) == report
    assert tar.read_bytes() == whole


def test_a_full_temporary_disk_is_reported(task: ShardTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, sample: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(StorageError, match="ENOSPC"):
        write_shard(Storage(), str(tmp_path), task)
    assert Storage().list_files(str(tmp_path)) == {}
