"""What a run recorded as tables for pandas and the like: history, accuracies and events, as Parquet or CSV.

Histories are in JSON lines, in parts by attempt, whose redone steps a reader has to leave out and whose accuracies lie
elsewhere. Here is one file for each kind of row. Columns that this release knows have the same type in every run, also
where all of their values are missing; others have the one that fits their values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from jobs.export.written import Exported, written_files
from jobs.metrics.utilization import Utilization
from jobs.run.accuracy_rows import AccuracyCurve, AccuracyRow
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import PROBE_EVENT, ProbeCurve
from jobs.run.step_table import COLUMNS, StepTable
from jobs.run.validation_rows import ValidationCurve
from pipeline.access.places import normal
from pipeline.store.storage import Storage

METADATA_NAME = "convmae"
"""Key in the schema's metadata of a JSON object: the run, its URL, and its recipe."""

_WHOLE, _NUMBER, _TEXT = pa.int64(), pa.float64(), pa.string()
_TIME = pa.timestamp("ms", "UTC")
_HISTORY = {
    "step": _WHOLE, "epoch": _WHOLE, "attempt": _WHOLE, "superseded": pa.bool_(), "world_size": _WHOLE,
    "loss": _NUMBER, "learning_rate": _NUMBER, "step_seconds": _NUMBER, "data_wait_seconds": _NUMBER,
    "device_flops_per_second": _NUMBER, "mfu_ratio": _NUMBER, "substitutions": _WHOLE, "samples": _TEXT,
    "digest": _TEXT, "skipped": _TEXT,
}  # fmt: skip
_ACCURACIES = {
    "step": _WHOLE, "epoch": _WHOLE, "plan": _TEXT, "tested": _WHOLE, "method": _TEXT, "accuracy": _NUMBER,
    "low": _NUMBER, "high": _NUMBER,
}  # fmt: skip
_BLOCK_ROWS = 1 << 16
"""Texts that are Python objects at a time."""
_EVENTS = {"time": _TIME, "attempt": _WHOLE, "kind": _TEXT, "step": _WHOLE, "reason": _TEXT}

Row = Mapping[str, Any]


def export_tables(run: RunDirectory, name: str, storage: Storage, out: str, *, force: bool = False) -> list[Exported]:
    """Write the tables of a run.

    Args:
        run: Any run, also one that trains.
        name: One of TABLE_SUFFIXES.
        storage: Reaches `out`.
        out: A folder.
        force: Replace what is there.

    Raises:
        ExportError: The target exists.
        RunError: The run directory is damaged.
    """
    suffix = TABLE_SUFFIXES[name]
    tables = run_tables(run)

    def make(folder: Path) -> None:
        for title, table in tables.items():
            _WRITERS[suffix](table, folder / f"{title}{suffix}")

    return written_files(storage, normal(out), "", make, force=force)


def run_tables(run: RunDirectory) -> dict[str, pa.Table]:
    """The tables of a run, by name: `history`, `accuracies` and `events`."""
    steps, events = run.read_steps(), run.read_events()
    about = {"run": run.name, "url": run.url, "recipe": run.read_recipe_fields()}
    tables = {
        "history": _history(steps, Utilization.of(steps, events)),
        "accuracies": _table(_ACCURACIES, _accuracies(list(steps.measured().rows()), events)),
        "events": _table(_EVENTS, map(_timed, events)),
    }
    metadata = {METADATA_NAME: json.dumps(about, sort_keys=True)}
    return {title: table.replace_schema_metadata(metadata) for title, table in tables.items()}


def _timed(event: Row) -> Row:
    rest = {name: value for name, value in event.items() if name != "at_seconds"}
    return {"time": round(1000 * event["at_seconds"]), **rest}


def _history(steps: StepTable, figures: Utilization) -> pa.Table:
    """Each row, and whether a later one is of the same step, whose result then counts."""
    made = {
        "superseded": pa.array(steps.superseded()),
        "device_flops_per_second": pa.array(figures.device_flops_per_second, from_pandas=True),
        "mfu_ratio": pa.array(figures.mfu_ratios, from_pandas=True),
    }
    columns = {name: made[name] if name in made else _known(steps, name) for name in _HISTORY}
    columns |= {name: _known(steps, name) for name in steps.columns if name not in _HISTORY}
    return pa.table(columns | _others(steps))


def _known(steps: StepTable, name: str) -> pa.ChunkedArray:
    """A column of every history."""
    kind = {int: _WHOLE, float: _NUMBER, str: _TEXT}[COLUMNS[name]]
    if name not in steps.columns:
        return pa.chunked_array([pa.nulls(len(steps), kind)])
    if kind != _TEXT:
        values = steps.columns[name]
        return pa.chunked_array([pa.array(values, kind, mask=np.isnan(steps.numbers(name)))])
    texts = steps.texts(name)
    blocks = (texts[first : first + _BLOCK_ROWS].tolist() for first in range(0, len(texts), _BLOCK_ROWS))
    return pa.chunked_array([pa.array([text.decode() or None for text in block], _TEXT) for block in blocks], _TEXT)


def _others(steps: StepTable) -> dict[str, pa.Array]:
    """Columns of fields that this release does not know."""
    known = {*COLUMNS, *_HISTORY}
    names = dict.fromkeys(name for fields in steps.rest.values() for name in fields if name not in known)
    return {name: _column([steps.rest.get(place, {}).get(name) for place in range(len(steps))]) for name in names}


def _accuracies(validated: Sequence[Row], events: Sequence[Row]) -> Iterator[Row]:
    """One row for each accuracy, whoever measured it and on whichever samples, by plan, then by step."""
    probed = [event for event in events if event["kind"] == PROBE_EVENT]
    for plan in dict.fromkeys(event["plan"] for event in probed):
        yield from _accuracy_rows(ProbeCurve.of(event for event in probed if event["plan"] == plan))
    for plan in dict.fromkeys(row.get("validation_plan", "") for row in validated):
        yield from _accuracy_rows(
            ValidationCurve.of(row for row in validated if row.get("validation_plan", "") == plan)
        )


def _accuracy_rows(curve: AccuracyCurve) -> Iterator[Row]:
    for row in curve.rows:
        yield from (_accuracy_row(row, method) for method in row.accuracies)


def _accuracy_row(row: AccuracyRow, method: str) -> Row:
    low, high = row.interval(method)
    fixed = {"step": row.step, "epoch": row.epoch, "plan": row.plan, "tested": row.tested}
    return {**fixed, "method": method, "accuracy": row.accuracies[method], "low": low, "high": high}


def _table(known: Mapping[str, pa.DataType], rows: Iterable[Row]) -> pa.Table:
    """A table of the known columns, and of all others that rows have."""
    kept = list(rows)
    others = [name for name in dict.fromkeys(name for row in kept for name in row) if name not in known]
    columns = {name: pa.array([row.get(name) for row in kept], kind) for name, kind in known.items()}
    return pa.table(columns | {name: _column([row.get(name) for row in kept]) for name in others})


def _column(values: Sequence[Any]) -> pa.Array:
    """Values as what they all are: true or false, whole numbers, numbers, else text; what is none of these as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds and kinds <= {int, float} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, _WHOLE if kinds == {int} else _NUMBER)
    return pa.array(
        [value if value is None or isinstance(value, str) else json.dumps(value) for value in values], _TEXT
    )


def _write_parquet(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path, compression="zstd", row_group_size=_BLOCK_ROWS)


def _write_csv(table: pa.Table, path: Path) -> None:
    csv.write_csv(table, path)


_WRITERS: Mapping[str, Callable[[pa.Table, Path], None]] = {".parquet": _write_parquet, ".csv": _write_csv}
TABLE_SUFFIXES = {"metrics": ".parquet", "metrics-csv": ".csv"}
"""Of the files of each format."""
