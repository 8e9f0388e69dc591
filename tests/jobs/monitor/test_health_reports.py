"""What the monitor makes of slow ranks and failed checks. Real ranks: test_straggling_run.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from monitored_runs import READING, FakeClock, Start, begin, scraped

from jobs.health.stragglers import WINDOW_STEPS
from jobs.metrics.rank_figures import RankFigures
from jobs.monitor.monitor import RunMonitor
from jobs.rank.watchdog import Pulse
from jobs.run.directory import RunDirectory
from pipeline.host.process_identity import ProcessIdentity


@pytest.fixture
def start(start: Start) -> Iterator[Start]:
    """Monitors that end with the test: no rank speaks any more, and they would look for those that hang."""
    made: list[RunMonitor] = []

    def make(**settings: Any) -> RunMonitor:
        made.append(start(**settings))
        return made[-1]

    yield make
    for monitor in made:
        monitor.end("stopped")


def train(monitor: RunMonitor, steps: range, *compute_seconds: float) -> None:
    ranks = [RankFigures(step_seconds=0.5, compute_seconds=seconds, images=32) for seconds in compute_seconds]
    for step in steps:
        row = {"step": step, "epoch": 0, "loss": 1.0, "learning_rate": 1e-3, "world_size": len(ranks), "attempt": 1}
        monitor.record(
            {**row, "step_seconds": 0.5, "data_wait_seconds": 0.0}, gradient_norm=0.5, reading=READING, ranks=ranks
        )


def speak(monitor: RunMonitor, rank: int, attempt: int = 1) -> None:
    here = ProcessIdentity.here()
    monitor.pulse(Pulse(attempt, rank, f"host-{rank}", f"node-{rank}", here, "", "step", 1, 0.0))


def events(run: RunDirectory, monitor: RunMonitor, kind: str) -> list[dict[str, object]]:
    monitor.flush()
    return [event for event in run.read_events() if event["kind"] == kind]


def test_a_spell_is_one_event_with_rank_host_and_part_and_one_when_it_ends(
    start: Start, run: RunDirectory, clock: FakeClock
) -> None:
    clock.tick_seconds = 0.001
    monitor = start(monotonic=clock)
    begin(monitor, world_size=3)
    speak(monitor, 1)
    train(monitor, range(1, 31), 0.1, 0.3, 0.1)

    (event,) = events(run, monitor, "straggler")
    assert (event["step"], event["rank"], event["host"], event["part"]) == (WINDOW_STEPS, 1, "host-1", "computing")
    assert (event["own_seconds"], event["others_seconds"]) == (0.3, 0.1)
    assert str(event["reason"]).startswith("rank 1 on host-1 takes 0.300 s of its own for a step, others 0.100 s")
    series = scraped(monitor)
    assert (series["convmae_straggler_ranks"], series["convmae_straggler_spells_total"]) == (1, 1)
    assert (series["convmae_rank_compute_seconds 0"], series["convmae_rank_compute_seconds 1"]) == (0.1, 0.3)
    assert not events(run, monitor, "straggler-ended")

    clock.seconds += 50
    train(monitor, range(31, 61), 0.1, 0.1, 0.1)

    (ended,) = events(run, monitor, "straggler-ended")
    assert (ended["rank"], ended["first_step"]) == (1, WINDOW_STEPS)
    assert ended["seconds"] == pytest.approx(50, abs=1)
    assert scraped(monitor)["convmae_straggler_ranks"] == 0
    assert monitor.nodes_left_out() == set(), "the recipe does not say so"


def test_a_spell_ends_with_its_attempt(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor, world_size=2)
    train(monitor, range(1, 31), 0.1, 0.3)
    monitor.worker_failed("rank 1: lost", remedy="restart")

    begin(monitor, world_size=2, resume_step=20)

    kinds = [event["kind"] for event in run.read_events()]
    assert kinds == ["start", "straggler", "straggler-ended", "restart"]
    assert scraped(monitor)["convmae_straggler_ranks"] == 0


def test_the_node_of_a_straggler_is_left_out_where_the_recipe_says_so(start: Start, run: RunDirectory) -> None:
    monitor = start(leave_out_stragglers=True)
    begin(monitor, world_size=3)
    for rank in range(3):
        speak(monitor, rank)

    train(monitor, range(1, 31), 0.1, 0.1, 0.4)

    assert monitor.nodes_left_out() == {"node-2"}
    (event,) = events(run, monitor, "straggler")
    assert str(event["reason"]).endswith("its node is left out at the next restart")


def test_nodes_that_fail_their_check_are_named_counted_and_left_out(start: Start, run: RunDirectory) -> None:
    monitor = start()

    monitor.preflight_failed({"node-7": "gpu-7: the check of its memory failed: 3 of 8 words differ"})

    assert monitor.nodes_left_out() == {"node-7"}
    (event,) = events(run, monitor, "preflight-failed")
    assert event["reason"] == "gpu-7: the check of its memory failed: 3 of 8 words differ"
    assert scraped(monitor)["convmae_preflight_failures_total"] == 1


@pytest.mark.parametrize("speaks", [False, True])
def test_a_rank_that_has_not_spoken_yet_is_named_without_its_host(
    start: Start, run: RunDirectory, speaks: bool
) -> None:
    monitor = start(leave_out_stragglers=True)
    begin(monitor, world_size=2)
    if speaks:
        speak(monitor, 0, attempt=7)  # of another attempt

    train(monitor, range(1, 31), 0.4, 0.1)

    (event,) = events(run, monitor, "straggler")
    assert event["host"] == "" and monitor.nodes_left_out() == set()
