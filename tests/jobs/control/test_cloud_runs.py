"""A run whose data and directory lie on Google's or Azure's store: ingest, lease, commits, a kill, resume, weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cloud_emulators import BUCKET, emulator, why_none
from made_up_run import MATERIAL
from patience import wait_until
from ray_nodes import Cluster, ray_cluster
from testbed import TILES, is_consolidated, losses, small_recipe
from zero_material import commit_state

from jobs.checkpoint.checkpoint import CLAIMS, committed_steps, latest_commit, read_commit, write_commit
from jobs.consolidation.consolidate import consolidate
from jobs.errors import OvertakenError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.ingest.photographs import cut_tiles
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

EPOCHS = 20
STEPS = EPOCHS * TILES // 12
PATIENCE_SECONDS = 600


@pytest.fixture(params=["gs", "az"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """URL of an empty bucket, and the environment of those who reach it."""
    if reason := why_none(request.param):
        pytest.skip(reason)
    with emulator(request.param, tmp_path_factory.mktemp(request.param)) as environment:
        yield f"{request.param}://{BUCKET}", environment


@pytest.fixture
def cluster(store: tuple[str, Mapping[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster(tmp_path_factory.mktemp("cluster"), lambda s3: store[1]) as cluster:
        cluster.add(2)
        yield cluster


def test_commits_are_fenced_and_what_was_committed_is_found_and_consolidated(
    store: tuple[str, Mapping[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, environment = store
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run, recipe = RunDirectory.of(Storage(retry_seconds=20), f"{url}/runs", "fenced"), named_recipe("tiny")
    assert run.claim(recipe) and not run.claim(recipe)
    commit_state(run, recipe, MATERIAL, step=5, stage=2, world_size=2)
    first = read_commit(run, 5)

    second = replace(first, claim=2, driver="another")
    write_commit(run, second)  # replaces what a predecessor left
    with pytest.raises(OvertakenError, match="another"):
        write_commit(run, replace(first, claim=1))

    assert committed_steps(run) == [5] and latest_commit(run) == second
    with hold_lease(run.storage, run.path(CLAIMS), "drives", on_wait=pytest.fail) as ruler:
        write_commit(run, replace(second, claim=ruler.number + 1, driver="a third"))
        with pytest.raises(OvertakenError, match="is driven by"):
            write_commit(run, replace(second, claim=ruler.number - 1))
    consolidate(run)
    assert is_consolidated(run, 5)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_whose_driver_is_killed_resumes(
    cluster: Cluster, store: tuple[str, Mapping[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, environment = store
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cut_tiles(tmp_path, TILES, seed=0)
    sharding = cluster.convmae("shard", str(tmp_path), f"{url}/data", "--samples-per-shard", "40")
    assert sharding.wait(PATIENCE_SECONDS) == 0, sharding.communicate()
    fields = {"epochs": EPOCHS, "checkpoint_every_steps": 10, "run_root": f"{url}/runs", "device": "cpu"}
    fields |= {"precision": "fp32", "cpus_per_worker": 1.0, "loader_threads": 1, "min_workers": 2, "max_workers": 2}
    command = ("pretrain", *small_recipe(f"{url}/data", **fields), "--run", "cloud")
    run = RunDirectory.of(Storage(), f"{url}/runs", "cloud")

    first = cluster.convmae(*command)
    wait_until("a commit", lambda: bool(committed_steps(run)) or first.poll() is not None, PATIENCE_SECONDS)
    first.kill()
    out, err = first.communicate()
    assert first.returncode == -9, out + err
    second = cluster.convmae(*command)
    out, err = second.communicate(timeout=PATIENCE_SECONDS)

    assert second.returncode == 0, out + err
    assert len(losses(run)) == STEPS
    assert [read_commit(run, step).claim for step in committed_steps(run)[-1:]] == [2]
    assert is_consolidated(run, STEPS)
