from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image
from pipeline_tars import tar_bytes
from ray_here import ray_here

from jobs.cluster.fan_out import Progress
from jobs.data import ingest as ingest_module
from jobs.data.ingest import IngestReport, ingest
from pipeline.errors import DamagedTarsError, DatasetError, SourceError, StorageError
from pipeline.image.jpeg_parts import MarkedJpeg
from pipeline.image.photo import Encoding
from pipeline.image.restart_markers import PROGRAM
from pipeline.ingest.plan import Ingest, Sharding
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import MANIFEST_NAME, SKIPPED_NAME
from pipeline.store.lease import Lease, hold_lease
from pipeline.store.storage import Storage


@pytest.fixture(scope="module")
def cluster(token_of_this_process: str) -> Iterator[None]:
    with ray_here(token_of_this_process, num_cpus=2):
        yield


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """24 images in two classes."""
    for number in range(24):
        path = tmp_path / "photographs" / f"class-{number % 2}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        output = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(output, "JPEG")
        path.write_bytes(output.getvalue())
    return tmp_path / "photographs"


def run(
    source: Path | str, destination: str, *, salvage: bool = False, **sharding: Any
) -> tuple[IngestReport, list[tuple[str, Progress]]]:
    progress: list[tuple[str, Progress]] = []
    report = ingest(
        Storage(),
        Ingest(find_sources(Storage(), str(source)), Sharding(**({"samples_per_shard": 5} | sharding))),
        destination,
        salvage=salvage,
        on_progress=lambda stage, now: progress.append((stage, now)),
    )
    return report, progress


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_photographs_become_a_dataset(cluster: None, photographs: Path, tmp_path: Path) -> None:
    (photographs / "class-0" / "cut.jpg").write_bytes((photographs / "class-0" / "00.jpg").read_bytes()[:-50])

    report, progress = run(photographs, str(tmp_path / "out"))

    dataset = Dataset.open(Storage(), str(tmp_path / "out"))
    originals = {path.read_bytes(): path.parent.name for path in photographs.rglob("[0-9]*.jpg")}
    found = {sample.data: sample.label for sample in dataset.read(np.arange(dataset.samples))}
    assert {data: dataset.manifest.classes[label] for data, label in found.items()} == originals
    assert report.manifest == dataset.manifest
    assert (report.shards_written, report.shards_kept, report.skipped) == (5, 0, 1)
    assert [each for each in progress if each[0] == "shards"][-1] == (
        "shards",
        Progress(done=5, total=5, samples=24, bad=1),
    )
    assert progress[-1][0] == "statistics"
    skipped = json.loads((tmp_path / "out" / SKIPPED_NAME).read_text())
    assert skipped["path"] == "class-0/cut.jpg" and "Premature end" in skipped["reason"]


@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="no jpegtran here")
def test_restart_markers_are_in_the_images_and_in_the_manifest(
    cluster: None, photographs: Path, tmp_path: Path
) -> None:
    marked = Encoding(restart_markers=True)
    plain, _ = run(photographs, str(tmp_path / "plain"))

    report, _ = run(photographs, str(tmp_path / "marked"), encoding=marked)

    dataset = Dataset.open(Storage(), str(tmp_path / "marked"))
    assert dataset.manifest.restart_markers and dataset.manifest == report.manifest
    assert dataset.manifest.pixels == plain.manifest.pixels
    assert all(MarkedJpeg.of(sample.data) for sample in dataset.read(np.arange(dataset.samples)))
    with pytest.raises(DatasetError, match="other images or options"):
        run(photographs, str(tmp_path / "plain"), encoding=marked)


def test_a_restart_keeps_what_is_finished_and_ends_in_the_same_bytes(
    cluster: None, photographs: Path, tmp_path: Path
) -> None:
    run(photographs, str(tmp_path / "out"))
    whole = files(tmp_path / "out")
    for name in (MANIFEST_NAME, "shard-000001.index", "shard-000003.tar"):
        (tmp_path / "out" / name).unlink()

    report, _ = run(photographs, str(tmp_path / "out"))

    assert (report.shards_written, report.shards_kept) == (2, 3)
    assert files(tmp_path / "out") == whole


def test_a_finished_ingest_is_not_repeated_and_another_is_refused(
    cluster: None, photographs: Path, tmp_path: Path
) -> None:
    first, _ = run(photographs, str(tmp_path / "out"))

    again, progress = run(photographs, str(tmp_path / "out"))

    assert again.manifest == first.manifest
    assert (again.shards_written, again.shards_kept, progress) == (0, 5, [])
    with pytest.raises(DatasetError, match="other images or options"):
        run(photographs, str(tmp_path / "out"), samples_per_shard=6)


def test_a_users_error_in_a_task_comes_back_as_itself_and_a_rerun_resumes(
    cluster: None, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_after_two(storage: Storage, destination: str, task):  # type: ignore[no-untyped-def]
        if task.name == "shard-000002":
            raise StorageError("disk", "must have space left (ENOSPC)", destination, "free some")
        return write_shard(storage, destination, task)

    with monkeypatch.context() as patched:
        patched.setattr("jobs.data.ingest.write_shard", full_after_two)
        with pytest.raises(StorageError) as caught:
            run(photographs, str(tmp_path / "out"))
    assert type(caught.value) is StorageError
    assert caught.value.value == str(tmp_path / "out")
    with pytest.raises(DatasetError, match="must hold a manifest"):
        Dataset.open(Storage(), str(tmp_path / "out"))

    report, _ = run(photographs, str(tmp_path / "out"))

    assert report.shards_kept >= 1
    assert report.manifest.samples == 24


def test_tars_become_the_same_images_in_another_order(cluster: None, photographs: Path, tmp_path: Path) -> None:
    tars, labels = tmp_path / "tars", {}
    for number in range(4):
        members = []
        for path in sorted(photographs.rglob("*.jpg"))[number::4]:
            members += [(f"{path.stem}.cls", path.parent.name[-1].encode()), (f"{path.stem}.jpg", path.read_bytes())]
            labels[path.read_bytes()] = int(path.parent.name[-1])
        tars.mkdir(exist_ok=True)
        (tars / f"{number}.tar").write_bytes(tar_bytes(members))

    report, progress = run(tars, str(tmp_path / "out"))

    dataset = Dataset.open(Storage(), str(tmp_path / "out"))
    samples = dataset.read(np.arange(dataset.samples))
    assert {sample.data: sample.label for sample in samples} == labels
    assert [sample.data for sample in samples] != list(labels)
    assert ("source tars", Progress(done=4, total=4, samples=24)) in progress
    assert not (tmp_path / "out" / ".ingest").exists()
    again, progress = run(tars, str(tmp_path / "out"))
    assert (again.manifest, progress) == (report.manifest, [])


def test_a_restart_does_not_read_source_tars_again(cluster: None, photographs: Path, tmp_path: Path) -> None:
    images = [(path.name, path.read_bytes()) for path in sorted(photographs.rglob("*.jpg"))]
    (tmp_path / "tars").mkdir()
    for number in range(3):
        (tmp_path / "tars" / f"{number}.tar").write_bytes(tar_bytes(images[number * 8 : number * 8 + 8]))
    run(tmp_path / "tars", str(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    original = ingest_module._written

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    ingest_module._written = killed  # type: ignore[assignment]
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "tars", str(tmp_path / "out"))
    finally:
        ingest_module._written = original
    _, progress = run(tmp_path / "tars", str(tmp_path / "out"))

    assert ("source tars", Progress(done=3, total=3, kept=3, samples=24, kept_samples=24)) in progress
    assert files(tmp_path / "out") == whole


def test_damaged_source_tars_are_all_named_and_salvaged_when_asked(
    cluster: None, photographs: Path, tmp_path: Path
) -> None:
    images = [(path.name, path.read_bytes()) for path in sorted(photographs.rglob("*.jpg"))]
    (tmp_path / "tars").mkdir()
    whole = tar_bytes(images[:8])
    (tmp_path / "tars" / "a.tar").write_bytes(whole)
    (tmp_path / "tars" / "b.tar").write_bytes(whole[: whole.index(images[4][0].encode()) + 600])
    (tmp_path / "tars" / "c.tar").write_bytes(b"x" + whole[1:])

    with pytest.raises(DamagedTarsError, match="2 damaged places in 3 tars") as caught:
        run(tmp_path / "tars", str(tmp_path / "out"))
    assert [line.split(",")[0] for line in caught.value.lines] == ["b.tar", "c.tar"]
    assert "c.tar, offset 0: damaged header" in caught.value.lines[1]
    report, _ = run(tmp_path / "tars", str(tmp_path / "out"), salvage=True)

    assert report.manifest.samples == 8 + 4 + 7
    skipped = [json.loads(line)["path"] for line in (tmp_path / "out" / SKIPPED_NAME).read_text().splitlines()]
    assert len(skipped) == report.skipped == 2
    assert skipped[1] == "c.tar at byte 0"


def test_what_another_finished_while_one_waited_is_not_overwritten(
    cluster: None, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claimed_late(*arguments: Any, **options: Any) -> AbstractContextManager[Lease]:
        monkeypatch.undo()
        run(photographs, str(tmp_path / "out"), samples_per_shard=6)
        return hold_lease(*arguments, **options)

    monkeypatch.setattr(ingest_module, "hold_lease", claimed_late)

    with pytest.raises(DatasetError, match="other images or options"):
        run(photographs, str(tmp_path / "out"))

    dataset = Dataset.open(Storage(), str(tmp_path / "out"))
    assert [shard.samples for shard in dataset.manifest.shards] == [6, 6, 6, 6]
    assert len(dataset.read(np.arange(24))) == 24


def test_source_tars_are_not_overwritten(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    data = tar_bytes([(path.name, path.read_bytes()) for path in photographs.rglob("*.jpg")])
    (tmp_path / "tars" / "shard-000000.tar").write_bytes(data)

    with pytest.raises(SourceError, match="own folder"):
        run(tmp_path / "tars", str(tmp_path / "tars"))
    assert files(tmp_path / "tars") == {"shard-000000.tar": data}


def test_a_list_of_files_becomes_a_dataset(cluster: None, photographs: Path, tmp_path: Path) -> None:
    paths = sorted(photographs.rglob("*.jpg"))
    lines = [f"{path.relative_to(tmp_path)}\t{path.parent.name}" for path in paths] + ["photographs/gone.jpg\tclass-0"]
    (tmp_path / "list.txt").write_text("\n".join(lines))

    report, _ = run(tmp_path / "list.txt", str(tmp_path / "out"), samples_per_shard=None, shard_bytes=40_960)

    dataset = Dataset.open(Storage(), str(tmp_path / "out"))
    found = {sample.data: dataset.manifest.classes[sample.label] for sample in dataset.read(np.arange(24))}
    assert found == {path.read_bytes(): path.parent.name for path in paths}
    assert report.skipped == 1
    assert json.loads((tmp_path / "out" / SKIPPED_NAME).read_text())["path"] == "photographs/gone.jpg"
    assert dataset.manifest.shards.tar_bytes.max() <= 40_960


def test_a_flipped_byte_in_a_finished_shard_is_found_at_the_restart(
    cluster: None, photographs: Path, tmp_path: Path
) -> None:
    run(photographs, str(tmp_path / "out"))
    whole = files(tmp_path / "out")
    (tmp_path / "out" / MANIFEST_NAME).unlink()
    damaged = bytearray(whole["shard-000002.tar"])
    damaged[2000] ^= 1
    (tmp_path / "out" / "shard-000002.tar").write_bytes(damaged)

    report, _ = run(photographs, str(tmp_path / "out"))

    assert (report.shards_written, report.shards_kept) == (1, 4)
    assert files(tmp_path / "out") == whole


def test_images_that_all_fail_are_refused(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.jpg").write_bytes(b"no image")

    with pytest.raises(SourceError, match=r"a\.jpg"):
        run(tmp_path / "photographs", str(tmp_path / "out"))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_bad_destination_is_refused_before_any_task_starts(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "remote", None)

    with pytest.raises(StorageError, match="did you mean s3://"):
        run(photographs, "s4://bucket/out")


def test_a_users_error_survives_a_pickle() -> None:
    error = StorageError("disk", "must have space left", "/out", "free some")

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is StorageError
    assert str(copy) == str(error)
