"""Layout of DeepSpeed's ZeRO files: where the values of each named tensor lie. Reads metadata, no weights.

It is hand-written since no library reads these files by ranges and at another world size: DeepSpeed 0.19.8 loads them
only at the world size that wrote them, its universal checkpoints restore neither frozen parameters nor buffers, and
`zero_to_fp32` forgets frozen parameters of ZeRO 1 and holds the fp32 weights in memory (docs/decisions/0001, 0022).

ZeRO 1 and 2 cut the concatenation of a group's parameters into as many equal ranges as there were ranks; ZeRO 3 cuts
each parameter, the last range padded, and a rank's ranges lie one after the other. Either way element i of a tensor
lies in vector i // share at `offset + i % share`, with one vector for ZeRO 1 and 2 and one a rank for ZeRO 3. AdamW's
moments lie as the fp32 masters do.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from jobs.checkpoint.checkpoint import Commit
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.torch_archive import ITEM_BYTES, ByteRange, Files, TensorPlace
from jobs.checkpoint.zero_files import (
    FilesFound,
    ModelFile,
    OptimizerFile,
    Shape,
    check_sizes,
    file_names,
    look_into,
    of_deepspeed,
)
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory

_FLOATS = ("F64", "F32", "F16", "BF16")


class Held(NamedTuple):
    """Elements [start, stop) of one of a tensor's vectors."""

    vector: int
    start: int
    stop: int


class Vector:
    """Tensors of one type, one after the other, in any number of files."""

    def __init__(self, places: Sequence[TensorPlace]) -> None:
        self.places = tuple(places)
        self._ends = list(itertools.accumulate(place.elements for place in places))
        self.dtype = places[0].dtype if places else "F32"
        self.elements = self._ends[-1] if places else 0

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """Where elements [start, stop) lie, in order."""
        item = ITEM_BYTES[self.dtype]
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            place, begin = self.places[index], self._ends[index] - self.places[index].elements
            end = min(stop, self._ends[index])
            offset = place.record.offset + (place.first + start - begin) * item
            yield ByteRange(place.record.url, offset, (end - start) * item)
            start, index = end, index + 1

    def held(self, urls: Set[str]) -> Iterator[tuple[int, int]]:
        """The longest ranges of its elements that lie in some of the files."""
        begin = None
        for place, end in zip(self.places, self._ends, strict=True):
            is_there = place.record.url in urls
            if is_there and begin is None:
                begin = end - place.elements
            elif not is_there and begin is not None:
                yield begin, end - place.elements
                begin = None
        if begin is not None:
            yield begin, self.elements


@dataclass(frozen=True)
class SourceTensor:
    """A named tensor of the model, and where its elements lie."""

    name: str
    shape: tuple[int, ...]
    vectors: tuple[Vector, ...]
    offset: int
    """Of its first element in each vector."""
    share: int
    """Most of its elements that one vector holds."""

    @property
    def dtype(self) -> str:
        """As in safetensors, as it is stored."""
        return self.vectors[0].dtype

    @property
    def is_floating_point(self) -> bool:
        """Whether it is converted to the requested dtype."""
        return self.dtype in _FLOATS

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """Where its elements [start, stop) lie, in order."""
        while start < stop:
            index, within = divmod(start, self.share)
            end = min(stop, (index + 1) * self.share)
            yield from self.vectors[index].byte_ranges(self.offset + within, self.offset + within + end - start)
            start = end

    def ranges(self, held: Sequence[Held]) -> Iterator[range]:
        """Its elements in ranges of its vectors."""
        for index, start, stop in held:
            first = index * self.share
            count = min(self.share, self.elements - first)
            low, high = max(0, start - self.offset), min(count, stop - self.offset)
            if low < high:
                yield range(first + low, first + high)


class ZeroFiles:
    """The layout of one checkpoint, from its files. Holds places, no values."""

    def __init__(self, run: RunDirectory, commit: Commit, found: FilesFound) -> None:
        """Put together what was found in the files.

        Args:
            run: Whose checkpoint it is.
            commit: Of the checkpoint.
            found: From `look_into`, of all files.

        Raises:
            CheckpointError: The files are of a kind that is not handled.
        """
        models, optimizers = file_names(commit)
        self._run = run
        self._models = [file for name in models if isinstance(file := found[name], ModelFile)]
        self._optimizers = [file for name in optimizers if isinstance(file := found[name], OptimizerFile)]
        self._is_stage_3 = self._optimizers[0].is_stage_3
        if any(file.is_stage_3 != self._is_stage_3 for file in self._optimizers):
            raise CheckpointError("checkpoint", "must be of ZeRO 1, 2 or 3", run.name, "choose another --step")
        ranks = self._optimizers[0].ranks or len(optimizers)
        if ranks != len(optimizers):
            rule = f"must hold the optimizer states of all its {ranks} ranks"
            raise CheckpointError("checkpoint", rule, f"{len(optimizers)} of {run.name}", "choose another --step")

    @classmethod
    def read(cls, run: RunDirectory, commit: Commit, files: Files) -> ZeroFiles:
        """Find the weights in every file, and check its size.

        Args:
            run: Whose checkpoint it is.
            commit: Of the checkpoint.
            files: What the archives are read through.

        Raises:
            DamagedCheckpointError: A file is missing, has another size than the commit says, or is not as it was
                written.
            CheckpointError: The files are of a kind that is not handled.
        """
        file_names(commit)
        check_sizes(run, commit)
        return cls(run, commit, look_into(run, commit, files, moments=False))

    def weights(self) -> list[SourceTensor]:
        """Every tensor of the model's state dict: trained, frozen, and buffers.

        Trained parameters come first, in the order in which they lie in the files.

        Raises:
            DamagedCheckpointError: A tensor does not lie where it should.
            CheckpointError: There are more or fewer values than the parameters have.
        """
        with of_deepspeed(self._run):
            known = {tensor.name: tensor for tensor in self._cut([file.masters for file in self._optimizers])}
            known.update({tensor.name: tensor for tensor in self._fixed() if tensor.name not in known})
            for alias, name in self._models[0].aliases.items():
                if name in known:
                    known[alias] = replace(known[name], name=alias)
            return list(known.values())

    def moments(self) -> dict[str, dict[str, SourceTensor]]:
        """AdamW's moments of every trained parameter: `exp_avg` and `exp_avg_sq`, each by the parameter's name.

        Raises:
            DamagedCheckpointError: As `weights`.
            CheckpointError: As `weights`.
        """
        with of_deepspeed(self._run):
            groups = {moment: [file.moments[moment] for file in self._optimizers] for moment in MOMENTS}
            return {moment: {tensor.name: tensor for tensor in self._cut(groups[moment])} for moment in MOMENTS}

    @property
    def optimizer_step(self) -> float:
        """AdamW's step count, for its bias correction."""
        return self._optimizers[0].step

    def _cut(self, groups: Sequence[Sequence[TensorPlace]]) -> Iterator[SourceTensor]:
        """The parameters in flat vectors of all ranks."""
        shapes = self._models[0].shapes
        if self._is_stage_3:
            return _cut_parameters(self._run, shapes, groups)
        return _cut_groups(self._run, shapes, groups, self._optimizers[0].paddings)

    def _fixed(self) -> Iterator[SourceTensor]:
        """Frozen parameters and buffers: in the module's state below ZeRO 3, else frozen parameters lie in ranges."""
        first = self._models[0]
        for name, place in first.fixed.items():
            yield SourceTensor(name, place.shape, (Vector([place]),), 0, max(1, place.elements))
        for name, shape in first.frozen.items():
            fragments = tuple(Vector([model.fragments[name]]) for model in self._models)
            share = math.ceil(math.prod(shape) / len(fragments))
            yield SourceTensor(name, shape, fragments, 0, max(1, share))


def _cut_groups(
    run: RunDirectory,
    shapes: Sequence[Mapping[str, Shape]],
    groups: Sequence[Sequence[TensorPlace]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[SourceTensor]:
    """ZeRO 1 and 2. DeepSpeed aligns groups to twice the number of ranks, and may pad after each parameter."""
    align = 2 * len(groups)
    for index, group in enumerate(shapes):
        vector, offset = Vector([rank[index] for rank in groups]), 0
        for number, (name, shape) in enumerate(group.items()):
            yield SourceTensor(name, shape, (vector,), offset, max(1, math.prod(shape)))
            offset += math.prod(shape) + (paddings[index][number] if paddings else 0)
        _check_length(run, math.ceil(offset / align) * align, math.ceil(vector.elements / align) * align)


def _cut_parameters(
    run: RunDirectory, shapes: Sequence[Mapping[str, Shape]], groups: Sequence[Sequence[TensorPlace]]
) -> Iterator[SourceTensor]:
    """ZeRO 3."""
    vectors, offset = tuple(Vector(rank) for rank in groups), 0
    for group in shapes:
        for name, shape in group.items():
            share = math.ceil(math.prod(shape) / len(vectors))
            yield SourceTensor(name, shape, vectors, offset, max(1, share))
            offset += share
    for vector in vectors:
        _check_length(run, offset, vector.elements)


def _check_length(run: RunDirectory, needed: int, there: int) -> None:
    if needed != there:
        rule = f"must hold as many values as its parameters have ({needed})"
        raise CheckpointError("checkpoint", rule, f"{there} in {run.name}", "choose another --step")
