"""Where the values of a run's state lie in a checkpoint, by its commit object alone: no file is opened to find one.

A rank's file holds the weights of its ranges one after the other, as fp32, then `exp_avg` and `exp_avg_sq` of the same
ranges; then what is not trained. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.checkpoint.checkpoint import file_url
from jobs.checkpoint.commit import OTHERS, TRAINED_DTYPE, Commit, Range, data_bytes, stretch_bytes
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.tensor_ranges import ITEM_BYTES, SourceTensor
from jobs.errors import DamagedCheckpointError
from jobs.run.directory import RunDirectory


class Layout(Protocol):
    """Where a checkpoint's values lie."""

    def weights(self) -> list[SourceTensor]:
        """Every tensor of the model's state dict: trained, frozen, and buffers."""

    def moments(self) -> Mapping[str, Mapping[str, SourceTensor]]:
        """AdamW's moments of every trained parameter: each of MOMENTS, by the parameter's name."""

    @property
    def optimizer_step(self) -> float:
        """AdamW's step count, for its bias correction."""


@dataclass(frozen=True)
class _Placed:
    """Where ranges of one kind lie: rows of tensor, first element, element after the last, file, byte offset."""

    rows: NDArray[np.int64]
    tensors: frozenset[int]


class StateLayout:
    """The layout of one checkpoint. Holds places, no values."""

    def __init__(self, run: RunDirectory, commit: Commit) -> None:
        """Compute the places.

        Args:
            run: Whose checkpoint it is.
            commit: Of the checkpoint; its files are not DeepSpeed's own.

        Raises:
            DamagedCheckpointError: The commit lists ranges that overlap, leave a gap, or do not fit its files.
        """
        self._run, self._commit = run, commit
        self._urls = [file_url(run, commit.step, file.name) for file in commit.files]
        self._sizes = [self._element_bytes(number) for number in range(len(commit.tensors))]
        self._trained, self._fixed = self._placed("trained"), self._placed("fixed")
        owned = self._trained.tensors | self._fixed.tensors
        for number, tensor in enumerate(commit.tensors):
            if tensor.same_as:
                continue
            if number not in owned and tensor.elements:
                raise self._damaged(f"say where {tensor.name} lies")
            if number in self._trained.tensors and tensor.dtype != TRAINED_DTYPE:
                raise self._damaged(f"hold {tensor.name}, which is trained, as {TRAINED_DTYPE}")
        for file in commit.files:
            if file.data_offset + data_bytes(file, self._sizes) != file.bytes:
                raise self._damaged(f"say what each byte of {file.name} is")

    def weights(self) -> list[SourceTensor]:
        """Every tensor of the model's state dict, in the commit's order."""
        by_number = {**self._tensors(self._trained, 0), **self._tensors(self._fixed, 0)}
        names = {tensor.name: number for number, tensor in enumerate(self._commit.tensors)}
        found = []
        for number, tensor in enumerate(self._commit.tensors):
            source = by_number.get(names.get(tensor.same_as, -1) if tensor.same_as else number)
            if source is None and (tensor.same_as or tensor.elements):
                raise self._damaged(f"say where {tensor.name} lies")
            extents = source.extents if source else np.empty((0, 3), np.int64)
            found.append(SourceTensor(tensor.name, tensor.shape, tensor.dtype, self._urls, extents))
        return found

    def moments(self) -> dict[str, dict[str, SourceTensor]]:
        """AdamW's moments of every trained parameter: each of MOMENTS, by the parameter's name."""
        return {
            moment: {tensor.name: tensor for tensor in self._tensors(self._trained, place).values()}
            for place, moment in enumerate(MOMENTS, 1)
        }

    @property
    def optimizer_step(self) -> float:
        """AdamW's step count, for its bias correction."""
        return self._commit.optimizer_step

    def _tensors(self, placed: _Placed, kind: int) -> dict[int, SourceTensor]:
        """The tensors that lie there, by number: weights, or the moments that lie so many stretches behind them."""
        strides = np.array([stretch_bytes(file.trained, self._sizes) for file in self._commit.files], np.int64)
        extents = placed.rows[:, [1, 3, 4]]
        extents[:, 2] += kind * strides[extents[:, 1]]
        edges = np.searchsorted(placed.rows[:, 0], np.arange(len(self._commit.tensors) + 1))
        found = {}
        for number in sorted(placed.tensors):
            tensor, mine = self._commit.tensors[number], extents[edges[number] : edges[number + 1]]
            found[number] = SourceTensor(tensor.name, tensor.shape, tensor.dtype, self._urls, mine)
        return found

    def _placed(self, kind: str) -> _Placed:
        """Ranges of all files by tensor and first element, each with its place."""
        rows = np.array([row for number in range(len(self._urls)) for row in self._rows(number, kind)], np.int64)
        rows = rows.reshape(-1, 5)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        tensors = np.unique(rows[:, 0]).tolist()
        begins, ends = (np.searchsorted(rows[:, 0], tensors, side).tolist() for side in ("left", "right"))
        for number, begin, end in zip(tensors, begins, ends, strict=True):
            starts, stops = rows[begin:end, 1].tolist(), rows[begin:end, 2].tolist()
            if [*starts, self._commit.tensors[number].elements] != [0, *stops]:
                raise self._damaged(f"list each value of {self._commit.tensors[number].name} once")
        return _Placed(rows, frozenset(tensors))

    def _rows(self, number: int, kind: str) -> Iterator[tuple[int, int, int, int, int]]:
        file = self._commit.files[number]
        trained = stretch_bytes(self._checked(file.trained), self._sizes)
        is_trained = kind == "trained"
        place = file.data_offset + (0 if is_trained else trained * (1 + len(MOMENTS)))
        for tensor, start, stop in self._checked(file.trained if is_trained else file.fixed):
            yield tensor, start, stop, number, place
            place += (stop - start) * self._sizes[tensor]

    def _checked(self, ranges: Sequence[Range]) -> Sequence[Range]:
        if not all(tensor < len(self._sizes) and start < stop for tensor, start, stop in ranges):
            raise self._damaged("list ranges of the tensors that it names")
        return ranges

    def _element_bytes(self, number: int) -> int:
        tensor = self._commit.tensors[number]
        if tensor.dtype not in ITEM_BYTES:
            raise self._damaged(f"give a known dtype for {tensor.name}")
        return ITEM_BYTES[tensor.dtype]

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError("commit", f"must {what}", f"step {self._commit.step} of {self._run.name}", OTHERS)
