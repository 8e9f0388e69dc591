"""A rank's own time on a CPU. On a GPU: tests/gpu/test_steps.py."""

from __future__ import annotations

import torch

from jobs.step.compute_probe import ComputeProbe


def test_the_stretches_of_a_step_add_up_and_what_lies_between_does_not_count() -> None:
    now = 0.0
    probe = ComputeProbe(torch.device("cpu"), lambda: now)
    assert not probe.poll().metrics, "nothing was computed yet"

    for seconds in (1.0, 2.0):
        with probe.computing():
            now += seconds
        now += 100.0  # waits for others
    probe.stepped(images=8)
    assert probe.poll().metrics == {"compute_seconds": 3.0, "images": 8}

    with probe.computing():
        now += 0.5
    assert probe.poll().metrics["compute_seconds"] == 3.0, "of the last whole step"
    probe.stepped(images=4)
    assert probe.poll().metrics == {"compute_seconds": 0.5, "images": 4}
