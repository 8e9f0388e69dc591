from __future__ import annotations

import itertools
from pathlib import Path

import beside_training
import pytest
from bench_memory import memory_checkpoints
from bench_probes import labelled, probes_every
from beside_training import SIDES, WARM_STEPS, Training, measure, report, slowdowns, watched
from probe_events import probe_events
from ray_nodes import ray_cluster
from testbed import SMALL

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

PROBES = probes_every(2)


def run(mean_seconds: float, cpu_seconds: float = 2.0, probes: int = 0) -> Training:
    return Training(mean_seconds, 0.9 * mean_seconds, cpu_seconds, probes, 3.0 * probes)


def test_the_slowdown_is_the_median_of_the_rounds_each_of_which_has_both_sides() -> None:
    # The machine became twice as slow after the first round; within a round both sides met the same.
    rounds = {
        "without": [run(1.0), run(2.0), run(2.0)],
        "with": [run(1.01, 2.02, 4), run(2.01, 2.0, 4), run(2.06, 2.0, 4)],
    }

    lines = report(rounds, PROBES, cpus=2, cores=8)

    assert slowdowns(rounds, "mean_seconds") == pytest.approx([0.01, 0.005, 0.03])
    assert "training on 2 of 8 cores; medians of 3 runs of each kind" in lines[0]
    assert lines[3].split() == ["with", "probes", "2.0100", "1.8090", "2.0000", "4", "12.0"]
    assert lines[4] == "slower by +1.0%, CPU of the ranks +0.0% (+1.0%, +0.5%, +3.0% in each round)"
    assert lines[5] == "goal <= 2%: reached"
    assert lines[6].startswith("rounds differ by more than the goal")


def test_a_goal_that_is_missed_and_cores_that_are_not_free_are_told() -> None:
    lines = report({"without": [run(1.0)], "with": [run(1.05, 2.0, 1)]}, PROBES, cpus=4, cores=4)

    assert "goal <= 2%: NOT reached" in lines
    assert lines[-1].startswith("no core is free beside the training")


def test_what_a_run_took_is_read_from_its_history_and_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path), "with-0")
    run.claim(named_recipe("tiny"))
    row = {"epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 1, "attempt": 1}
    # The first steps are slow, and one waits for a save.
    seconds = [9.0] * WARM_STEPS + [1.0, 1.0, 4.0, 1.0]
    run.write_history(1, 1, [{**row, "step": step, "step_seconds": took} for step, took in enumerate(seconds, start=1)])
    run.write_events(1, probe_events({0: 0.25, 4: 0.5}))
    beat = {"step": 1, "total_steps": 9, "updated_at_seconds": 1.7e9, "metrics_url": "http://here"}
    steps = iter([1, WARM_STEPS, WARM_STEPS + 1, WARM_STEPS + 1, WARM_STEPS + 3, 0])

    def live(url: str | None) -> int:
        assert url == "http://here"
        step = next(steps, 0)
        run.write_heartbeat({**beat, "state": "running" if step else "finished"})
        return step

    run.write_heartbeat({**beat, "state": "running"})
    monkeypatch.setattr(beside_training, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(beside_training, "live_step", live)
    used = itertools.count(start=10.0, step=3.0)  # at each look, of which only those at a new step count
    monkeypatch.setattr(
        beside_training, "cpu_seconds", lambda _, title: next(used) if title == "RayTrainWorker" else 7.5
    )

    found = watched(None, run, PROBES)  # type: ignore[arg-type]  # its processes are made up

    # Steps 6 and 8 were met at the third and the fifth look.
    assert found == Training(7 / 4, 1.0, 2 * 3.0 / 2, 2, 7.5)


def test_memory_checkpoints_are_counted_as_a_run_counts_them(tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path), "with-0")
    run.claim(named_recipe("tiny"))
    work = memory_checkpoints("auto")
    assert (work.with_it, work.without_it) == ("memory_checkpoint_every_steps=auto", "memory_checkpoint_every_steps=0")
    beat = {"state": "finished", "step": 9, "total_steps": 9, "updated_at_seconds": 1.7e9}
    run.write_heartbeat(beat)
    assert work.count(run) == 0
    run.write_heartbeat({**beat, "memory_checkpoints_total": 4.0})
    assert work.count(run) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_kinds_of_runs_are_measured(tmp_path: Path) -> None:
    """Three minutes on one core."""
    (tmp_path / "cluster").mkdir()
    with ray_cluster(tmp_path / "cluster") as cluster:
        cluster.add(1)
        fields = SMALL | {"data": labelled(cluster, 96), "run_root": f"{cluster.s3.url}/runs", "cpus_per_worker": 1}
        fields |= {
            "epochs": 4,
            "warmup_epochs": 1,
            "milestone_epochs": [],
            "checkpoint_every_steps": 16,
            "max_workers": 1,
        }
        del fields["probes"]
        recipe = (
            "tiny",
            *(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items()),
        )

        rounds = measure(cluster, recipe, PROBES, rounds=1)

    (plain,), (probed,) = (rounds[side] for side in SIDES)
    assert (plain.made, plain.made_cpu_seconds) == (0, 0.0)
    assert probed.made == 3  # before the first step, after two epochs, and at the end
    for training in (plain, probed):
        assert training.cpu_seconds > 0 and 0 < training.median_seconds <= 10 * training.mean_seconds
