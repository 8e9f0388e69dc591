"""When the ranks save. That they then do, and go on, is tested with real ones (test_main_job, test_trajectory)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.recipes import named_recipe
from jobs.schedule import Schedule
from jobs.trainer import Place, Trainer

RECIPE = named_recipe("tiny").amended({"checkpoint_every_steps": 10, "milestone_epochs": [3]})
EPOCH_STEPS = 7
LAST = RECIPE.epochs * EPOCH_STEPS


def trainer(**fields: Any) -> Any:
    rank: Any = Trainer.__new__(Trainer)
    rank.recipe = RECIPE.amended(fields)
    rank.schedule = Schedule.of(rank.recipe, EPOCH_STEPS)
    rank.place = Place(0, 1, torch.device("cpu"))
    return rank


@pytest.mark.parametrize(
    ("interval", "due"),
    [("steps", [10, 20, 21, 30]), ("seconds", [21]), ("auto", [21])],
)
def test_steps_are_due_by_the_interval_of_steps_alone_milestones_and_the_end_always(
    interval: str, due: list[int]
) -> None:
    rank = trainer(checkpoint_interval=interval)

    assert [step for step in range(1, 31) if rank._is_due(step)] == due
    assert rank._is_due(LAST)


def test_a_wish_that_the_save_fulfils_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor repeats it until it hears of the save; the step before that may bring it once more."""
    rank, saved = trainer(), []
    monkeypatch.setattr("ray.get", lambda reply: reply)
    monkeypatch.setattr("ray.wait", lambda replies, timeout: (replies, []))
    rank.pulse = SimpleNamespace(at=lambda phase, allowed: None)
    rank.saver = SimpleNamespace(begin=lambda commit, write: saved.append(commit))
    rank.trace, rank._quarantine_replies, rank._commit = None, [], lambda: "a commit"
    rank._reply = "save"  # of the step after which the ranks save

    rank._save()

    assert (saved, rank._monitors_wish()) == (["a commit"], "")


def test_a_monitor_that_died_is_seen_before_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took the newest rows of the history along: the steps must be done again."""

    def died(reply: object) -> None:
        raise RuntimeError(reply)

    rank = trainer()
    monkeypatch.setattr("ray.get", died)
    rank.pulse = SimpleNamespace(at=lambda phase, allowed: None)
    rank._reply = "no answer"

    with pytest.raises(RuntimeError, match="no answer"):
        rank._save()
