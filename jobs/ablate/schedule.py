"""The order of work of an ablation: which run is submitted when, and evaluated when it has finished.

What is done is found out, never remembered: a command that was killed begins again by looking at the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jobs.ablate.spec import Trial
from jobs.errors import RunFailedError
from pipeline.errors import UserError

TICK_SECONDS = 2.0
FINISHED = "finished"


class Runs(Protocol):
    """The runs on a cluster; a test gives others."""

    def is_finished(self, trial: Trial) -> bool:
        """Whether there is nothing left to train."""

    def job_of(self, trial: Trial) -> str:
        """Who works on the run now; empty if nobody does."""

    def begin(self, trial: Trial) -> str:
        """Submit it, anew or from its newest checkpoint; returns who works on it, empty if it was finished.

        Raises:
            UserError, RunFailedError, OSError: It cannot be submitted.
        """

    def end_of(self, trial: Trial, job: str) -> str:
        """How it ended, `finished` or why not; empty while it is at work."""

    def has_room(self, trial: Trial, running: Sequence[Trial]) -> bool:
        """Whether the cluster takes it beside these."""

    def is_stopped(self) -> bool:
        """Whether somebody asked that nothing more be submitted."""


@dataclass
class Schedule:
    """One command's work on an ablation.

    Owns: what became of each run while this command looked.
    Failure: a run that fails, or cannot be evaluated, is reported and left; the others continue.
    """

    runs: Runs
    evaluate: Callable[[Trial], None]
    tell: Callable[[str], None]
    at_most: int = 0
    """Runs at once; 0: as many as there is room for."""
    waiting: list[Trial] = field(default_factory=list)
    running: dict[Trial, str] = field(default_factory=dict)
    """Whose job is which."""
    trained: list[Trial] = field(default_factory=list)
    """Yet to be evaluated."""
    done: list[Trial] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    """Why a run, or its evaluation, is missing, by its name."""

    def look(self, trials: Sequence[Trial]) -> None:
        """Find out what is finished, what is at work and what is left."""
        for trial in trials:
            if self.runs.is_finished(trial):
                self.trained.append(trial)
            elif job := self.runs.job_of(trial):
                self.running[trial] = job
                self.tell(f"{trial.run_name}: at work already")
            else:
                self.waiting.append(trial)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do or to wait for."""
        return not (self.waiting or self.running or self.trained)

    def tick(self) -> None:
        """Note what has ended, evaluate it, then give away the room: evaluations use what a run has left."""
        for trial, job in list(self.running.items()):
            if end := self.runs.end_of(trial, job):
                del self.running[trial]
                self._ended(trial, end)
        while self.trained:
            self._evaluate(self.trained.pop(0))
        if self.waiting and self.runs.is_stopped():
            self.tell(f"stopped: {len(self.waiting)} runs are not submitted")
            self.waiting.clear()
        while self.waiting and self._takes(self.waiting[0]):
            self._begin(self.waiting.pop(0))

    def _takes(self, trial: Trial) -> bool:
        if not self.running:  # a run of more workers than there are trains on those that it gets
            return True
        if self.at_most:
            return len(self.running) < self.at_most
        return self.runs.has_room(trial, list(self.running))

    def _begin(self, trial: Trial) -> None:
        try:
            job = self.runs.begin(trial)
        except (UserError, RunFailedError, OSError) as error:
            self._fault(trial, str(error))
            return
        if job:
            self.running[trial] = job
            self.tell(f"{trial.run_name}: submitted")
        else:
            self.trained.append(trial)

    def _ended(self, trial: Trial, end: str) -> None:
        if end == FINISHED:
            self.tell(f"{trial.run_name}: trained")
            self.trained.append(trial)
        else:
            self._fault(trial, end)

    def _evaluate(self, trial: Trial) -> None:
        try:
            self.evaluate(trial)
        except (UserError, RunFailedError, OSError) as error:
            self._fault(trial, f"not evaluated: {error}")
        else:
            self.done.append(trial)

    def _fault(self, trial: Trial, reason: str) -> None:
        self.faults[trial.run_name] = reason
        self.tell(f"{trial.run_name}: {reason}")
