"""The commands that make, index and verify data sets, as a user types them, on real S3 and a real cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from patience import wait_until
from pipeline_tars import tar_bytes
from testbed import TILES, Command

from jobs.run.own_code import module_command
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.source import Sources
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.dataset import Dataset
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

ROOT = "s3://convmae/test-datasets"


@pytest.fixture
def s3(convmae: Command) -> Storage:
    return Storage.from_environment(convmae.stack.environment())


@pytest.fixture
def images(photographs: Path) -> list[tuple[str, bytes]]:
    paths = sorted(path for path in photographs.rglob("*.jpg") if path.name != "broken.jpg")
    return [(f"{number:04d}.jpg", path.read_bytes()) for number, path in enumerate(paths)]


@pytest.mark.slow
def test_foreign_tars_are_indexed_trained_from_and_verified(
    convmae: Command, s3: Storage, images: list[tuple[str, bytes]]
) -> None:
    url = f"{ROOT}/foreign"
    tars = [tar_bytes(images[start : start + 32]) for start in range(0, TILES, 32)]
    damaged = bytearray(tars[1])
    header = damaged.index(images[40][0].encode())
    damaged[header] ^= 1
    for number, data in enumerate([tars[0], bytes(damaged), tars[2]]):
        s3.write(f"{url}/part/{number:05d}.tar", data)

    out, err = convmae("index", url, code=2)
    assert f"part/00001.tar, offset {header}: damaged header" in out
    assert "tars: must be whole, got '1 damaged places in 3 tars'" in err
    assert not s3.exists(f"{url}/manifest.json")

    s3.write(f"{url}/part/00001.tar", tars[1])
    out, _ = convmae("index", url)
    assert f"{TILES} images in 3 shards (1 read, 2 kept), 0 sources skipped" in out
    out, _ = convmae("stats", url, "--samples", "0", "--json")
    measured = json.loads(out)
    assert measured["manifest"] == {name: measured[name] for name in ("images", "mean", "std")}
    assert (measured["images"], measured["channels"]) == (TILES, 3)
    dataset = Dataset.open(s3, url)
    assert [sample.data for sample in dataset.read(np.arange(TILES))] == [data for _, data in images]

    s3.write(f"{url}/part/00000.tar", tars[0].replace(images[3][1], images[3][1][:-9] + bytes(9)))
    out, _ = convmae("verify", url, "--json", code=1)
    report = json.loads(out)
    assert (report["samples"], report["shards"], report["deep"]) == (TILES, 3, False)
    assert [(fault["shard"], fault["key"]) for fault in report["faults"]] == [
        ("part/00000", None),
        ("part/00000", "0003"),
    ]
    assert "was replaced" in report["faults"][0]["what"]
    assert "CRC32C" in report["faults"][1]["what"]


@pytest.mark.slow
def test_samples_of_tars_without_a_supported_image_are_reported(
    convmae: Command, s3: Storage, images: list[tuple[str, bytes]]
) -> None:
    data = images[0][1]
    members = [
        ("1.jpe", data),
        ("2.jfif", data),
        ("3.heic", b"x"),
        ("3.json", b"{}"),
        ("4.jxl", b"x"),
        ("5.heic", b"x"),
    ]
    s3.write(f"{ROOT}/unread/a.tar", tar_bytes(members))
    told = "3 samples have no image that is read (.heic 2, .jxl 1); convert or rename them: read are jpg, jpeg, "

    out, _ = convmae("index", f"{ROOT}/unread", "--out", f"{ROOT}/unread-index")
    assert "2 images in 1 shards (1 read, 0 kept), 3 sources skipped" in out
    assert told in out
    out, _ = convmae("shard", f"{ROOT}/unread", f"{ROOT}/unread-shards")
    assert "2 images in 1 shards (1 written, 0 kept), 3 sources skipped" in out
    assert told in out
    lines = s3.read(f"{ROOT}/unread-shards/skipped.jsonl").decode().splitlines()
    assert [json.loads(line)["path"].partition(" at ")[0] for line in lines] == [
        f"a.tar: {name}" for name in ("3.heic", "4.jxl", "5.heic")
    ]

    s3.write(f"{ROOT}/page/a.tar", b"<!doctype html><html>404</html>")
    out, err = convmae("index", f"{ROOT}/page", code=2)
    assert "a.tar, offset 0: it is a page (HTML or XML)" in out
    assert "tars: must be whole" in err and "a.tar" in err and "download it again" in err


def test_a_whole_data_set_has_no_fault(convmae: Command, data: str) -> None:
    out, err = convmae("verify", data, "--deep")

    assert f"{TILES} images in 3 shards" in out and "read and decoded" in out
    assert out.rstrip().endswith("0 faults")
    assert "failed" not in err


@pytest.mark.slow
def test_an_ingest_that_is_killed_resumes_and_ends_in_the_same_bytes(
    convmae: Command, s3: Storage, photographs: Path, tmp_path: Path
) -> None:
    url = f"{ROOT}/killed"
    arguments = ("shard", str(photographs), url, "--samples-per-shard", "1")
    first = convmae.start(*arguments)
    wait_until("a finished shard", lambda: any(name.endswith(".index") for name in s3.list_names(url)), 180)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not s3.exists(f"{url}/manifest.json")

    out, _ = convmae(*arguments)

    written, kept = (int(word) for word in out.rpartition("shards (")[2].split(" kept")[0].split(" written, "))
    assert written + kept == TILES + 1
    assert written >= 1
    assert kept >= 1
    sources = find_sources(Storage(), str(photographs))
    assert isinstance(sources, Sources)
    for task in plan_shards(sources, Sharding(1)):
        entry = write_shard(Storage(), str(tmp_path), task).entry
        assert s3.read(entry.tar_url(url)) == Path(entry.tar_url(str(tmp_path))).read_bytes()
    assert s3.list_names(f"{url}/.ingest") == []


@pytest.mark.slow
def test_an_ingest_that_is_interrupted_says_nothing_of_its_tasks_and_resumes(
    convmae: Command, s3: Storage, photographs: Path
) -> None:
    url = f"{ROOT}/interrupted"
    arguments = ("shard", str(photographs), url, "--samples-per-shard", "1")
    first = convmae.start(*arguments)
    wait_until("a finished shard", lambda: any(name.endswith(".index") for name in s3.list_names(url)), 180)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=120)

    assert first.returncode in (1, 130)
    assert err.strip() == "" and all(line.startswith("shards ") for line in out.splitlines())
    assert s3.list_names(f"{url}/.ingest") == [], "the claim was given back"


def test_no_task_runs_files_of_the_folder_in_which_a_command_is_typed(
    convmae: Command, s3: Storage, photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("pipeline.py", "model.py", "ray.py", "jobs/__init__.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    command = module_command(sys.executable, "jobs.cli.main", "shard", str(photographs), f"{ROOT}/folder")
    ended = subprocess.run(
        command, cwd=tmp_path, env=convmae.environment(), capture_output=True, text=True, check=False
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert s3.exists(f"{ROOT}/folder/manifest.json")
    assert not (tmp_path / "ran").exists()


def test_a_second_ingest_is_told_who_works_there(convmae: Command, s3: Storage, photographs: Path) -> None:
    url = f"{ROOT}/claimed"
    with hold_lease(s3, f"{url}/.ingest", "convmae shard", on_wait=print) as claim:
        out, err = convmae("shard", str(photographs), url, code=2)
        claim.check()

    assert "a lease is held by" in out
    assert "must not be in use by" in err and "convmae shard, since 20" in err
    assert not s3.exists(f"{url}/manifest.json")


def test_only_one_of_many_conditional_writes_succeeds(s3: Storage) -> None:
    made = [s3.create(f"{ROOT}/created", f"{number}".encode()) for number in range(3)]

    assert made == [True, False, False]
    assert s3.read(f"{ROOT}/created") == b"0"


def test_webdataset_reads_what_was_sharded_to_s3(data: str, s3: Storage, tmp_path: Path) -> None:
    dataset = Dataset.open(s3, data)
    for shard in dataset.manifest.shards:
        s3.download(shard.tar_url(data), tmp_path / f"{shard.name}.tar")

    urls = [str(tmp_path / f"{shard.name}.tar") for shard in dataset.manifest.shards]
    seen = [
        (item["__key__"], item["jpg"], int(item["cls"])) for item in webdataset.WebDataset(urls, shardshuffle=False)
    ]

    assert seen == [(sample.key, sample.data, sample.label) for sample in dataset.read(np.arange(TILES))]
