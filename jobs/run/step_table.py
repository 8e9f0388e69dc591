"""The history of a run in columns: half a million steps take 40 MB, of which a reader loads the columns it needs.

A table is made of rows of JSON lines, or of a compacted file, and gives the same rows back: what fits no column, as a
field of another release, is kept beside them. Compacted files are NumPy's `.npz`, since every command has NumPy
already; docs/decisions/0065-compacted-history.md compares them with Parquet.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.errors import RunError
from jobs.run.rows import LARGEST, RESTORE, Row, checked, parsed
from jobs.run.validation_rows import MAIN_VALIDATION

Column = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Kind = type[int] | type[float] | type[str]

COLUMNS: Mapping[str, Kind] = {
    "step": int, "epoch": int, "loss": float, "learning_rate": float, "world_size": int, "attempt": int,
    "samples": str, "substitutions": int, "step_seconds": float, "data_wait_seconds": float, "skipped": str,
    "digest": str, "validation_top1": float, "validation_top5": float, "validation_samples": int,
    "validation_plan": str,
}  # fmt: skip
"""By name, in the order in which rows are written."""
LONGEST_TEXT = 64
"""Characters of a text in a column, each value of which takes as much memory as the longest."""
_REQUIRED = ("step", "epoch", "learning_rate", "world_size", "attempt")
_NO_INTEGER = np.iinfo(np.int64).min
"""Where a row has none; beyond all that rows may have."""
_MISSING: Mapping[Kind, Any] = {int: np.int64(_NO_INTEGER), float: np.float64(np.nan), str: np.bytes_(b"")}
_DTYPE_KINDS: Mapping[Kind, str] = {int: "i", float: "f", str: "S"}
_BOUNDS = {"validation_top1": (0, 1), "validation_top5": (0, 1), "validation_samples": (1, LARGEST - 1)}
_REST_PLACES, REST_LINES = "rest_places", "rest_lines"
"""Arrays of a compacted file: numbers of the rows that have other fields, and these as JSON lines."""
_BLOCK_ROWS = 8192
"""Rows that are Python objects at a time."""


@dataclass(frozen=True, eq=False)
class StepTable:
    """Steps of a run."""

    count: int
    columns: dict[str, Column]
    """By name, (count,) each: int64, float64, or ASCII bytes; a column that is not here has no values.

    A value that is missing is _NO_INTEGER, NaN or empty.
    """
    rest: Mapping[int, Row] = field(default_factory=dict)
    """By a row's place, its fields that no column can give back: of other names; numbers and texts of other kinds."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> StepTable:
        """Of checked rows."""
        kept = list(rows)
        found = ((name, _column([row.get(name) for row in kept], name)) for name in COLUMNS)
        rest = {place: fields for place, row in enumerate(kept) if (fields := _rest(row))}
        return cls(len(kept), {name: column for name, column in found if column is not None}, rest)

    @classmethod
    def joined(cls, parts: Sequence[StepTable]) -> StepTable:
        """One after the other; takes the columns out of the parts, so that only one at a time is in memory twice."""
        names = {name for part in parts for name in part.columns}
        columns = {name: np.concatenate([part._taken(name) for part in parts]) for name in COLUMNS if name in names}
        rest, first = {}, 0
        for part in parts:
            rest.update({first + place: fields for place, fields in part.rest.items()})
            first += part.count
        return cls(first, columns, rest)

    def __len__(self) -> int:
        return self.count

    @property
    def names(self) -> set[str]:
        """Of its columns; REST_LINES where rows have other fields."""
        return {*self.columns} | ({REST_LINES} if self.rest else set())

    def only(self, columns: Collection[str] | None) -> StepTable:
        """Some of the columns, and nothing beside them; None: all of it."""
        if columns is None:
            return self
        return StepTable(self.count, {name: column for name, column in self.columns.items() if name in columns})

    def numbers(self, name: str) -> Floats:
        """A column of numbers, (n,); NaN where a row has none."""
        column = self.columns.get(name)
        if column is None:
            return np.full(self.count, np.nan)
        return column if column.dtype.kind == "f" else np.where(column == _NO_INTEGER, np.nan, column)

    def has_value(self, name: str) -> npt.NDArray[np.bool_]:
        """Whether each row has a value of a column that is here, (n,)."""
        column = self.columns[name]
        missing = _MISSING[COLUMNS[name]]
        found: npt.NDArray[np.bool_] = ~np.isnan(column) if column.dtype.kind == "f" else column != missing
        return found

    def texts(self, name: str) -> npt.NDArray[np.bytes_]:
        """A column of texts, (n,); empty where a row has none, or one that fits no column."""
        return self.columns.get(name, np.zeros(self.count, "S1"))

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """(n,)."""
        return self.columns.get("step", np.zeros(0, np.int64))

    def where(self, mask: npt.NDArray[np.bool_]) -> StepTable:
        """The rows where a mask, (n,), is true."""
        return self.at(np.flatnonzero(mask))

    def at(self, places: npt.NDArray[np.intp]) -> StepTable:
        """The rows at some places, in their order."""
        return self._at(places, {name: column[places] for name, column in self.columns.items()})

    def slice(self, first: int, count: int) -> StepTable:
        """Some rows in a row; views of the columns."""
        part = slice(first, first + count)
        places = np.arange(self.count)[part]
        return self._at(places, {name: column[part] for name, column in self.columns.items()})

    def measured(self) -> StepTable:
        """The rows that have accuracies on validation samples."""
        return self.where(np.isfinite(self.numbers(MAIN_VALIDATION)))

    def rows(self) -> Iterator[Row]:
        """The rows as they were written, of the columns that are here."""
        for first in range(0, self.count, _BLOCK_ROWS):
            yield from self.slice(first, _BLOCK_ROWS)._block_rows()

    def to_npz(self) -> bytes:
        """As a compacted file."""
        data, arrays = io.BytesIO(), dict(self.columns)
        if self.rest:
            arrays[_REST_PLACES] = np.fromiter(self.rest, np.int64, len(self.rest))
            arrays[REST_LINES] = np.frombuffer("\n".join(map(json.dumps, self.rest.values())).encode(), np.uint8)
        np.savez_compressed(data, allow_pickle=False, **arrays)
        return data.getvalue()

    @classmethod
    def of_npz(cls, data: bytes, count: int, url: str, columns: Collection[str] | None = None) -> StepTable:
        """Of a compacted file.

        Args:
            data: Its content.
            count: Its rows.
            url: Where it lies, for the message.
            columns: Those that are needed; None: all, and what is kept beside them.

        Raises:
            RunError: It is not what compaction writes.
        """
        wanted = set(COLUMNS if columns is None else columns)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                most = (count + 1) * (LONGEST_TEXT + 8) + 4096
                if any(each.file_size > most for each in archive.infolist() if not each.filename.startswith("rest_")):
                    raise ValueError(f"an array is longer than {count:,} rows")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                names = [name for name in COLUMNS if name in arrays and name in wanted]
                found = cls(count, {name: arrays[name] for name in names})
                if columns is None and _REST_PLACES in arrays:
                    lines = arrays[REST_LINES].tobytes().splitlines()
                    places = arrays[_REST_PLACES].tolist()
                    rest = {place: parsed(line, url) for place, line in zip(places, lines, strict=True)}
                    found = cls(count, found.columns, rest)
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            rule = f"must be an .npz file of {count:,} steps ({str(error).splitlines()[0]})"
            raise RunError("run directory", rule, url, RESTORE) from None
        _check(found, wanted, url)
        return found

    def _taken(self, name: str) -> Column:
        return self.columns.pop(name, np.full(self.count, _MISSING[COLUMNS[name]]))

    def _at(self, places: npt.NDArray[np.intp], columns: dict[str, Column]) -> StepTable:
        """The rows at some places, whose columns are given."""
        rest = {}
        if self.rest:
            rest = {new: self.rest[old] for new, old in enumerate(places.tolist()) if old in self.rest}
        return StepTable(len(places), columns, rest)

    def _block_rows(self) -> list[Row]:
        values = {name: _values(self.columns[name], name) for name in COLUMNS if name in self.columns}
        full = [name for name, column in values.items() if name == "loss" or None not in column]
        rows = [dict(zip(full, each, strict=True)) for each in zip(*(values[name] for name in full), strict=True)]
        rows = rows or [{} for _ in range(self.count)]
        for name in [name for name in values if name not in full]:
            for row, value in zip(rows, values[name], strict=True):
                if value is not None:
                    row[name] = value
        for place, fields in self.rest.items():
            rows[place].update(fields)
        return rows


def _rest(row: Row) -> Row:
    return {name: value for name, value in row.items() if not _fits(COLUMNS.get(name), value)} if _is_odd(row) else {}


def _is_odd(row: Row) -> bool:
    """Whether a row has anything that does not fit."""
    for name, value in row.items():  # noqa: SIM110  a generator takes twice the time, for each of a million rows
        if not _fits(COLUMNS.get(name), value):
            return True
    return False


def _fits(kind: Kind | None, value: Any) -> bool:
    """Whether a column of a kind gives a value back as it was."""
    if type(value) is not kind:
        return value is None and kind is float  # a loss
    return not isinstance(value, str) or _fits_text(value)


def _fits_text(text: str) -> bool:
    return 0 < len(text) <= LONGEST_TEXT and text.isascii() and text[-1] != "\0"


def _column(values: list[Any], name: str) -> Column | None:
    """The values that fit; None where there are none. Numbers that only have another type are here, and in the rest."""
    kind = COLUMNS[name]
    if values.count(None) == len(values) and name != "loss":  # a row has a loss that is none
        return None
    if kind is str:
        return np.array([value.encode() if value is not None and _fits_text(value) else b"" for value in values])
    if None in values:
        missing = _NO_INTEGER if kind is int else math.nan
        values = [missing if value is None else value for value in values]
    return np.array(values, np.int64 if kind is int else np.float64)


def _values(column: Column, name: str) -> list[Any]:
    """As Python's own; None where a row has none."""
    found: list[Any] = column.tolist()
    kind = COLUMNS[name]
    if kind is str:
        return [value.decode() if value else None for value in found]
    if kind is int:
        return [None if value == _NO_INTEGER else value for value in found] if _NO_INTEGER in found else found
    return [None if value != value else value for value in found] if np.isnan(column).any() else found  # noqa: PLR0124


def _check(steps: StepTable, wanted: Collection[str], url: str) -> None:
    """Refuse what no checked row has: it would be of a foreign file, since a damaged one has another checksum.

    Args:
        steps: As they were read.
        wanted: The columns that were asked for.
        url: Where they lie, for the message.

    Raises:
        RunError: Names the first.
    """
    for name in (*_REQUIRED, "loss"):
        if steps.count and name in wanted and name not in steps.columns:
            raise RunError("run directory", f"must give {name} in every row", url, RESTORE)
    for name, column in steps.columns.items():
        kind = COLUMNS[name]
        if column.shape != (steps.count,) or column.dtype.kind != _DTYPE_KINDS[kind]:
            raise RunError("run directory", f"must give {name} as one value a row", url, RESTORE)
        if kind is str:
            continue
        numbers = steps.numbers(name)
        numbers = numbers[~np.isnan(numbers)]
        if name in _REQUIRED and len(numbers) < steps.count:
            raise RunError("run directory", f"must give {name} in every row", url, RESTORE)
        low, high = _BOUNDS.get(name, (1 - LARGEST, LARGEST - 1))
        if len(numbers) and not low <= numbers.min() <= numbers.max() <= high:
            raise RunError("run directory", f"must give {name} as a number from {low} to {high}", url, RESTORE)
    if {MAIN_VALIDATION, "validation_samples"} <= set(wanted):
        measured = np.isfinite(steps.numbers(MAIN_VALIDATION))
        if np.isnan(steps.numbers("validation_samples")[measured]).any():
            raise RunError("run directory", "must give validation_samples", url, RESTORE)
    if any(not 0 <= place < steps.count for place in steps.rest):
        raise RunError("run directory", "must give further fields of its rows", url, RESTORE)
    if steps.rest:
        odd = np.zeros(steps.count, np.bool_)
        odd[list(steps.rest)] = True
        for row in steps.where(odd).rows():
            checked("history", row, url)
