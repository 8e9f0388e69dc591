"""A run in TensorBoard: event files in `tensorboard/` of the run directory.

In a folder they are written in place. Object stores cannot append, so there files of at most `FILE_STEPS` steps are
written on the local disk, and the newest one is uploaded whole at each send. Opening a run anew begins a file whose
first event has TensorBoard forget all steps after the last that was sent: that is what `purge_step` is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.trackers.tracker import Point, TrackedRun
from pipeline.access.urls import is_local
from pipeline.host.scratch import scratch_folder

FOLDER = "tensorboard"
FILE_STEPS = 1000
"""About 0.6 MB."""


class TensorBoardFiles:
    """The event files of one run."""

    last_step: int | None = None

    def __init__(self, run: TrackedRun) -> None:
        """Begin a file that follows `run.after_step`."""
        self._directory = run.directory
        self._scratch = None if is_local(run.directory.url) else scratch_folder()
        self._folder = Path(self._scratch.name if self._scratch else run.directory.path(FOLDER))
        self._writer = self._begin_file(purge_step=run.after_step + 1)
        self._steps = 0
        if run.after_step == 0:
            rows = "".join(f"| {name} | {json.dumps(value)} |\n" for name, value in run.recipe.items())
            self._writer.add_text("recipe", f"| field | value |\n|---|---|\n{rows}", 0)

    def send(self, points: Sequence[Point], last_step: int, log: str) -> None:
        """Append to the newest file."""
        if self._steps >= FILE_STEPS:
            self._writer.close()
            self._writer, self._steps = self._begin_file(purge_step=None), 0
        for point in points:
            for name, value in point.figures.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.at_seconds)
        self._steps += len(points)
        if log:
            self._writer.add_text("events", log, last_step)
        self._writer.flush()
        self._upload()

    def end(self, outcome: str) -> None:  # noqa: ARG002  the events have it
        """Close the newest file."""
        self._writer.close()
        self._upload()
        self.leave()

    def leave(self) -> None:
        """Close the newest file, without uploading it."""
        self._writer.close()
        if self._scratch:
            self._scratch.cleanup()

    def _begin_file(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def _upload(self) -> None:
        if self._scratch is None:
            return
        newest = max(self._folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        self._directory.storage.write(self._directory.path(FOLDER, newest.name), newest.read_bytes())
