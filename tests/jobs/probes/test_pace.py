"""How much CPU time probes take beside a training."""

from __future__ import annotations

import pytest

from jobs.probes.probe_process import Allowance, Pace


class Machine:
    """Time passes while a process sleeps or works; work takes CPU time as well."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds

    def pace(self, share: float, cores: int, *, trained: float = 0.0, used: float = 0.0) -> Pace:
        allowance = Allowance(share, trained, used)
        return Pace(allowance, cores, clock=lambda: self.now, used=lambda: self.used, sleep=self.sleep)


@pytest.mark.parametrize(("share", "cores"), [(0.02, 2), (0.02, 64), (0.5, 1)])
def test_much_work_takes_its_share_of_the_node(share: float, cores: int) -> None:
    machine = Machine()
    pace = machine.pace(share, cores)
    while machine.now < 10_000:
        pace.wait()
        machine.work(0.25)

    assert machine.used / machine.now == pytest.approx(min(1.0, share * cores), rel=0.01)


def test_what_was_saved_is_used_at_once() -> None:
    machine = Machine()
    pace = machine.pace(0.02, 2, trained=1000.0, used=15.0)
    for _ in range(100):
        pace.wait()
        machine.work(0.25)

    assert machine.now == pytest.approx(25.0)  # of the 40 s that it may use by then, 15 were used before


def test_what_was_used_too_much_is_made_up_for() -> None:
    machine = Machine()
    pace = machine.pace(0.02, 2)
    machine.work(8.0)  # imports

    pace.wait()

    assert machine.now == pytest.approx(200.0, abs=1.0)
