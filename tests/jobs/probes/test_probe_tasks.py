"""The process that probes, on a Ray cluster of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from labelled_data import STORAGE, labelled_dataset
from patience import wait_until
from ray_here import ray_here
from testbed import processes

from jobs.errors import EvaluationError, ProbeDiedError
from jobs.probes.probe_plan import RunProbes
from jobs.probes.probe_tasks import ProbeTasks
from jobs.probes.run_probe import ProbedData
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import RunDirectory

pytestmark = pytest.mark.slow  # half a minute together

SMALL = {"model.image_size": 32, "model.embed_dim": [16, 24, 32], "model.depth": [1, 1, 1], "model.num_heads": 2}
RECIPE = named_recipe("tiny").amended(SMALL)


@pytest.fixture(scope="module")
def cluster(token_of_this_process: str) -> Iterator[None]:
    with ray_here(token_of_this_process, num_cpus=1):
        yield


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labelled_dataset(tmp_path_factory.mktemp("labelled"), {"ant": 16, "bee": 16, "cat": 16}).url


def tasks_on(url: str, folder: Path) -> ProbeTasks:
    probes = RunProbes(ProbedData(url), "", RECIPE, Schedule.of(RECIPE, 1))
    return ProbeTasks(RunDirectory.of(STORAGE, str(folder), "first"), probes, node_share=1e9)


def probing() -> list[psutil.Process]:
    return processes("ray::ProbeProcess", psutil.Process().children(recursive=True))


def test_a_probe_takes_idle_cpu_time_until_nothing_trains(cluster: None, labelled: str, tmp_path: Path) -> None:
    tasks = tasks_on(labelled, tmp_path)
    found = tasks(tasks._probes.control)
    assert 0 <= found["knn_20"] <= 1 and found["tested"] == 9
    (process,) = probing()
    assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE

    tasks.hurry()
    again = tasks(tasks._probes.control)

    assert {**again, "duration_seconds": 0} == {**found, "duration_seconds": 0}
    (hurried,) = probing()
    assert hurried.pid != process.pid
    assert os.sched_getscheduler(hurried.pid) == os.SCHED_OTHER
    hurried.kill()
    wait_until("its end", lambda: not probing(), 30)


def test_a_death_and_data_that_is_gone_are_told_apart(cluster: None, labelled: str, tmp_path: Path) -> None:
    tasks = tasks_on(labelled, tmp_path)
    told: list[Exception] = []

    def probe() -> None:
        try:
            tasks(tasks._probes.control)
        except Exception as error:
            told.append(error)

    thread = threading.Thread(target=probe)
    thread.start()
    wait_until("its process", lambda: bool(probing()), 60)
    probing()[0].kill()
    thread.join(60)

    assert isinstance(told[0], ProbeDiedError)
    flat = labelled_dataset(tmp_path / "flat", {"ant": 8, "bee": 8}, has_labels=False).url
    with pytest.raises(EvaluationError, match="must have labels"):
        tasks_on(flat, tmp_path)(tasks._probes.control)
