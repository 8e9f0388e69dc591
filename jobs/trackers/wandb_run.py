"""A run in Weights & Biases, by its own process, which sends in the background and repeats what the server misses.

Its own count of steps never decreases. So figures are drawn over one of them, `step`, and probes may come late.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.trackers.tracker import Point, TrackedRun
from pipeline.host.scratch import scratch_folder

PROJECT = "convmae"
"""Unless WANDB_PROJECT names another."""
FLUSH_SECONDS = 1.0
"""Until its process has written to disk what it took: offline, what a killed driver loses there. Its own is 15 s."""
_AXIS = "step"
_LAST_STEP = "last_step"
"""In the summary: up to where the figures are there."""


class WandbRun:
    """One run of W&B, online or offline."""

    def __init__(self, run: TrackedRun) -> None:
        """Begin or resume the run of this id; offline, a folder of `WANDB_DIR` that `wandb sync` adds to it."""
        import wandb

        self._scratch = scratch_folder()
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            name=run.directory.name,
            project=run.environ.get("WANDB_PROJECT", PROJECT),
            dir=run.environ.get("WANDB_DIR") or self._scratch.name,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )
        self._run.config.update(dict(run.recipe), allow_val_change=True)  # type: ignore[no-untyped-call]
        self._run.define_metric(_AXIS, hidden=True)
        self._run.define_metric("*", step_metric=_AXIS)
        known = self._run.summary.get(_LAST_STEP)  # type: ignore[no-untyped-call]
        self.last_step: int | None = None if self._run.offline else int(known or 0)

    def send(self, points: Sequence[Point], last_step: int, log: str) -> None:
        """Hand over to the process of W&B."""
        for point in points:
            self._run.log({_AXIS: point.step, **point.figures})
        self._run.summary[_LAST_STEP] = last_step
        if log:
            self._run.notes = log

    def end(self, outcome: str) -> None:
        """Note the outcome, and wait until the process has sent everything."""
        self._run.summary["state"] = outcome
        self._run.finish(exit_code=int(outcome == "failed"))
        self._scratch.cleanup()

    def leave(self) -> None:
        """Close it here, or the process of W&B refuses to open another of its id."""
        self._run.finish()
        self._scratch.cleanup()
