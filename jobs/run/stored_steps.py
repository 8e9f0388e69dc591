"""The steps of a run, most of them still as they are stored, and decoded some at a time.

A row of a compacted file takes 33 bytes as it is stored, and 140 in columns. So a reader holds the files as they are,
finds by the column `step` which rows it wants in which order, and decodes their columns in blocks. All files are there
before the first block is made: what is compacted meanwhile changes nothing.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.run.rows import Row, checked, row_lines
from jobs.run.step_table import Floats, StepTable

BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class PackedSteps:
    """A compacted file."""

    data: bytes
    count: int
    url: str
    """For messages."""

    def __len__(self) -> int:
        return self.count

    @property
    def names(self) -> set[str]:
        """As those of a table."""
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}

    def only(self, columns: Collection[str] | None) -> StepTable:
        """Some of the columns; None: all, and what is kept beside them.

        Raises:
            RunError: It is not what compaction writes.
        """
        return StepTable.of_npz(self.data, self.count, self.url, columns)


StepFile = StepTable | PackedSteps
"""A part, or a compacted file."""


@dataclass(frozen=True)
class StepCodec:
    """Files of a history (jobs.run.parts)."""

    columns: Collection[str] | None = None
    """Those that are kept of parts; None: all."""
    suffix: str = ".npz"

    def of_lines(self, data: bytes, url: str) -> StepFile:
        """Of JSON lines."""
        return StepTable.of(checked("history", row, url) for row in row_lines(data, url)).only(self.columns)

    def of_compacted(self, data: bytes, rows: int, url: str) -> StepFile:
        """Of an .npz file, whose columns are checked when they are decoded."""
        return PackedSteps(data, rows, url)

    def compacted(self, parts: Sequence[StepFile]) -> bytes:
        """As an .npz file."""
        return StepTable.joined([part.only(None) for part in parts]).to_npz()


@dataclass(frozen=True, eq=False)
class StoredSteps:
    """Rows of a history, in any order. Whatever decodes columns raises RunError where a file is damaged."""

    files: Sequence[StepFile]
    columns: frozenset[str] | None
    """Those that are decoded; None: all."""
    places: npt.NDArray[np.int32]
    """Of the rows in the files, one after the other; (n,)."""
    steps: npt.NDArray[np.int64]
    """(n,)."""

    @classmethod
    def of(cls, files: Sequence[StepFile], columns: Collection[str] | None = None) -> StoredSteps:
        """All rows, as they were written: by attempt, then by step."""
        steps = np.empty(sum(map(len, files)), np.int64)
        for file, part in _parts_of(steps, files):
            part[:] = file.only(("step",)).steps
        places = np.arange(len(steps), dtype=np.int32)
        return cls(files, None if columns is None else frozenset(columns), places, steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def names(self) -> set[str]:
        """Of the columns in any file; REST_LINES where rows have other fields."""
        return set().union(*(file.names for file in self.files))

    def only(self, columns: Collection[str]) -> StoredSteps:
        """The same rows with some of the columns."""
        return replace(self, columns=frozenset(columns))

    def where(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.integer] | slice) -> StoredSteps:
        """Some of the rows: by a mask, (n,), by their numbers, or in a row."""
        return replace(self, places=self.places[chosen], steps=self.steps[chosen])

    def latest(self) -> StoredSteps:
        """One row a step, by step: the last of each."""
        return self.where(self._latest())

    def superseded(self) -> npt.NDArray[np.bool_]:
        """Whether a later row is of the same step, (n,)."""
        found = np.ones(len(self), np.bool_)
        found[self._latest()] = False
        return found

    def numbers(self, name: str) -> Floats:
        """A column of numbers, (n,); NaN where a row has none."""
        found = np.empty(sum(map(len, self.files)))
        for file, part in _parts_of(found, self.files):
            part[:] = file.only((name,)).numbers(name)
        return found[self.places]

    def rows(self) -> Iterator[Row]:
        """The rows as they were written, of the columns that are decoded."""
        return (row for block in self.blocks() for row in block.rows())

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[StepTable]:
        """The rows in order, so many at a time; only the files of one block are decoded at once."""
        decoded: dict[int, StepTable] = {}
        owners = self._owners(0, rows)
        for first in range(0, len(self), rows):
            following, pieces = self._owners(first + rows, rows), []
            for number in np.unique(owners).tolist():
                if number not in decoded:
                    decoded[number] = self.files[number].only(self.columns)
                places = self.places[first : first + rows][owners == number] - self._starts[number]
                pieces.append(decoded[number].at(places))
                if number not in following:
                    del decoded[number]
            block = pieces[0] if len(pieces) == 1 else StepTable.joined(pieces)
            if (owners[1:] < owners[:-1]).any():  # steps that an earlier attempt did last are among those of later ones
                block = block.at(np.argsort(np.argsort(owners, kind="stable")))
            yield block
            owners = following

    @cached_property
    def _starts(self) -> npt.NDArray[np.intp]:
        """Of the files among all rows."""
        return np.cumsum([0, *map(len, self.files)])[:-1]

    def _owners(self, first: int, rows: int) -> npt.NDArray[np.intp]:
        """The numbers of the files of some rows in a row."""
        return np.searchsorted(self._starts, self.places[first : first + rows], side="right") - 1

    def _latest(self) -> npt.NDArray[np.int32]:
        """Numbers of the rows that count, by step."""
        order = np.argsort(self.steps, kind="stable").astype(np.int32)
        ordered = self.steps[order]
        is_last = np.ones(len(order), np.bool_)
        is_last[:-1] = ordered[:-1] != ordered[1:]
        return order[is_last]


def _parts_of(whole: npt.NDArray[Any], files: Sequence[StepFile]) -> Iterator[tuple[StepFile, npt.NDArray[Any]]]:
    """Each file, and its part of an array of all rows."""
    first = 0
    for file in files:
        yield file, whole[first : first + len(file)]
        first += len(file)
