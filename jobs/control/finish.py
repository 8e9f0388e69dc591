"""What a finished run leaves for people: consolidated weights, a picture of reconstructions, a report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jobs.checkpoint import checkpoint
from jobs.consolidation.consolidate import consolidate
from jobs.errors import WeightsFileError
from jobs.report.report import write_report
from jobs.run.directory import RunDirectory
from pipeline.errors import UserError
from pipeline.load.dataset import Dataset

if TYPE_CHECKING:  # it imports torch, for which a report of a run without a checkpoint should not wait
    from jobs.report.reconstruction import Stage

logger = logging.getLogger(__name__)

MOST_STAGES = 6
"""Rows of reconstructions in the picture."""


def finish(run: RunDirectory) -> Iterator[str]:
    """Write weights, unless the driver has, and the report; one line about each file, as it is written.

    A run whose weights cannot be written is finished all the same: they can be made of its checkpoint later.
    """
    try:
        result = consolidate(run)
    except (UserError, OSError) as error:
        yield f"weights: not written, `convmae consolidate {run.name}` does it later: {error}"
        yield f"report, without a picture: {write_report(run)}"
        return
    yield f"weights: {result.url} ({result.bytes / 1e6:.1f} MB)"
    yield f"report: {_report(run, result.step)}"


def write_run_report(run: RunDirectory) -> str:
    """Write report and reconstructions of a run, which may be training; returns the report's URL."""
    if checkpoint.latest_commit(run) is None:  # nothing was saved yet: a report without a picture
        return write_report(run)
    return _report(run, consolidate(run).step)


def _report(run: RunDirectory, step: int) -> str:
    recipe = run.read_recipe()
    if recipe.finetune:  # a classifier reconstructs nothing
        return write_report(run)
    from jobs.report.reconstruction import write_reconstructions

    dataset = Dataset.open(run.storage, recipe.data, check_etags=recipe.check_etags)
    write_reconstructions(run, _stages(run, step), dataset)
    return write_report(run)


def _stages(run: RunDirectory, newest: int) -> Iterator[Stage]:
    """Steps whose weights were written, as of milestones, spread evenly where they are many; up to the newest."""
    from jobs.report.reconstruction import Stage
    from jobs.weights import consolidated

    steps = sorted(step for step in consolidated.urls_by_step(run) if step <= newest)
    for place in sorted({round(place) for place in np.linspace(0, len(steps) - 1, MOST_STAGES)}):
        try:
            weights = consolidated.of_run(run, steps[place])
        except WeightsFileError as error:
            if steps[place] == newest:
                raise
            logger.warning("step %d is not in the picture: %s", steps[place], error)
            continue
        epochs = int(weights.metadata["epoch"])
        caption = f"reconstruction after {epochs:,} epoch{'' if epochs == 1 else 's'}, step {steps[place]:,}"
        yield Stage(caption, weights.tensors)
