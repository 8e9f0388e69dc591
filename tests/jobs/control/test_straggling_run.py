"""Runs of real ranks, one of which is slow: it is named, with what slows it, and no other is."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from monitored_ranks import MonitoredRanks, long_recipe, made_dataset

SLOW = 1
FACTOR = 2.0
"""Three ranks on two cores are not equally fast."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_dataset(tmp_path_factory.mktemp("data"))


class Bursts:
    """While active, a process is stopped most of the time, a twentieth of a second at once."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._stop_and_continue)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _stop_and_continue(self) -> None:
        while not self._ended.wait(0.015):
            os.kill(self._pid, signal.SIGSTOP)
            self._ended.wait(0.06)
            os.kill(self._pid, signal.SIGCONT)


def test_a_rank_that_is_stopped_in_bursts_is_named_and_well_again_after_them(data: str, tmp_path: Path) -> None:
    recipe = long_recipe(data, str(tmp_path / "runs"), straggler_factor=FACTOR, leave_out_stragglers=True)
    with MonitoredRanks(recipe, "bursts", tmp_path) as ranks:
        ranks.until(lambda: ranks.monitor.status()["step"] >= 30)
        assert not ranks.events("straggler"), "nobody is slow"

        with Bursts(ranks.processes[SLOW].pid):
            ranks.until(lambda: ranks.events("straggler"))
        ranks.until(lambda: ranks.events("straggler-ended"))
        ranks.stop()

        (event,) = ranks.events("straggler")
        assert (event["rank"], event["host"], event["part"]) == (SLOW, f"host-{SLOW}", "computing")
        assert event["own_seconds"] > FACTOR * event["others_seconds"] > 0
        assert [ended["rank"] for ended in ranks.events("straggler-ended")] == [SLOW]
        assert ranks.monitor.nodes_left_out() == {f"node-{SLOW}"}
        assert not ranks.events("restart"), "nothing was restarted for it"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["reading", "decoding"])
def test_a_rank_whose_images_come_late_is_named_with_the_reason(data: str, tmp_path: Path, part: str) -> None:
    recipe = long_recipe(data, str(tmp_path / "runs"), straggler_factor=FACTOR)
    with MonitoredRanks(recipe, part, tmp_path, **{f"rank_{SLOW}": part}) as ranks:
        ranks.until(lambda: ranks.events("straggler"))
        ranks.stop()

        assert [(event["rank"], event["part"]) for event in ranks.events("straggler")] == [(SLOW, part)]
