"""Runs and data sets in folders, named as people write them: with a slash at the end, relative, from inside."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from testbed import Command, small_recipe

from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage


@pytest.fixture
def folder(convmae: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a data set `ds`."""
    monkeypatch.chdir(tmp_path)
    convmae("shard", str(photographs), "./ds/", "--samples-per-shard", "40")
    return tmp_path


@pytest.mark.slow
def test_a_run_in_a_folder_is_submitted_followed_and_found_by_its_path(convmae: Command, folder: Path) -> None:
    out, _ = convmae("submit", *small_recipe("ds/", run_root="./runs/", max_steps=2), "--run", "one", "--follow")
    assert "one: finished at step 2 of 2" in out

    for words in (
        ["runs/one"],
        ["./runs/one/"],
        [f"{folder}/runs/one"],
        ["one", "--run-root", f"file://{folder}/runs/"],
    ):
        out, _ = convmae("status", *words)
        assert out.splitlines()[1].split() == ["state", "finished"]
    assert f"1 runs under {folder}/runs" in convmae("list", "--run-root", "runs/")[0]
    same = small_recipe(f"file://{folder}/ds", run_root=f"{folder}//runs", max_steps=2)
    out, _ = convmae("submit", *same, "--run", "one")
    assert f"`convmae report {folder}/runs/one` shows it" in out


@pytest.mark.slow
def test_a_job_that_ends_before_its_run_begins_leaves_a_failed_run(convmae: Command, folder: Path) -> None:
    run = RunDirectory.of(Storage(), str(folder / "runs"), "early")
    process = convmae.start("submit", *small_recipe("ds", run_root="runs", max_steps=2), "--run", "early", "--follow")
    while not run.exists():  # checked and claimed; its job takes seconds to start
        assert process.poll() is None
        time.sleep(0.05)
    (folder / "ds" / "manifest.json").rename(folder / "away.json")
    _, err = process.communicate(timeout=300)

    assert process.returncode == 1
    assert err.count("\n") == 1 and "dataset: must hold a manifest.json" in err
    assert run.read_heartbeat()["state"] == "failed"
    assert "must hold a manifest.json" in run.read_events()[-1]["reason"]
    (folder / "away.json").rename(folder / "ds" / "manifest.json")
    out, _ = convmae("resume", "runs/early", "--follow")
    assert "early: finished at step 2 of 2" in out
