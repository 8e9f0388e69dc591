"""Folders on local disks: accepted if all nodes see them, refused by name if one node has its own disk there."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from followed_runs import SPREAD
from patience import done, wait_until
from ray_nodes import Cluster, ray_cluster
from testbed import TILES, losses, small_recipe

from jobs.errors import NotSharedError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.run.shared_folder import (
    Landmark,
    check_seen_here,
    file_landmarks,
    input_landmarks,
    lease_landmarks,
    planted,
    refuse_unseen,
    run_landmarks,
)
from pipeline.ingest.photographs import cut_tiles
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

RUN_ROOT = Landmark("run_root", "/data/runs", "/data/runs/first/claims/claim-000001.json", b"first")
DATA = Landmark("data", "/data/set", "/data/set/manifest.json", b"{")


def test_a_landmark_is_seen_where_its_file_begins_alike(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"one data set")
    (landmark,) = file_landmarks(Storage(), "data", str(tmp_path), str(tmp_path / "manifest.json"))

    assert landmark.is_seen(Storage())
    (tmp_path / "manifest.json").write_bytes(b"another data set")
    assert not landmark.is_seen(Storage())
    (tmp_path / "manifest.json").unlink()
    assert not landmark.is_seen(Storage())


def test_what_cannot_be_read_here_is_not_a_landmark(tmp_path: Path) -> None:
    """Its reader reports what is wrong, as a skipped image or a fault."""
    assert file_landmarks(Storage(), "source", str(tmp_path), str(tmp_path)) == ()


def test_what_lies_in_a_store_needs_no_landmark(tmp_path: Path) -> None:
    assert file_landmarks(Storage(), "data", "s3://bucket/data", "s3://bucket/data/manifest.json") == ()
    assert file_landmarks(Storage(), "init_from", "", str(tmp_path / "is-not-there")) == ()
    with planted(Storage(), "trace", "s3://bucket/trace") as none:
        assert none == ()


def test_what_is_planted_is_gone_afterwards(tmp_path: Path) -> None:
    with planted(Storage(), "trace", str(tmp_path)) as landmarks:
        check_seen_here(Storage(), landmarks)
        assert len(list(tmp_path.iterdir())) == 1

    assert list(tmp_path.iterdir()) == []


def test_what_a_fine_tuning_reads_is_looked_for_by_its_field(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    for name in ("elsewhere.tar", "labels.txt", "more.txt", "w.safetensors"):
        (tmp_path / name).write_text(name)
    folder, run = str(tmp_path), RunDirectory.of(Storage(), "s3://bucket/runs", "first")
    lists = {"labels": f"{folder}/labels.txt", "validation_labels": f"{folder}/more.txt"}
    given = {f"finetune.{name}": url for name, url in {**lists, "validation_data": f"{folder}/val"}.items()}
    recipe = named_recipe("tiny_finetune").amended(
        {"data": f"{folder}/train", "init_from": f"{folder}/w.safetensors", "finetune.validation_ratio": 0.0, **given}
    )
    tars = {"data": "s3://bucket/0.tar", "finetune.validation_data": f"{folder}/elsewhere.tar"}

    always = run_landmarks(recipe, run, None)  # type: ignore[arg-type]  # a run in a store asks for no lease
    also = input_landmarks(Storage(), recipe, tars)

    assert {(mark.field, mark.start) for mark in always} == {("data", b"train"), ("finetune.validation_data", b"val")}
    assert {(mark.field, mark.start) for mark in also} == {
        ("finetune.validation_data", b"elsewhere.tar"),
        ("finetune.labels", b"labels.txt"),
        ("finetune.validation_labels", b"more.txt"),
        ("init_from", b"w.safetensors"),
    }


def test_a_claim_is_a_landmark_over_its_beats_and_not_after_it_was_taken_over(tmp_path: Path) -> None:
    with hold_lease(Storage(), str(tmp_path), "drives", on_wait=lambda who: None, keeps_number=True) as claim:
        landmark = Landmark("run_root", str(tmp_path), claim.url, claim.first_bytes)
        assert landmark.is_seen(Storage())
        claim.beat()
        claim.beat()
        assert landmark.is_seen(Storage())
        Path(claim.url).write_bytes(b'{"token": "of somebody else')
        assert not landmark.is_seen(Storage())


@pytest.mark.parametrize(
    ("unseen", "told"),
    [
        ({"a (10.0.0.1)": [0]}, r"run_root: must be seen by every node \(a \(10.0.0.1\) does not\), got '/data/runs'"),
        ({"b": [0, 1], "a": [0], "c": [1]}, r"run_root: must be seen by every node \(a, b do not\)"),
        ({"a": [], "b": [1]}, r"data: must be seen by every node \(b does not\), got '/data/set'; take s3://"),
    ],
)
def test_the_error_names_the_field_and_each_node_that_does_not_see_it(
    unseen: Mapping[str, Sequence[int]], told: str
) -> None:
    with pytest.raises(NotSharedError, match=told):
        refuse_unseen([RUN_ROOT, DATA], unseen)


def test_nothing_is_refused_where_all_see_it() -> None:
    refuse_unseen([RUN_ROOT, DATA], {"a": [], "b": []})


ELSEWHERE = """
import pickle, sys
from jobs.run.shared_folder import check_seen_here
from pipeline.store.storage import Storage
check_seen_here(Storage(), pickle.loads(bytes.fromhex(sys.argv[1])))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another disk at the same path takes a mount namespace, and that root")
@pytest.mark.parametrize("own_disk", [False, True])
def test_a_process_with_a_disk_of_its_own_at_the_same_path_is_refused(tmp_path: Path, own_disk: bool) -> None:
    mount = f"mount -t tmpfs none {tmp_path} && " if own_disk else ""
    with hold_lease(Storage(), str(tmp_path / "claims"), "drives", on_wait=lambda who: None) as claim:
        landmarks = lease_landmarks("run_root", str(tmp_path), claim)
        words = [sys.executable, "-c", ELSEWHERE, pickle.dumps(landmarks).hex()]
        command = ["unshare", "--mount", "sh", "-c", f'{mount}exec "$@"', "sh", *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == int(own_disk), ended.stderr
    assert ("NotSharedError: run_root: must be seen by every node" in ended.stderr) == own_disk


FIELDS = {**SPREAD, "max_workers": 2}
PATIENCE_SECONDS = 480


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head and one node of one CPU, on the same disk."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    with ray_cluster(folder) as cluster:
        cluster.add()
        yield cluster


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """The output of a command, after it has ended with `code`."""
    return "".join(done(process, code, PATIENCE_SECONDS))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(os.geteuid() != 0, reason="a node with a disk of its own takes a mount namespace, and that root")
def test_nodes_on_one_disk_work_and_one_with_its_own_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    photographs, disk = tmp_path / "photographs", tmp_path / "disk"
    photographs.mkdir()
    disk.mkdir()
    cut_tiles(photographs, TILES, seed=0)

    def shard(source: Path, target: Path) -> subprocess.Popen[str]:
        return cluster.convmae("shard", str(source), str(target), "--samples-per-shard", "8")

    def recipe(data: Path, run_root: Path, **fields: object) -> Sequence[str]:
        return small_recipe(str(data), **{**FIELDS, "run_root": run_root, **fields})

    ended(shard(photographs, disk / "data"))
    ended(shard(photographs, tmp_path / "data"))
    ended(cluster.convmae("verify", str(disk / "data")))
    run = RunDirectory.of(Storage(), str(disk / "runs"), "growing")
    growing = cluster.convmae("pretrain", *recipe(disk / "data", disk / "runs"), "--run", run.name)
    wait_until("steps", lambda: (run.read_heartbeat().get("checkpoint_step") or 0) >= 10, PATIENCE_SECONDS)

    cluster.add(own_disk=disk)  # while it trains, which grows onto it

    told = ended(growing, code=1)
    assert "NotSharedError: run_root: must be seen by every node" in told
    assert run.read_events()[-1]["kind"] == "failed"
    assert len(losses(run)) >= 10, "what the run has is kept"

    for field, data, run_root in [
        ("run_root", tmp_path / "data", disk / "runs"),
        ("data", disk / "data", tmp_path / "runs"),
    ]:
        told = ended(cluster.convmae("pretrain", *recipe(data, run_root), "--run", field.replace("_", "-")), code=2)
        assert f"error: {field}: must be seen by every node (" in told
        assert re.search(r"\(\S+ \([\d.]+\) does not\)", told) and "take s3://" in told
        assert not (Path(run_root) / field.replace("_", "-") / "recipe.json").exists()
    for field, words in [  # one after the other: with fewer CPUs its tasks might all be on the first node
        ("destination", ("shard", photographs, disk / "second", "--samples-per-shard", "8")),
        ("source", ("shard", disk / "data", tmp_path / "second", "--samples-per-shard", "8")),
        ("URL", ("index", tmp_path / "data", "--out", disk / "index")),
        ("data", ("verify", disk / "data")),
    ]:
        process = cluster.convmae(*map(str, words))
        assert f"error: {field}: must be seen by every node (" in ended(process, code=2)
    assert not (disk / "second" / "manifest.json").exists()
    once = recipe(tmp_path / "data", tmp_path / "runs", max_steps=20)
    ended(cluster.convmae("pretrain", *once, "--run", "both"))
    both = RunDirectory.of(Storage(), str(tmp_path / "runs"), "both")
    assert {row["world_size"] for row in both.read_history()} == {2}, "both nodes see the other disk"
