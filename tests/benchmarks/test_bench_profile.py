"""What a profile cost, from a history and events whose costs are known. The measuring itself is run by hand."""

from __future__ import annotations

import pytest
from bench_profile import Cost, costs


def test_a_profile_costs_what_the_steps_after_it_take_longer() -> None:
    seconds = [0.5] * 10 + [0.8] * 3 + [2.5, 2.4] + [0.5] * 7 + [1.5]
    history = [{"step": step, "step_seconds": each} for step, each in enumerate(seconds, 1)]
    events = [{"kind": "start", "step": 0}, {"kind": "profile", "step": 13, "steps": 3}]

    (cost,) = costs(history, events, apart=8)

    assert cost == Cost(before=0.5, profiled=0.8, still_seconds=2.0, after=0.5, slower=pytest.approx(0.5))
