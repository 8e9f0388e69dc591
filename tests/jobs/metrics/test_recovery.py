from __future__ import annotations

import pytest

from jobs.metrics.recovery import PHASES, Recovery


def test_the_phases_make_up_the_time_down() -> None:
    spent = Recovery(100.0, 100.5, 106.0, 107.5, 108.0).seconds(109.25)

    assert spent == {"down": 9.25, "detect": 0.5, "start": 5.5, "load": 1.5, "build": 0.5, "first_step": 1.25}
    assert list(spent) == ["down", *PHASES]


@pytest.mark.parametrize(
    ("recovery", "spent"),
    [
        (Recovery(100.0, None, 106.0, 107.0, 108.0), {"down": 9.0, "start": 6.0, "load": 1.0, "build": 1.0}),
        (Recovery(None, 100.0, 106.0, 107.0, 108.0), {"down": 9.0, "detect": 0.0, "start": 6.0, "load": 1.0}),
        (Recovery(100.0, 101.0, 106.0, 107.0), {"down": 9.0, "detect": 1.0, "load": 1.0, "first_step": 2.0}),
    ],
)
def test_what_was_not_recorded_is_part_of_the_next_phase(recovery: Recovery, spent: dict[str, float]) -> None:
    found = recovery.seconds(109.0)

    assert found.items() >= spent.items()
    assert sum(found[phase] for phase in PHASES if phase in found) == found["down"]


def test_a_clock_that_is_behind_makes_no_phase_negative() -> None:
    spent = Recovery(100.0, 101.0, 100.2, 102.0, 103.0).seconds(104.0)

    assert spent["start"] == 0.0
    assert sum(spent[phase] for phase in PHASES) == spent["down"] == 4.0
