"""Goodput of a run, measured from its events: the counterpart of what jobs.recipe.simulation predicts.

Time is counted from the start event of the first attempt (its workers exist, their engine is not built yet) to the
newest committed checkpoint, since later steps may be lost. Time between the end of a run and its resumption is not
counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from jobs.metrics.utilization import GroupCompute
from jobs.recipe.simulation import Scenario

_ENDINGS = frozenset({"finished", "stopped", "failed"})


@dataclass(frozen=True)
class Goodput:
    """A run up to its newest checkpoint, in figures."""

    steps: int
    wall_seconds: float
    step_seconds: float
    """Of an undisturbed step, on the most workers that the run had; the mean, where images change their size."""
    interval_steps: int
    """Between two checkpoints of one attempt; the median."""
    stall_seconds: float
    """How long training paused for one checkpoint; the mean."""
    restart_seconds: float
    """From the last step of an attempt until the next one could train; the mean, 0 without restarts."""
    restarts: int
    """Restarts and resizes."""
    lost_steps: int
    """Steps that were redone after them."""

    @property
    def ratio(self) -> float:
        """The wall-clock of undisturbed steps, divided by that of the run."""
        return self.steps * self.step_seconds / self.wall_seconds

    def scenario(self, *, nodes: int, min_nodes: int, mtbf_seconds: float, replace_seconds: float) -> Scenario:
        """The scenario of a run like this one; the arguments are those of `Scenario`.

        The simulation begins with a start of `restart_seconds`, of which `wall_seconds` here has only the engine.
        """
        return Scenario(
            steps=self.steps,
            step_seconds=self.step_seconds,
            nodes=nodes,
            min_nodes=min_nodes,
            mtbf_seconds=mtbf_seconds,
            replace_seconds=replace_seconds,
            restart_seconds=self.restart_seconds,
            stall_seconds=self.stall_seconds,
            interval_steps=self.interval_steps,
        )


@dataclass(frozen=True)
class _Save:
    """One committed checkpoint."""

    attempt: int
    world_size: int
    step: int
    began_at: float
    stall_seconds: float


def measured_goodput(events: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """The goodput of a run.

    Args:
        events: All of them, oldest first (RunDirectory.read_events).

    Returns:
        None before an attempt has committed two checkpoints, between which steps are timed; and if the events cover
        no time.
    """
    attempts = [event for event in events if "steps_redone" in event]
    saves = list(_saves(events))
    stretches = [(a, b) for a, b in itertools.pairwise(saves) if a.attempt == b.attempt and a.step < b.step]
    if not stretches or not attempts:
        return None
    last, resumed = saves[-1], _resumed(events)
    step_seconds = _step_seconds(stretches, range(attempts[0]["step"], last.step), _size_changes(events))
    restarts = [event for event in attempts[1:] if event["at_seconds"] <= last.began_at]
    recovered = (event for event in events if event["kind"] == "recovered")
    down = [event["down_seconds"] for event in recovered if event["attempt"] not in resumed]
    ended_at = last.began_at + last.stall_seconds
    wall_seconds = ended_at - attempts[0]["at_seconds"] - _stopped_seconds(events)
    if wall_seconds <= 0:  # the clock was set back, or the events are made up
        return None
    return Goodput(
        steps=last.step - attempts[0]["step"],
        wall_seconds=wall_seconds,
        step_seconds=step_seconds,
        interval_steps=round(median(b.step - a.step for a, b in stretches)),
        stall_seconds=fmean(save.stall_seconds for save in saves),
        # The first step of the new attempt is not lost time.
        restart_seconds=max(0.0, fmean(down) - step_seconds) if down else 0.0,
        restarts=len([event for event in restarts if event["attempt"] not in resumed]),
        lost_steps=sum(event["steps_redone"] for event in restarts),
    )


def _step_seconds(stretches: Sequence[tuple[_Save, _Save]], steps: range, changes: Sequence[int]) -> float:
    """Of a step between two saves, on the most workers; the mean over the sizes of images.

    Args:
        stretches: Between two saves each.
        steps: Of the run, from 0.
        changes: Those with which images get another size.
    """
    most = max(a.world_size for a, _ in stretches)
    each = [
        (a.step, b.step, (b.began_at - a.began_at - a.stall_seconds) / (b.step - a.step))
        for a, b in stretches
        if a.world_size == most
    ]
    changes, total = [step for step in changes if steps.start < step < steps.stop], 0.0
    whole = steps.stop - steps.start
    for first, stop in itertools.pairwise([steps.start, *changes, steps.stop]):
        inside = [seconds for begin, end, seconds in each if first <= begin and end <= stop]
        seconds = median(inside or [seconds for *_, seconds in each])  # or none was saved twice with this size
        total += ((stop - first) / whole if whole else 1.0) * seconds
    return total


def _size_changes(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps, from 0, with which images get another size."""
    computes = list(GroupCompute.of_attempts(events).values())
    return [first - 1 for first, _ in computes[-1].step_flops_from if first > 1] if computes else []


def _saves(events: Sequence[Mapping[str, Any]]) -> Iterator[_Save]:
    world_size = 0
    for event in events:
        world_size = event.get("world_size", world_size)
        if event["kind"] == "checkpoint":
            began_at = event["at_seconds"] - event["duration_seconds"]
            yield _Save(event["attempt"], world_size, event["step"], began_at, event["stall_seconds"])


def _breaks(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each event that ended the run, and the one by which it was resumed."""
    turns = [event for event in events if "steps_redone" in event or event["kind"] in _ENDINGS]
    pairs = itertools.pairwise(turns)
    return ((end, start) for end, start in pairs if end["kind"] in _ENDINGS and "steps_redone" in start)


def _resumed(events: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """Attempts that resumed a run that had ended."""
    return frozenset(start["attempt"] for _, start in _breaks(events))


def _stopped_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(start["at_seconds"] - end["at_seconds"]) for end, start in _breaks(events))
