"""The interval between checkpoints: in steps, in time, or the cheapest by measured costs (`auto`).

A save costs a stall of training; a failure costs the steps since the newest checkpoint. The duration of an upload adds
the same to the cost of every failure, whatever the interval, so it is only a lower bound of the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from jobs.recipe.simulation import daly_interval_seconds
from jobs.terminal import duration_text

if TYPE_CHECKING:  # it imports torch
    from jobs.recipe.recipe import Recipe

PRIOR_SECONDS = 3600.0
"""Seconds of training, with one failure, that count as observed before a run begins (a Gamma(1) prior of its rate).

Without it a run without failures would never save, and the first failure would decide. It is short since the two errors
differ in cost: expecting failures too often costs more stalls, at 1 s and one failure per hour 1.2 % of the time;
expecting them too rarely costs half a long interval with each. After ten quiet hours it shortens the interval by 5 %.
"""
UPLOADS_APART = 2
"""How many uploads fit between two saves at least, so that a slow one delays nothing."""


@dataclass(frozen=True)
class IntervalRule:
    """What a recipe says about the interval."""

    kind: Literal["steps", "seconds", "auto"]
    every_steps: int
    every_seconds: float
    min_seconds: float
    max_seconds: float

    @classmethod
    def of(cls, recipe: Recipe) -> IntervalRule:
        """The rule of `recipe`."""
        return cls(
            recipe.checkpoint_interval,
            recipe.checkpoint_every_steps,
            recipe.checkpoint_every_seconds,
            recipe.checkpoint_min_seconds,
            recipe.checkpoint_max_seconds,
        )

    def bounded(self, seconds: float) -> float:
        """`seconds` within the bounds of `auto`."""
        return min(max(seconds, self.min_seconds), self.max_seconds)

    def simulated_steps(self, step_seconds: float, stall_seconds: float, mtbf_seconds: float) -> int:
        """The interval in steps that follows from the rule if these costs stay as they are; at least one.

        Args:
            step_seconds: Of one step.
            stall_seconds: Of one save.
            mtbf_seconds: Mean time between failures of the worker group.
        """
        if self.kind == "steps":
            return self.every_steps
        best = self.bounded(daly_interval_seconds(stall_seconds, mtbf_seconds))
        return max(1, round((best if self.kind == "auto" else self.every_seconds) / step_seconds))


class Costs(NamedTuple):
    """The measured costs of a run so far."""

    stall_seconds: float
    """How long training pauses for a save."""
    upload_seconds: float
    """From the start of a save until its commit."""
    restart_seconds: float
    """From the last step before a failure to the first after it; 0 if there was none."""
    failures: int
    trained_seconds: float
    """Worker-seconds so far, divided by the present number of workers: each can fail, so more of them fail sooner."""

    @property
    def mtbf_seconds(self) -> float:
        """Expected mean time between failures (PRIOR_SECONDS).

        A group can also fail while it starts, so restarts are part of the time in which it can. This is how their cost
        counts: the cheapest interval depends on the stall and on this alone.
        """
        could_fail_seconds = self.trained_seconds + self.failures * self.restart_seconds
        return (could_fail_seconds + PRIOR_SECONDS) / (self.failures + 1)


class Decision(NamedTuple):
    """An interval and its reason."""

    seconds: float
    """From the start of one save to that of the next."""
    reason: str
    """For people, in one line."""


def auto_interval(rule: IntervalRule, costs: Costs | None) -> Decision:
    """The cheapest interval by Daly's estimate, within the rule's bounds.

    Args:
        rule: Of kind `auto`.
        costs: None before the first checkpoint is committed.

    Source: Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37.
    """
    if costs is None:
        seconds = rule.bounded(rule.every_seconds)
        return Decision(seconds, f"every {duration_text(seconds)} until a checkpoint is committed")
    # Daly's interval excludes the stall itself.
    best = daly_interval_seconds(costs.stall_seconds, costs.mtbf_seconds) + costs.stall_seconds
    uploads = UPLOADS_APART * costs.upload_seconds
    seconds = rule.bounded(max(best, uploads))
    failures = "no failure" if not costs.failures else f"{costs.failures} failure{'s' if costs.failures > 1 else ''}"
    parts = [
        f"a save stalls {costs.stall_seconds:.2g} s",
        f"{failures} in {duration_text(costs.trained_seconds)} of training "
        f"(one in {duration_text(costs.mtbf_seconds)} expected)",
    ]
    if costs.restart_seconds:
        parts.append(f"a restart costs {duration_text(costs.restart_seconds)}")
    if seconds != best:
        parts.append(f"these alone would make it {duration_text(best)}, but {_bound(rule, costs, seconds)}")
    return Decision(seconds, f"every {duration_text(seconds)}: {', '.join(parts)}")


def _bound(rule: IntervalRule, costs: Costs, seconds: float) -> str:
    if seconds == rule.max_seconds:
        return "checkpoint_max_seconds bounds it"
    if seconds == rule.min_seconds:
        return "checkpoint_min_seconds bounds it"
    return f"an upload takes {duration_text(costs.upload_seconds)}"
