"""What a finished run leaves for people: consolidated weights, a picture of reconstructions, a report."""

from __future__ import annotations

from collections.abc import Iterator

from jobs import checkpoint
from jobs.consolidate import consolidate
from jobs.reconstruction import write_reconstructions
from jobs.report import write_report
from jobs.run_directory import RunDirectory
from jobs.weight_results import load_consolidated
from pipeline.dataset import Dataset
from pipeline.errors import UserError


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
    dataset = Dataset.open(run.storage, recipe.data, check_etags=recipe.check_etags)
    write_reconstructions(run, load_consolidated(run, step), dataset)
    return write_report(run)
