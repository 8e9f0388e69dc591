"""The history of a run as lines for people or as JSON lines, some thousand at a time: there may be a million.

Lines are made column by column: as rows of Python objects, those of half a million steps took twice the time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import to_json

from jobs.metrics.utilization import Utilization
from jobs.run.accuracy_text import accuracies_text
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import ProbeCurve
from jobs.run.step_table import COLUMNS, StepTable
from jobs.run.validation_rows import VALIDATION_COLUMNS
from pipeline.printable import printable

_SHOWN = ("step", "epoch", "loss", "learning_rate", "world_size", "attempt")
_COLUMNS = (*_SHOWN, "step_seconds", "digest", *VALIDATION_COLUMNS)
_LINE = "step %8d  epoch %4d  loss %s  lr %.3e  world %3d  attempt %3d%s"
_BLOCK_STEPS = 8192

Row = Mapping[str, Any]
Probed = Mapping[int, Mapping[str, float]]
"""Accuracies by step."""


def history_blocks(run: RunDirectory, *, as_json: bool) -> Iterator[str]:
    """The lines of all steps, in blocks that end with a line's end.

    Raises:
        RunError: The run directory is damaged.
    """
    events = run.read_events()
    steps = run.read_latest_steps(None if as_json else _COLUMNS)
    probed = {row.step: dict(row.accuracies) for row in ProbeCurve.of(events).rows}
    lines = _json_lines if as_json else _lines
    for block in steps.blocks(_BLOCK_STEPS):
        yield "\n".join([*lines(block, events, probed), ""])


def _json_lines(steps: StepTable, events: Sequence[Row], probed: Probed) -> list[str]:
    lines = _plain_json_lines(steps, Utilization.of(steps, events))
    odd = sorted({*steps.rest, *np.flatnonzero(np.isin(steps.steps, list(probed))).tolist()})
    others = steps.at(np.array(odd, np.intp))
    for place, row in zip(odd, Utilization.of(others, events).rows(others), strict=True):
        ordered = {name: row[name] for name in COLUMNS if name in row} | row
        if accuracies := probed.get(row["step"]):
            ordered["accuracies"] = accuracies
        try:
            lines[place] = to_json(ordered).decode()
        except ValueError:  # of a text that UTF-8 cannot hold
            lines[place] = json.dumps(ordered)
    return lines


def _plain_json_lines(steps: StepTable, figures: Utilization) -> list[str]:
    """Of the columns alone."""
    columns = {name: steps.columns[name] for name in COLUMNS if name in steps.columns}
    columns |= {"device_flops_per_second": figures.device_flops_per_second, "mfu_ratio": figures.mfu_ratios}
    fields, values = [], []
    for name, column in columns.items():
        is_there = steps.has_value(name) if name in steps.columns else ~np.isnan(column)
        if is_there.all() or name == "loss":
            fields.append(f',"{name}":%s')
            values.append(_json_values(column))
        elif is_there.any():
            texts = [""] * len(steps)
            for place, text in zip(np.flatnonzero(is_there), _json_values(column[is_there]), strict=True):
                texts[place] = f',"{name}":{text}'
            fields.append("%s")
            values.append(texts)
    return list(map(f"{{{''.join(fields)[1:]}}}".__mod__, zip(*values, strict=True)))


def _json_values(column: npt.NDArray[Any]) -> list[str]:
    """The values as JSON; NaN, as the loss of a skipped step, is null."""
    if column.dtype.kind == "S":
        texts: list[str] = column.astype(np.str_).tolist()
        whole = "".join(texts)
        is_plain = whole.isprintable() and '"' not in whole and "\\" not in whole
        return [f'"{text}"' for text in texts] if is_plain else [to_json(text).decode() for text in texts]
    values = column.tolist()
    if column.dtype.kind == "f" and np.isnan(column).any():
        values = [None if math.isnan(value) else value for value in values]
    return to_json(values).decode()[1:-1].split(",")


def _lines(steps: StepTable, events: Sequence[Row], probed: Probed) -> list[str]:
    columns: dict[str, list[Any]] = {name: steps.columns[name].tolist() for name in _SHOWN}
    columns["loss"] = ["-" if math.isnan(loss) else f"{loss:.6f}" for loss in columns["loss"]]
    ratios = Utilization.of(steps, events).mfu_ratios.tolist()
    mfu = ["" if math.isnan(ratio) else f"  mfu {ratio:.1%}" for ratio in ratios]
    lines = list(map(_LINE.__mod__, zip(*columns.values(), mfu, strict=True)))
    digests = steps.texts("digest")
    for place in np.flatnonzero(digests != b"").tolist():
        lines[place] += printable(f"  digest {digests[place].decode()}")
    validated = {row["step"]: row for row in steps.measured().rows()}
    for place in np.flatnonzero(np.isin(steps.steps, [*validated, *probed])).tolist():
        step = columns["step"][place]
        if text := accuracies_text({**validated.get(step, {}), **probed.get(step, {})}):
            lines[place] += f"  {text}"
    return lines
