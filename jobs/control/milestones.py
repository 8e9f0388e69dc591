"""Milestones of a live run become weights while it trains: in a thread of the driver, which trains nothing itself."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from jobs.checkpoint import checkpoint
from jobs.consolidation.consolidate import consolidate, in_threads
from jobs.consolidation.target import ConsolidatedWeights
from jobs.probes.prober import Prober
from jobs.run.directory import RunDirectory

logger = logging.getLogger(__name__)

THREADS = 2
"""Parts that are copied at once; the cores belong to training."""


class MilestoneConsolidator:
    """Consolidates a run's milestones, one after the other, and its last checkpoint.

    Owns: one thread, and which steps it has looked at.
    Concurrency: called by one thread.
    Failure: what goes wrong with a step is reported and logged, and the next one is tried; nothing is raised. A driver
        that died is made up for by the next one, which looks at all commits first.
    Blocking: `look` never; `finish` until all is done.
    """

    def __init__(
        self,
        run: RunDirectory,
        on_done: Callable[[ConsolidatedWeights], None],
        on_failure: Callable[[int, str], None],
        prober: Prober | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: The run.
            on_done: Is called, in the thread, with each step that was consolidated.
            on_failure: Is called with a step, and why it could not be.
            prober: Is offered every step, once its weights are kept if they are to be.
        """
        self._run, self._on_done, self._on_failure, self._prober = run, on_done, on_failure, prober
        self._looked_at: set[int] = set()
        self._newest: int | None = None
        self._asked: queue.Queue[int | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="consolidate", daemon=True)
        self._thread.start()
        self._asked.put(-1)  # milestones that an earlier driver did not come to

    def look(self, newest: int | None) -> None:
        """Say which step was committed last; milestones up to it are consolidated soon."""
        if newest is not None and newest != self._newest:
            self._newest = newest
            self._asked.put(-1)

    def finish(self, last_step: int | None) -> None:
        """Consolidate the milestones that are left, and the last checkpoint of a run that has finished; wait for it.

        Args:
            last_step: That checkpoint's; None for a run that has not finished.
        """
        self._asked.put(-1 if last_step is None else last_step)
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                steps = checkpoint.committed_steps(self._run)
            except Exception:
                logger.warning("commits could not be listed; milestones are looked for at the next", exc_info=True)
                steps = []
            for step in dict.fromkeys([*steps, *([asked] if asked >= 0 else [])]):
                if step not in self._looked_at or step == asked:
                    self._take(step, whatever=step == asked)

    def _take(self, step: int, *, whatever: bool) -> None:
        try:
            if is_kept := whatever or checkpoint.read_commit(self._run, step).milestone:
                result = consolidate(self._run, step, fan_out=in_threads(most=THREADS))
                if not result.kept:
                    self._on_done(result)
            self._looked_at.add(step)
            if self._prober:
                self._prober.offer(step, is_kept=is_kept)
        except Exception as error:
            self._looked_at.add(step)
            logger.warning("step %d was not consolidated", step, exc_info=True)
            self._on_failure(step, f"{type(error).__name__}: {error}")
