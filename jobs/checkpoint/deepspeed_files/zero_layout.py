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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from jobs.checkpoint.checkpoint import file_url
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.deepspeed_files.torch_archive import TensorPlace
from jobs.checkpoint.deepspeed_files.zero_files import (
    FilesFound,
    ModelFile,
    OptimizerFile,
    Shape,
    file_names,
    of_deepspeed,
)
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.tensor_ranges import ITEM_BYTES, SourceTensor
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory


class Vector:
    """Tensors of one type, one after the other, in any number of files."""

    def __init__(self, places: Sequence[TensorPlace]) -> None:
        self._places = tuple(places)
        self._ends = list(itertools.accumulate(place.elements for place in places))
        self.dtype = places[0].dtype if places else "F32"
        self.elements = self._ends[-1] if places else 0

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, str, int]]:
        """Elements [start, stop) as they lie together: their number, the file's URL, the first one's byte offset."""
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            place, begin = self._places[index], self._ends[index] - self._places[index].elements
            end = min(stop, self._ends[index])
            offset = place.record.offset + (place.first + start - begin) * ITEM_BYTES[self.dtype]
            yield end - start, place.record.url, offset
            start, index = end, index + 1


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
        self._urls = [file_url(run, commit.step, file.name) for file in commit.files]
        self._numbers = {url: number for number, url in enumerate(self._urls)}
        self._models = [file for name in models if isinstance(file := found[name], ModelFile)]
        self._optimizers = [file for name in optimizers if isinstance(file := found[name], OptimizerFile)]
        self._is_stage_3 = self._optimizers[0].is_stage_3
        if any(file.is_stage_3 != self._is_stage_3 for file in self._optimizers):
            raise CheckpointError("checkpoint", "must be of ZeRO 1, 2 or 3", run.name, "choose another --step")
        ranks = self._optimizers[0].ranks or len(optimizers)
        if ranks != len(optimizers):
            rule = f"must hold the optimizer states of all its {ranks} ranks"
            raise CheckpointError("checkpoint", rule, f"{len(optimizers)} of {run.name}", "choose another --step")

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
            return self._cut_parameters(shapes, groups)
        return self._cut_groups(shapes, groups, self._optimizers[0].paddings)

    def _cut_groups(
        self,
        shapes: Sequence[Mapping[str, Shape]],
        groups: Sequence[Sequence[TensorPlace]],
        paddings: Sequence[Sequence[int]] | None,
    ) -> Iterator[SourceTensor]:
        """ZeRO 1 and 2. DeepSpeed aligns groups to twice the number of ranks, and may pad after each parameter."""
        align = 2 * len(groups)
        for index, group in enumerate(shapes):
            vector = Vector([rank[index] for rank in groups])
            padded = paddings[index] if paddings else [0] * len(group)
            sizes = [math.prod(shape) + more for shape, more in zip(group.values(), padded, strict=True)]
            self._check_length(math.ceil(sum(sizes) / align) * align, math.ceil(vector.elements / align) * align)
            starts = itertools.accumulate(sizes, initial=0)
            for (name, shape), start in zip(group.items(), starts, strict=False):
                yield self._tensor(name, shape, [vector], start)

    def _cut_parameters(
        self, shapes: Sequence[Mapping[str, Shape]], groups: Sequence[Sequence[TensorPlace]]
    ) -> Iterator[SourceTensor]:
        """ZeRO 3."""
        vectors = [Vector(rank) for rank in groups]
        named = [pair for group in shapes for pair in group.items()]
        shares = [math.ceil(math.prod(shape) / len(vectors)) for _, shape in named]
        for vector in vectors:
            self._check_length(sum(shares), vector.elements)
        starts = itertools.accumulate(shares, initial=0)
        for (name, shape), start in zip(named, starts, strict=False):
            yield self._tensor(name, shape, vectors, start)

    def _fixed(self) -> Iterator[SourceTensor]:
        """Frozen parameters and buffers: in the module's state below ZeRO 3, else frozen parameters lie in ranges."""
        first = self._models[0]
        for name, place in first.fixed.items():
            yield self._tensor(name, place.shape, [Vector([place])])
        for name, shape in first.frozen.items():
            yield self._tensor(name, shape, [Vector([model.fragments[name]]) for model in self._models])

    def _tensor(self, name: str, shape: Shape, vectors: Sequence[Vector], offset: int = 0) -> SourceTensor:
        """A tensor that is cut into equal shares, the last ones shorter, at the same offset of each vector."""
        elements, extents, first = math.prod(shape), [], 0
        share = math.ceil(elements / len(vectors))
        for vector in vectors:
            count = min(share, elements - first)
            for length, url, place in vector.ranges(offset, offset + count):
                extents.append((first, self._numbers[url], place))
                first += length
        return SourceTensor(name, shape, vectors[0].dtype, self._urls, np.array(extents, np.int64).reshape(-1, 3))

    def _check_length(self, needed: int, there: int) -> None:
        if needed != there:
            rule = f"must hold as many values as its parameters have ({needed})"
            raise CheckpointError("checkpoint", rule, f"{there} in {self._run.name}", "choose another --step")
