"""What ranks agree on, and which steps are skipped. Real engines: test_zero_state; whole runs: test_poisoned_runs."""

from __future__ import annotations

import math

import pytest
import torch

from jobs.step.non_finite import FAULT_WORDS, SkippedSteps, fault_of, rollbacks_in_a_row, stretches, write_faults


def agreed(*found: tuple[bool, bool]) -> str:
    """What all ranks say, when each found its loss and gradients finite or not."""
    words = torch.zeros(len(found), FAULT_WORDS)
    for rank, (loss, _) in enumerate(found):
        write_faults(words[rank], torch.tensor([1.0, 2.0 if loss else math.nan]), rank)
    return fault_of(words.sum(0).tolist(), gradients_are_finite=all(gradients for _, gradients in found))


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ([(True, True)] * 3, ""),
        ([(True, True), (True, True), (False, False)], "the loss of rank 2"),
        ([(False, True), (True, True), (True, False)], "the loss of rank 0"),
        ([(False, False), (True, True), (False, False)], "the loss of 2 ranks"),
        ([(True, True), (True, False), (True, True)], "the gradient"),
    ],
)
def test_the_ranks_agree_on_what_is_not_finite(found: list[tuple[bool, bool]], fault: str) -> None:
    assert agreed(*found) == fault


def cut(start: int, stop: int, *ledger: tuple[int, int]) -> list[tuple[int, int, bool]]:
    found = stretches(start, stop, [SkippedSteps(*window) for window in ledger])
    return [(stretch.steps.start, stretch.steps.stop, stretch.skipped) for stretch in found]


def test_a_run_without_rollbacks_is_one_stretch() -> None:
    assert cut(0, 30) == [(0, 30, False)]
    assert cut(30, 30) == []


def test_a_window_is_skipped_from_wherever_a_run_resumes() -> None:
    """Steps 11 to 14 lie at 10 to 13 for the order."""
    assert cut(10, 30, (11, 14)) == [(10, 14, True), (14, 30, False)]
    assert cut(5, 30, (11, 14)) == [(5, 10, False), (10, 14, True), (14, 30, False)]
    assert cut(12, 30, (11, 14)) == [(12, 14, True), (14, 30, False)]
    assert cut(14, 30, (11, 14)) == [(14, 30, False)]


def test_windows_may_overlap_and_reach_to_the_end() -> None:
    assert cut(0, 30, (21, 40), (11, 14), (11, 17)) == [
        (0, 10, False),
        (10, 14, True),
        (14, 17, True),
        (17, 20, False),
        (20, 30, True),
    ]


def test_rollbacks_count_until_something_was_trained_and_kept_between_them() -> None:
    ledger = [SkippedSteps(1, 5), SkippedSteps(11, 14), SkippedSteps(11, 17)]

    assert rollbacks_in_a_row([], SkippedSteps(11, 14)) == 1
    assert rollbacks_in_a_row(ledger[:2], SkippedSteps(11, 17)) == 2
    assert rollbacks_in_a_row(ledger, SkippedSteps(18, 18)) == 3
    assert rollbacks_in_a_row(ledger, SkippedSteps(21, 24)) == 1
