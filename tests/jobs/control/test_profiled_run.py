"""A profile of one rank of a run of real ranks, while they train."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
from monitored_ranks import MonitoredRanks, long_recipe, made_dataset

from jobs.control.profiling import profiled
from jobs.errors import RunError, RunFailedError
from jobs.rank.step_profile import FLAME_NAME, OPERATORS_NAME, TRACE_NAME
from jobs.run.profile_request import MOST_STEPS


def kill_what_makes_the_files(rank: int, killed: list[int]) -> None:
    """Wait for that process of a rank, and kill it."""
    while not killed:
        for process in psutil.Process(rank).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # such as one that looked for py-spy
                if "jobs.rank.profile_process" in process.cmdline():
                    process.kill()
                    killed.append(process.pid)
        time.sleep(0.001)


def test_a_rank_is_profiled_while_it_trains_and_bad_requests_are_refused(tmp_path: Path) -> None:
    recipe = long_recipe(made_dataset(tmp_path), str(tmp_path / "runs"))
    with MonitoredRanks(recipe, "profiled", tmp_path, world_size=2) as ranks:
        ranks.until(lambda: ranks.monitor.status()["step"] >= 3)
        for rank, steps, refusal in (
            (2, 1, "--rank: must be one of the 2 that train now; got 2"),
            (-1, 1, "--rank: must be one of the 2 that train now; got -1"),
            (0, 0, f"--steps: must be from 1 to {MOST_STEPS}; got 0"),
            (0, 101, f"--steps: must be from 1 to {MOST_STEPS}; got 101"),
        ):
            with pytest.raises(RunError) as caught:
                profiled(ranks.run, rank, steps)
            assert refusal.split(";")[0] in str(caught.value) and str(caught.value).count(refusal.split()[-1])
        assert not ranks.run.storage.exists(ranks.run.path("profile-request.json")), "a refused request leaves nothing"

        event = profiled(ranks.run, 1, 3)

        killed: list[int] = []
        threading.Thread(target=kill_what_makes_the_files, args=(ranks.processes[1].pid, killed), daemon=True).start()
        with pytest.raises(RunFailedError, match=r"the process that makes the files was killed by SIGKILL"):
            profiled(ranks.run, 1, 10)
        step = ranks.monitor.status()["step"]
        ranks.until(lambda: ranks.monitor.status()["step"] > step + 3)
        again = profiled(ranks.run, 1, 1)
        ranks.stop()
        assert not ranks.events("restart") and len(ranks.events("profile")) == 2
        assert len(killed) == len(ranks.events("profile-failed")) == 1

    assert (event["rank"], event["steps"]) == (1, 3) and again["step"] > event["step"]
    folder = ranks.run.path("profiles", f"step-{event['step']:08d}-rank-0001")
    assert event["url"] == folder
    assert set(event["files"]) >= {TRACE_NAME, OPERATORS_NAME}
    trace = json.loads(gzip.decompress((Path(folder) / TRACE_NAME).read_bytes()))
    names = [entry.get("name", "") for entry in trace["traceEvents"]]
    grains = recipe.global_batch_size // recipe.grain // 2
    assert names.count("aten::argsort") == 3 * grains, "each grain of a rank is masked once in a step"
    assert "aten::addmm" in (Path(folder) / OPERATORS_NAME).read_text()
    if FLAME_NAME in event["files"]:
        assert "<svg" in (Path(folder) / FLAME_NAME).read_text()
    else:
        assert event["reason"].startswith(f"no {FLAME_NAME}: ")


def test_a_run_that_does_not_train_is_refused(tmp_path: Path) -> None:
    recipe = long_recipe(made_dataset(tmp_path), str(tmp_path / "runs"))
    ranks = MonitoredRanks(recipe, "over", tmp_path)
    ranks.monitor.end("stopped")

    with pytest.raises(RunError, match=r"must be running to be profiled"):
        profiled(ranks.run, 0, 1)
