from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pipeline_tars import tar_bytes

from pipeline.access.places import Listed
from pipeline.errors import DatasetError
from pipeline.image.decode import decode
from pipeline.ingest.index_tar import IndexTask, TarReport, index_tar
from pipeline.ingest.source import Tar, Tars
from pipeline.ingest.sources import find_sources
from pipeline.load.dataset import Dataset, Sample
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.shard.manifest import Manifest
from pipeline.shard.verify import verify_shard
from pipeline.store.storage import Storage

MakeJpeg = Callable[..., bytes]


def index_all(source: Path | str, destination: Path | str, **options: bool) -> tuple[Dataset, list[TarReport]]:
    tars = find_sources(Storage(), str(source))
    assert isinstance(tars, Tars)
    tasks = [IndexTask(tars.root, tar, **({"deep": False, "salvage": False} | options)) for tar in tars.tars]
    reports = [index_tar(Storage(), str(destination), task) for task in tasks]
    found = [report.report for report in reports if report.report is not None]
    Manifest.of(tasks, found, ()).save(Storage(), str(destination), [])
    return Dataset.open(Storage(), str(destination)), reports


def read_all(dataset: Dataset) -> list[Sample]:
    return dataset.read(np.arange(dataset.samples))


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    rows, columns = np.mgrid[0:24, 0:32]
    pixels = np.stack([rows * 10, columns * 7, rows * 3 + columns * 2], -1).astype(np.uint8)
    output = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(output, kind, **options)
    return output.getvalue()


def test_every_sample_of_shard_writer_is_read(tmp_path: Path, jpeg: MakeJpeg) -> None:
    images = [jpeg(n, 20 + n, 30) for n in range(25)]
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=10, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"{number:09d}", "jpg": image, "json": {"label": number % 4}, "txt": "a caption"})
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}

    dataset, _ = index_all(tmp_path, tmp_path)

    samples = read_all(dataset)
    assert [sample.data for sample in samples] == images
    assert [sample.label for sample in samples] == [number % 4 for number in range(25)]
    assert [sample.key for sample in samples] == [f"{number:09d}" for number in range(25)]
    assert [row.row.height for row in dataset.rows(range(25))] == [20 + n for n in range(25)]
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == before


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "posix", "ustar", "v7"])
def test_every_sample_of_the_tar_command_is_read(form: str, tmp_path: Path, jpeg: MakeJpeg) -> None:
    folder = tmp_path / "images" / ("a" * 60 if form in ("ustar", "v7") else "a" * 120)
    folder.mkdir(parents=True)
    for number in range(9):
        (folder / f"{number}.JPEG").write_bytes(jpeg(number))
        (folder / f"{number}.cls").write_text(f"{number}\n")
    (tmp_path / "tars").mkdir()
    command = ["tar", f"--format={form}", "-C", str(tmp_path / "images"), "-cf", str(tmp_path / "tars" / "a.tar"), "."]
    subprocess.run(command, check=True)

    dataset, _ = index_all(tmp_path / "tars", tmp_path / "tars")

    assert {(sample.key, sample.data, sample.label) for sample in read_all(dataset)} == {
        (f"./{folder.name}/{number}", jpeg(number), number) for number in range(9)
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_members_in_any_order_are_read(form: int, tmp_path: Path, jpeg: MakeJpeg) -> None:
    folder = "/".join(["a-folder-with-a-long-name"] * 6)
    members = [
        (f"{folder}/{n}.{kind}", data) for n in range(6) for kind, data in (("jpg", jpeg(n)), ("cls", b"%d" % n))
    ]
    order = np.random.default_rng(1).permutation(len(members))
    (tmp_path / "a.tar").write_bytes(tar_bytes([members[place] for place in order], form))

    dataset, _ = index_all(tmp_path, tmp_path)

    assert {(sample.key, sample.data, sample.label) for sample in read_all(dataset)} == {
        (f"{folder}/{n}", jpeg(n), n) for n in range(6)
    }


def test_names_that_are_no_utf_8_are_read(tmp_path: Path, jpeg: MakeJpeg) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar_bytes([("caf\udce9.jpg", jpeg(1)), ("caf\udce9.cls", b"5"), ("x.jpg", b"bad")])
    )

    dataset, reports = index_all(tmp_path, tmp_path)

    assert [(sample.key, sample.data, sample.label) for sample in read_all(dataset)] == [("caf\udce9", jpeg(1), 5)]
    assert reports[0].skipped == 1


def test_formats_that_are_no_jpeg_are_read_and_decoded(tmp_path: Path) -> None:
    images = {
        "png": encoded("PNG"),
        "rgba.png": encoded("PNG", "RGBA"),
        "palette.png": encoded("PNG", "P"),
        "gray.png": encoded("PNG", "L"),
        "webp": encoded("WEBP", lossless=True),
        "jpeg": encoded("JPEG", "CMYK", quality=95),
        "gif": encoded("GIF"),
    }
    members = [(f"{n}.{extension}", data) for n, (extension, data) in enumerate(images.items())]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))

    dataset, reports = index_all(tmp_path, tmp_path, deep=True)

    assert reports[0].skipped == 0
    expected = decode(images["png"]).astype(int)
    for sample, (extension, data) in zip(read_all(dataset), images.items(), strict=True):
        assert sample.data == data
        allowed = {"gray.png": 80, "palette.png": 30, "gif": 30, "jpeg": 12}.get(extension, 0)
        assert np.abs(decode(sample.data).astype(int) - expected).mean() <= allowed, extension


def test_batches_come_out_of_tars_of_any_format(tmp_path: Path, jpeg: MakeJpeg) -> None:
    odd = [("png", encoded("PNG", "RGBA")), ("webp", encoded("WEBP")), ("jpeg", encoded("JPEG", "CMYK"))]
    members = [(f"{n}.{kind}", data) for n, (kind, data) in enumerate(odd * 4)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    (tmp_path / "b.tar").write_bytes(tar_bytes([(f"{n}.jpg", jpeg(n)) for n in range(12)]))
    dataset, _ = index_all(tmp_path, tmp_path)
    order = Order(24, global_batch_size=8, lanes=4, seed=1, block_samples=2, window_blocks=3)

    loader = Loader(dataset, order, image_shape=(16, 16), rank=0, world_size=1, seed=1, threads=2)
    batches = list(loader.batches(0, 3))

    assert sorted(np.concatenate([batch.sample_ids for batch in batches]).tolist()) == list(range(24))
    assert all(batch.images.shape == (8, 3, 16, 16) for batch in batches)


def test_unusable_images_are_skipped_and_listed(tmp_path: Path, jpeg: MakeJpeg) -> None:
    members = [
        ("a.jpg", jpeg(0)),
        ("b.jpg", b"no image"),
        ("c.jpg", jpeg(1)[:-300]),
        ("d.png", b""),
        ("e.jpg", jpeg(2)),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))

    shallow, reports = index_all(tmp_path, tmp_path)
    assert [sample.key for sample in read_all(shallow)] == ["a", "c", "e"]
    (tmp_path / "manifest.json").unlink()
    deep, deep_reports = index_all(tmp_path, tmp_path, deep=True)

    assert [sample.key for sample in read_all(deep)] == ["a", "e"]
    assert (reports[0].skipped, deep_reports[0].skipped) == (2, 3)
    assert deep_reports[0].report is not None
    skipped = {item.path.split()[1]: item.reason for item in deep_reports[0].report.skipped}
    assert set(skipped) == {"b.jpg", "c.jpg", "d.png"}
    assert "Premature end" in skipped["c.jpg"]


def test_indexes_lie_elsewhere_when_asked(tmp_path: Path, jpeg: MakeJpeg) -> None:
    (tmp_path / "tars" / "part").mkdir(parents=True)
    for name in ("a", "part/a"):
        (tmp_path / "tars" / f"{name}.tar").write_bytes(tar_bytes([("x.jpg", jpeg(len(name)))]))

    dataset, _ = index_all(tmp_path / "tars", tmp_path / "out")

    assert [sample.data for sample in read_all(dataset)] == [jpeg(1), jpeg(6)]
    assert sorted(path.name for path in (tmp_path / "tars").rglob("*")) == ["a.tar", "a.tar", "part"]


def test_damage_is_named_and_salvaged_only_when_asked(tmp_path: Path, jpeg: MakeJpeg) -> None:
    data = bytearray(tar_bytes([(f"{n}.jpg", jpeg(n)) for n in range(10)]))
    positions = [place for place in range(0, len(data), 512) if data[place : place + 5] == b"4.jpg"]
    assert len(positions) == 1
    data[positions[0]] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(tar_bytes([("x.jpg", jpeg(11))]))

    _, reports = index_all(tmp_path, tmp_path)

    assert reports[0].report is None
    assert [fault.offset for fault in reports[0].faults] == positions
    assert not (tmp_path / "a.index").exists()
    dataset, reports = index_all(tmp_path, tmp_path, salvage=True)
    assert [sample.data for sample in read_all(dataset)] == [*(jpeg(n) for n in range(10) if n != 4), jpeg(11)]
    assert (reports[0].skipped, reports[1].kept) == (1, True)
    assert index_all(tmp_path, tmp_path, salvage=True)[1][0].kept
    assert verify_shard(Storage(), str(tmp_path), dataset.manifest.shards[0], deep=True).faults == ()
    assert index_all(tmp_path, tmp_path, salvage=False)[1][0].report is None


def test_what_is_indexed_is_kept_until_the_tar_changes(tmp_path: Path, jpeg: MakeJpeg) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_bytes([("x.jpg", jpeg(1)), ("x.cls", b"1")]))
    _, first = index_all(tmp_path, tmp_path)

    _, again = index_all(tmp_path, tmp_path)
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    _, changed = index_all(tmp_path, tmp_path)

    assert first[0].report is not None
    assert again[0].report == replace(first[0].report, kept=True)
    assert not changed[0].kept


def test_a_tar_that_changes_under_the_scan_is_refused(tmp_path: Path, jpeg: MakeJpeg) -> None:
    class Changing(Storage):
        def read_range(self, url: str, offset: int, length: int) -> bytes:
            data = super().read_range(url, offset, length)
            Path(url).write_bytes(tar_bytes([("x.jpg", jpeg(1)), ("y.jpg", jpeg(2))]) + bytes(10_240))
            return data

    (tmp_path / "a.tar").write_bytes(tar_bytes([("x.jpg", jpeg(1))]))
    tar = Tar(Listed("a.tar"), (tmp_path / "a.tar").stat().st_size)

    with pytest.raises(DatasetError, match="must not change while it is indexed"):
        index_tar(Changing(), str(tmp_path), IndexTask(str(tmp_path), tar, deep=False, salvage=False))
    assert not (tmp_path / "a.index").exists()


def test_labels_that_do_not_fit_are_counted(tmp_path: Path, jpeg: MakeJpeg) -> None:
    members = [
        ("a.jpg", jpeg(0)),
        ("a.json", json.dumps({"label": 2**40}).encode()),
        ("b.jpg", jpeg(1)),
        ("b.cls", b"x"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))

    dataset, reports = index_all(tmp_path, tmp_path)

    assert [sample.label for sample in read_all(dataset)] == [2**40, None]
    assert reports[0].bad_labels == 1
