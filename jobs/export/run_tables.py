"""What a run recorded as tables for pandas and the like: history, accuracies and events, as Parquet or CSV.

Histories are in JSON lines, in parts by attempt, whose redone steps a reader has to leave out and whose accuracies lie
elsewhere. Here is one file for each kind of row. Columns that this release knows have the same type in every run, also
where all of their values are missing; others have the one that fits their values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv, parquet

from jobs.export.written import Exported, written_files
from jobs.metrics.utilization import Utilization
from jobs.run.accuracy_rows import AccuracyCurve, AccuracyRow
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import PROBE_EVENT, ProbeCurve
from jobs.run.step_table import COLUMNS, REST_LINES, StepTable
from jobs.run.stored_steps import StoredSteps
from jobs.run.validation_rows import MAIN_VALIDATION, ValidationCurve
from pipeline.access.places import normal
from pipeline.store.storage import Storage

METADATA_NAME = "convmae"
"""Key in the schema's metadata of a JSON object: the run, its URL, and its recipe."""

_WHOLE, _NUMBER, _TEXT = pa.int64(), pa.float64(), pa.string()
_TIME = pa.timestamp("ms", "UTC")
_KINDS = {int: _WHOLE, float: _NUMBER, str: _TEXT}
_DTYPES = {_WHOLE: np.int64, _NUMBER: np.float64, _TIME: np.int64, pa.bool_(): np.bool_}
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
"""Rows in memory at a time, and in a group of a Parquet file."""
_EVENTS = {"time": _TIME, "attempt": _WHOLE, "kind": _TEXT, "step": _WHOLE, "reason": _TEXT}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunTable:
    """One table, a block of rows at a time."""

    schema: pa.Schema
    blocks: Iterable[pa.Table]
    """Made as they are walked, once."""


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


def run_tables(run: RunDirectory) -> dict[str, RunTable]:
    """The tables of a run, by name: `history`, `accuracies` and `events`."""
    steps, events = run.read_steps(), run.read_events()
    about = {"run": run.name, "url": run.url, "recipe": run.read_recipe_fields()}
    others, validated = dict[str, list[Any]](), list[Row]()
    for block in steps.blocks() if steps.names & {REST_LINES, MAIN_VALIDATION} else ():
        validated += block.measured().rows()
        for name, value in (item for fields in block.rest.values() for item in fields.items()):
            if name not in COLUMNS and name not in _HISTORY:
                others.setdefault(name, []).append(value)
    kinds = _HISTORY | {name: _KINDS[kind] for name, kind in COLUMNS.items() if name in steps.names - _HISTORY.keys()}
    kinds |= {name: _kind(values) for name, values in others.items()}
    schema = _schema(kinds, about)
    return {
        "history": RunTable(schema, _history_blocks(steps, events, schema)),
        "accuracies": _table(_ACCURACIES, _accuracies(validated, events), about),
        "events": _table(_EVENTS, map(_timed, events), about),
    }


def _schema(kinds: Mapping[str, pa.DataType], about: Row) -> pa.Schema:
    return pa.schema(list(kinds.items()), {METADATA_NAME: json.dumps(about, sort_keys=True)})


def _timed(event: Row) -> Row:
    rest = {name: value for name, value in event.items() if name != "at_seconds"}
    return {"time": round(1000 * event["at_seconds"]), **rest}


def _history_blocks(steps: StoredSteps, events: Sequence[Row], schema: pa.Schema) -> Iterator[pa.Table]:
    """Each row, and whether a later one is of the same step, whose result then counts."""
    superseded, first = steps.superseded(), 0
    for block in steps.blocks(_BLOCK_ROWS):
        figures = Utilization.of(block, events)
        made = {
            "superseded": superseded[first : first + len(block)],
            "device_flops_per_second": figures.device_flops_per_second,
            "mfu_ratio": figures.mfu_ratios,
        }
        first += len(block)
        yield pa.table([_history_column(block, field, made) for field in schema], schema)


def _history_column(steps: StepTable, field: pa.Field, made: Mapping[str, npt.NDArray[Any]]) -> pa.Array:
    name = field.name
    if (column := made.get(name)) is not None:
        return _number_array(column, field.type, ~np.isnan(column))
    if name in steps.columns and field.type == _TEXT:
        return _text_array(steps.columns[name].tolist(), steps.has_value(name))
    if name in steps.columns:
        return _number_array(steps.columns[name], field.type, steps.has_value(name))
    if name in COLUMNS or not steps.rest:
        return pa.nulls(len(steps), field.type)
    return _array_of([steps.rest.get(place, {}).get(name) for place in range(len(steps))], field.type)


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


def _table(known: Mapping[str, pa.DataType], rows: Iterable[Row], about: Row) -> RunTable:
    """A table of the known columns, and of all others that rows have."""
    kept = list(rows)
    others = [name for name in dict.fromkeys(name for row in kept for name in row) if name not in known]
    columns = {name: [row.get(name) for row in kept] for name in (*known, *others)}
    schema = _schema({name: known.get(name) or _kind(values) for name, values in columns.items()}, about)
    arrays = [_array_of(columns[field.name], field.type) for field in schema]
    return RunTable(schema, [pa.table(arrays, schema)])


def _kind(values: Iterable[Any]) -> pa.DataType:
    """What values all are: true or false, whole numbers, numbers, else text."""
    known = [value for value in values if value is not None]
    kinds = {type(value) for value in known}
    if kinds == {bool}:
        return pa.bool_()
    if kinds and kinds <= {int, float} and all(abs(value) < 2**63 for value in known):
        return _WHOLE if kinds == {int} else _NUMBER
    return _TEXT


def _array_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values that are of a kind, or None; in a column of text, what is none as JSON."""
    is_there = np.array([value is not None for value in values], np.bool_)
    if kind == _TEXT:
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return _text_array([(text or "").encode() for text in texts], is_there)
    return _number_array(np.array([value or 0 for value in values], _DTYPES[kind]), kind, is_there)


# Arrays are made of memory that is there: `pyarrow.array` would import pandas, of 42 MB, wherever it is installed.


def _number_array(values: npt.NDArray[Any], kind: pa.DataType, is_there: npt.NDArray[np.bool_]) -> pa.Array:
    data = np.packbits(values, bitorder="little") if kind == pa.bool_() else np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values), [_bits(is_there), pa.py_buffer(data)])


def _text_array(texts: Sequence[bytes], is_there: npt.NDArray[np.bool_]) -> pa.Array:
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.Array.from_buffers(
        _TEXT, len(texts), [_bits(is_there), pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    )


def _bits(mask: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(mask, bitorder="little"))


def _write_parquet(table: RunTable, path: Path) -> None:
    with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for block in table.blocks:
            writer.write_table(block, row_group_size=_BLOCK_ROWS)


def _write_csv(table: RunTable, path: Path) -> None:
    with csv.CSVWriter(path, table.schema) as writer:
        for block in table.blocks:
            writer.write_table(block)


_WRITERS: Mapping[str, Callable[[RunTable, Path], None]] = {".parquet": _write_parquet, ".csv": _write_csv}
TABLE_SUFFIXES = {"metrics": ".parquet", "metrics-csv": ".csv"}
"""Of the files of each format."""
