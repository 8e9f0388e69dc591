"""The history of a run as lines for people or as JSON lines, some thousand at a time: there may be a million."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import to_json

from jobs.metrics.utilization import Utilization
from jobs.run.accuracy_text import accuracies_text
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import ProbeCurve
from jobs.run.step_table import StepTable
from jobs.run.validation_rows import VALIDATION_COLUMNS
from pipeline.printable import printable

_SHOWN = ("step", "epoch", "loss", "learning_rate", "world_size", "attempt")
_COLUMNS = (*_SHOWN, "step_seconds", "digest", *VALIDATION_COLUMNS)
_BLOCK_STEPS = 8192


def history_blocks(run: RunDirectory, *, as_json: bool) -> Iterator[str]:
    """The lines of all steps, in blocks that end with a line's end.

    Raises:
        RunError: The run directory is damaged.
    """
    events = run.read_events()
    steps = run.read_latest_steps(None if as_json else _COLUMNS)
    probed = {row.step: dict(row.accuracies) for row in ProbeCurve.of(events).rows}
    for first in range(0, len(steps), _BLOCK_STEPS):
        block = steps.slice(first, _BLOCK_STEPS)
        figures = Utilization.of(block, events)
        yield "".join(_json_lines(block, figures, probed) if as_json else _lines(block, figures, probed))


def _json_lines(steps: StepTable, figures: Utilization, probed: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
    for row in figures.rows(steps):
        if accuracies := probed.get(row["step"]):
            row["accuracies"] = accuracies
        try:
            yield to_json(row).decode() + "\n"  # in a fifth of the time
        except ValueError:  # of a text that UTF-8 cannot hold
            yield json.dumps(row) + "\n"


def _lines(steps: StepTable, figures: Utilization, probed: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
    measured: dict[int, Mapping[str, Any]] = {row["step"]: row for row in steps.measured().rows()}
    measured = {step: {**measured.get(step, {}), **probed.get(step, {})} for step in {*measured, *probed}}
    numbers = [steps.columns[name].tolist() for name in _SHOWN]
    digests, ratios = steps.texts("digest").tolist(), figures.mfu_ratios.tolist()
    for step, epoch, loss, rate, world_size, attempt, digest, mfu in zip(*numbers, digests, ratios, strict=True):
        loss_text = "-" if math.isnan(loss) else f"{loss:.6f}"
        line = (
            f"step {step:>8}  epoch {epoch:>4}  loss {loss_text}  "
            f"lr {rate:.3e}  world {world_size:>3}  attempt {attempt:>3}"
        )
        if not math.isnan(mfu):
            line += f"  mfu {mfu:.1%}"
        if digest:
            line += printable(f"  digest {digest.decode()}")
        if step in measured and (text := accuracies_text(measured[step])):
            line += f"  {text}"
        yield line + "\n"
