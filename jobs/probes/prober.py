"""Probes of a live run beside its training: which steps wait, one after the other, the newest first."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jobs.consolidation.consolidate import consolidate, in_threads
from jobs.consolidation.target import ONE_FILE, Target, consolidated_url
from jobs.errors import ProbeDiedError
from jobs.probes.probe_plan import RunProbes
from jobs.probes.run_probe import ProbedWeights
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import ProbeCurve
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

FOLDER = "probes"
"""Of the run directory, for weights that are kept until they have been probed."""
MOST_WAITING = 32
"""Steps that may wait besides milestones; each has a file of weights."""
TRIES = 2
"""Of a probe whose process dies."""
THREADS = 2
"""Parts of a file that are copied at once; the cores belong to training."""
_NAME = re.compile(r"step-(\d{8,12})\.safetensors")

Measure = Callable[[ProbedWeights], Mapping[str, Any]]
"""Measures weights, somewhere, and blocks; raises ProbeDiedError where its process died."""


class Prober:
    """Has the steps of a run probed that are due, each once in the run's life.

    Owns: one thread, the steps that wait, and their weights in FOLDER, which outlive a driver.
    Concurrency: `offer` and the others may be called by two threads.
    Failure: what goes wrong with a step is reported, and the next one is tried; nothing is raised. What a driver that
        died or was stopped did not come to, the next one does.
    Blocking: `offer` while it copies weights; nothing else.
    """

    def __init__(
        self,
        run: RunDirectory,
        probes: RunProbes,
        measure: Measure,
        on_done: Callable[[int, Mapping[str, Any]], None],
        on_failure: Callable[[int, str], None],
        *,
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        """Read which steps were probed already.

        Args:
            run: The run.
            probes: Which steps are due, and on what they are probed.
            measure: Measures weights.
            on_done: Is called, in the thread, with a step and the fields of its event.
            on_failure: Is called with a step, and why it was not probed.
            hurry: Is called when nothing trains any more that would be slowed.
        """
        self._hurry = hurry
        self._run, self._probes, self._measure = run, probes, measure
        self._on_done, self._on_failure = on_done, on_failure
        curve = ProbeCurve.of(run.read_events())
        self._seen = {row.step for row in curve.rows if row.plan == (probes.plan or row.plan)}
        self._waiting: dict[int, ProbedWeights] = {} if 0 in self._seen else {0: probes.control}
        self._at_work: int | None = None
        self._offered: int | None = None
        self._changed = threading.Condition()
        self._closing = self._given_up = False
        self.thread = threading.Thread(target=self._work, name="probe", daemon=True)

    @property
    def left(self) -> list[int]:
        """Steps that wait or are at work."""
        with self._changed:
            return sorted({*self._waiting, *([] if self._at_work is None else [self._at_work])})

    def begin(self) -> None:
        """Start the thread, once: when the ranks train, so that it does not delay their start."""
        if self.thread.ident is None:
            self.thread.start()

    def offer(self, step: int, *, is_kept: bool) -> None:
        """Have a committed step probed if it is due; its weights are copied if they are not kept anyway.

        Steps come in order. One that was due and is passed over was deleted before it could be copied, and is reported.
        """
        for passed in self._passed_over(step):
            self._on_failure(passed, "its checkpoint was deleted before it was copied: raise keep_checkpoints")
        with self._changed:
            is_last = step == self._probes.schedule.total_steps
            # The weights of the last step are kept; it is offered again when they have been written.
            if step in self._seen or (is_last and not is_kept) or not self._probes.is_due(step, is_milestone=is_kept):
                return
            self._seen.add(step)
        if is_kept:
            self._add(step, consolidated_url(self._run, step))
            return
        target = Target(out=self._run.path(FOLDER, ONE_FILE.url(self._run, step).rpartition("/")[2]))
        try:
            copied = consolidate(self._run, step, target, fan_out=in_threads(most=THREADS))
        except Exception as error:
            logger.warning("the weights of step %d were not copied for its probe", step, exc_info=True)
            self._on_failure(step, _reason(error))
            return
        self._add(step, copied.url)

    def _passed_over(self, step: int) -> list[int]:
        """Steps before this one that were due and that nobody has offered to this driver's prober."""
        with self._changed:
            before, self._offered = self._offered, max(step, self._offered or 0)
            new = [each for each in range((before or step) + 1, step) if each not in self._seen]
            passed = [each for each in new if self._probes.is_due(each, is_milestone=False)]
            self._seen.update(passed)
        return passed

    def close(self) -> None:
        """Have the thread end when nothing waits any more; nothing trains from now on."""
        self._hurry()
        self.begin()
        with self._changed:
            self._closing = True
            self._changed.notify()

    def give_up(self, reason: str) -> None:
        """Report the steps that are left as failed, and forget them."""
        for step in self.leave():
            self._on_failure(step, reason)
            self._discard(step)

    def leave(self) -> list[int]:
        """Report nothing more; returns the steps that are left for the next driver."""
        left = self.left
        with self._changed:
            self._waiting.clear()
            self._closing = self._given_up = True
            self._changed.notify()
        return left

    def _add(self, step: int, url: str) -> None:
        with self._changed:
            self._waiting[step] = ProbedWeights(url)
            copies = [each for each in sorted(self._waiting) if self._is_copy(self._waiting[each])]
            dropped = copies[:-MOST_WAITING]
            for each in dropped:
                del self._waiting[each]
            self._changed.notify()
        for each in dropped:
            self._on_failure(each, f"left out, since {MOST_WAITING} newer ones wait: raise probe_epochs")
            self._discard(each)

    def _is_copy(self, weights: ProbedWeights) -> bool:
        return weights.url.startswith(self._run.path(FOLDER))

    def _discard(self, step: int) -> None:
        url = self._run.path(FOLDER, ONE_FILE.url(self._run, step).rpartition("/")[2])
        for each in (f"{url}.sha256", url):
            with contextlib.suppress(OSError, UserError):
                self._run.storage.delete(each)

    def _work(self) -> None:
        try:
            self._take_over()
        except Exception:
            logger.warning("weights that an earlier driver left were not listed", exc_info=True)
        while (chosen := self._next()) is not None:
            self._probe(*chosen)
            with self._changed:
                self._at_work = None

    def _take_over(self) -> None:
        """Take the weights that an earlier driver copied and did not come to; remove what nobody needs."""
        for name in self._run.storage.list_names(self._run.path(FOLDER)):
            if not (match := _NAME.fullmatch(name)):
                continue
            step, url = int(match[1]), self._run.path(FOLDER, name)
            with self._changed:
                is_new = step not in self._seen
                self._seen.add(step)
            if is_new and ONE_FILE.is_finished(self._run.storage, url):
                self._add(step, url)
            elif is_new:  # the driver died while it was copied
                self._seen.discard(step)
            elif step not in self.left:
                self._discard(step)

    def _next(self) -> tuple[int, ProbedWeights] | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            self._at_work = max(self._waiting)
            return self._at_work, self._waiting.pop(self._at_work)

    def _probe(self, step: int, weights: ProbedWeights) -> None:
        for left in reversed(range(TRIES)):
            try:
                figures = self._measure(weights)
            except Exception as error:
                if self._given_up:
                    return
                logger.warning("step %d was not probed", step, exc_info=True)
                is_tried_again = isinstance(error, ProbeDiedError) and left > 0
                self._on_failure(step, _reason(error) + ("; it is tried again" if is_tried_again else ""))
                if not is_tried_again:
                    break
            else:
                if self._given_up:
                    return
                self._on_done(step, {"epoch": self._probes.epoch(step), **figures})
                break
        self._discard(step)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ProbeDiedError) else f"{type(error).__name__}: {error}"
