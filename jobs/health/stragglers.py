"""Stragglers: ranks that make the others wait, since they read, decode or compute more slowly. Pure.

All ranks finish a step together, so that its wall time names nobody. Each rank's own time does: its wait for a batch
and its computing before it meets the others. A rank is a straggler while its own time, on average over a window of
steps, exceeds the median of the others' by a factor. Its longest steps are left out: one long pause does not count, and
a rank that waits for a whole window of the order now and then does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from jobs.health.interface import Cause, Diagnose, HealthState
from jobs.metrics.rank_figures import FigureTable, RankFigures

Part = Literal["reading", "decoding", "computing"]
PARTS: tuple[Part, ...] = get_args(Part)

WINDOW_STEPS = 20
PAUSES = 2
"""Longest steps of each rank in a window that do not count: a save, a collection of garbage."""
LEAST_EXCESS_SECONDS = 0.01
"""Of a step; what is less costs nobody anything, and may be a process that was not scheduled at once."""


@dataclass(frozen=True)
class Straggler(Diagnose):
    """A rank that makes the others wait."""

    rank: int
    part: Part
    """In which it loses most."""
    own_seconds: float
    """Of a step, in which the others wait for it."""
    others_seconds: float
    """The median of the others, for as many images."""


@dataclass(frozen=True)
class Spell:
    """The steps in which a rank was a straggler."""

    straggler: Straggler
    """As it was when the spell began."""
    first_step: int
    began_at: float
    """Monotonic seconds."""


class StragglerEvaluator:
    """The judge of which ranks are stragglers now; an `Evaluator`.

    Owns: what it saw in the last steps of the attempt. Concurrency: none; its owner locks. Blocking: O(ranks).
    """

    def __init__(self, factor: float, window_steps: int = WINDOW_STEPS) -> None:
        """Begin an attempt.

        Args:
            factor: Above 1: by which a slow rank's own time exceeds the median of the others'.
            window_steps: Steps that are looked at together.
        """
        self._factor = factor
        self._own: deque[NDArray[np.float64]] = deque(maxlen=window_steps)
        """(parts, ranks) of each step, for an image."""
        self._stragglers: NDArray[np.bool_] | None = None

    def evaluate(self, state: HealthState) -> Sequence[Straggler]:
        """The ranks that are stragglers after one more step, in their order; empty until a window is full."""
        assert state.reported is not None
        images = state.reported[:, RankFigures._fields.index("images")]
        if len(images) < 2 or not images.all():  # alone, or of a first step, before which nothing was computed
            return ()
        self._own.append(own_seconds(state.reported) / images)
        if len(self._own) < (self._own.maxlen or 0):
            return ()
        own = _means_without_pauses(np.stack(self._own)) * images
        others = np.stack([medians_of_others(part / images) * images for part in (*own, own.sum(0))])
        before = np.zeros(len(images), bool) if self._stragglers is None else self._stragglers
        # Half of it lets a spell last, so that a rank at the limit does not begin one after the other.
        limit = np.where(before, (self._factor - 1) / 2, self._factor - 1) * others[-1]
        excess = own.sum(0) - others[-1]
        self._stragglers = (excess > limit) & (excess > LEAST_EXCESS_SECONDS)
        return [_straggler(int(rank), own, others) for rank in np.flatnonzero(self._stragglers)]


def _means_without_pauses(own: NDArray[np.float64]) -> NDArray[np.float64]:
    """(parts, ranks) means of (steps, parts, ranks), of each rank without its longest steps."""
    kept = np.argsort(own.sum(1), axis=0)[:-PAUSES]
    means: NDArray[np.float64] = np.take_along_axis(own, kept[:, None, :], axis=0).mean(0)
    return means


def _straggler(rank: int, own: NDArray[np.float64], others: NDArray[np.float64]) -> Straggler:
    part = PARTS[int((own - others[:-1])[:, rank].argmax())]
    mine, median = float(own[:, rank].sum()), float(others[-1, rank])
    reason = f"rank {rank} takes {mine:.3f} s of its own for a step, others {median:.3f} s; it loses most in {part}"
    return Straggler(Cause.NO_PROGRESS, reason, (rank,), rank, part, mine, median)


def own_seconds(ranks: FigureTable) -> NDArray[np.float64]:
    """(parts, ranks) seconds of a step that each rank took by itself, in the order of PARTS."""
    column = RankFigures._fields.index
    wait, read = ranks[:, column("data_wait_seconds")], ranks[:, column("read_wait_seconds")]
    return np.stack([read, wait - read, ranks[:, column("compute_seconds")]])


def medians_of_others(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each of at least two values the median of all but itself, which it cannot pull to its side."""
    order = np.argsort(values, kind="stable")
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    ordered, others = values[order], len(values) - 1

    def other(number: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.where(place > number, ordered[number], ordered[number + 1])
        return found

    return (other((others - 1) // 2) + other(others // 2)) / 2


class StragglerWatch:
    """The spells of an attempt: which began with the newest step, and which ended. Pure: the clock is an argument.

    Owns: the evaluator, and the spells that last. Concurrency: none; its owner locks.
    """

    def __init__(self, factor: float) -> None:
        """Begin.

        Args:
            factor: Of `StragglerEvaluator`.
        """
        self._factor = factor
        self._evaluator = StragglerEvaluator(factor)
        self._spells: dict[int, Spell] = {}

    def begin_attempt(self) -> Sequence[Spell]:
        """Forget the ranks of earlier attempts; returns the spells that end with these."""
        ended, self._spells = list(self._spells.values()), {}
        self._evaluator = StragglerEvaluator(self._factor)
        return ended

    def see(self, ranks: FigureTable, step: int, now: float) -> tuple[Sequence[Spell], Sequence[Spell]]:
        """Take a finished step.

        Args:
            ranks: The figures of each rank.
            step: Its number.
            now: Monotonic seconds.

        Returns:
            The spells that begin with it, and those that ended before it.
        """
        found = {each.rank: each for each in self._evaluator.evaluate(HealthState(reported=ranks))}
        ended = [self._spells.pop(rank) for rank in sorted(self._spells.keys() - found)]
        began = [Spell(found[rank], step, now) for rank in sorted(found.keys() - self._spells)]
        self._spells |= {spell.straggler.rank: spell for spell in began}
        return began, ended

    @property
    def count(self) -> int:
        """Ranks that are stragglers now."""
        return len(self._spells)
