"""Where in DeepSpeed's ZeRO files the values of each named tensor lie; reads metadata, moves no weight.

ZeRO 1 and 2 cut the concatenation of a group's parameters into as many equal ranges as there were ranks; ZeRO 3 cuts
each parameter, the last range padded, and a rank's ranges lie one after the other. Either way element i of a tensor
lies in vector i // share at `offset + i % share`, with one vector for ZeRO 1 and 2 and one a rank for ZeRO 3. AdamW's
moments lie as the fp32 masters do.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from jobs.checkpoint import Commit, folder_name
from jobs.errors import CheckpointError
from jobs.run_directory import RunDirectory
from jobs.torch_archive import ITEM_BYTES, Files, LazyTensor, Record, damaged, read_archive
from pipeline.errors import UserError

_THREADS = 8
"""Files that are looked into at once."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""
_MASTERS = {True: "fp32_flat_groups", False: "single_partition_of_fp32_groups"}
"""Where the fp32 masters are: in ZeRO 3, and else."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Extent:
    """Bytes that lie together in one record."""

    record: Record
    start: int
    """Within the record."""
    bytes: int


class Vector:
    """Tensors of one type, one behind the other, in any number of files."""

    def __init__(self, tensors: Sequence[LazyTensor]) -> None:
        self._places = [tensor.place() for tensor in tensors]
        self._ends = list(itertools.accumulate(place.elements for place in self._places))
        self.dtype = self._places[0].dtype if self._places else "F32"
        self.elements = self._ends[-1] if self._ends else 0

    @property
    def records(self) -> list[Record]:
        """Where its tensors lie."""
        return [place.record for place in self._places]

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """The bytes of elements [start, stop), in order."""
        item = ITEM_BYTES[self.dtype]
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            place, begin = self._places[index], self._ends[index] - self._places[index].elements
            end = min(stop, self._ends[index])
            yield Extent(place.record, (place.first + start - begin) * item, (end - start) * item)
            start, index = end, index + 1


@dataclass(frozen=True)
class SourceTensor:
    """A named tensor of the model, and where its elements lie."""

    name: str
    shape: tuple[int, ...]
    vectors: tuple[Vector, ...]
    offset: int
    """Of its first element in each vector."""
    share: int
    """Elements that a vector holds of it, at most."""

    @property
    def dtype(self) -> str:
        """As in safetensors, as it is stored."""
        return self.vectors[0].dtype

    @property
    def is_floating_point(self) -> bool:
        """Whether it is converted to the dtype that is asked for."""
        return self.dtype in _FLOATS

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.shape)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """The bytes of its elements [start, stop), in order."""
        while start < stop:
            index, within = divmod(start, self.share)
            end = min(stop, (index + 1) * self.share)
            yield from self.vectors[index].extents(self.offset + within, self.offset + within + end - start)
            start = end


class ZeroFiles:
    """What the files of one checkpoint say of themselves. Holds places, no values."""

    def __init__(
        self, run: RunDirectory, models: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take the contents of model states and of optimizer states, both by rank; `read` gets them.

        Raises:
            CheckpointError: The files are of a kind that is not handled.
        """
        self._run, self._models = run, models
        self._states: list[Mapping[str, Any]] = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
        self._stage_3 = _MASTERS[True] in self._states[0]
        if any(_MASTERS[self._stage_3] not in state for state in self._states):
            raise CheckpointError("checkpoint", "must be of ZeRO 1, 2 or 3", run.name, "choose another --step")
        _check_ranks(run, self._states)
        _check_kind(run, models)
        self._shapes: list[Mapping[str, tuple[int, ...]]] = models[0]["param_shapes"]

    @classmethod
    def read(cls, run: RunDirectory, commit: Commit, files: Files) -> ZeroFiles:
        """Look into every file.

        Args:
            run: Whose checkpoint it is.
            commit: Of the checkpoint.
            files: What the archives are read through.

        Raises:
            DamagedCheckpointError: A file is missing, has another size than the commit says, or is not as it was
                written.
            CheckpointError: The files are of a kind that is not handled.
        """
        models, optimizers = _read_files(run, commit, files)
        with _of_deepspeed(run):
            return cls(run, models, optimizers)

    def weights(self) -> list[SourceTensor]:
        """Every tensor of the model's state dict: trained, frozen, and buffers.

        Trained parameters come first, in the order in which they lie in the files.

        Raises:
            DamagedCheckpointError: A tensor does not lie as it should.
            CheckpointError: There are more values than the parameters have, or fewer.
        """
        with _of_deepspeed(self._run):
            known = {tensor.name: tensor for tensor in self._cut([_masters(state) for state in self._states])}
            known.update({tensor.name: tensor for tensor in _fixed(self._models, set(known))})
            for alias, name in self._models[0].get("shared_params", {}).items():
                if name in known:
                    known[alias] = replace(known[name], name=alias)
            return list(known.values())

    def moments(self) -> dict[str, dict[str, SourceTensor]]:
        """AdamW's moments of every trained parameter: `exp_avg` and `exp_avg_sq`, each by the parameter's name.

        Raises:
            DamagedCheckpointError: As `weights`.
            CheckpointError: As `weights`, or the optimizer is another.
        """
        with _of_deepspeed(self._run):
            for state in self._states:
                _check_adamw(self._run, state)
            found = {}
            for moment in MOMENTS:
                groups = [_moments(state, moment) for state in self._states]
                found[moment] = {tensor.name: tensor for tensor in self._cut(groups)}
            return found

    def optimizer_step(self) -> LazyTensor | float:
        """AdamW's step count, for its bias correction; call after `moments`."""
        inner = _inner_states(self._states[0])
        step: LazyTensor | float = inner[min(inner)]["step"]
        return step

    def _cut(self, groups: Sequence[Sequence[LazyTensor]]) -> Iterator[SourceTensor]:
        """The parameters in flat vectors of all ranks."""
        _find_places(groups)
        if self._stage_3:
            return _cut_parameters(self._run, self._shapes, groups)
        return _cut_groups(self._run, self._shapes, groups, self._states[0].get("param_alignment_paddings"))


@contextlib.contextmanager
def _of_deepspeed(run: RunDirectory) -> Iterator[None]:
    """Files that are whole need not hold what DeepSpeed writes: whatever cannot be looked up in them is damage."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        what = f"its files hold something else than DeepSpeed writes: {type(error).__name__}"
        raise damaged(run.url, what) from error


def _masters(state: Mapping[str, Any]) -> list[LazyTensor]:
    masters: list[LazyTensor] = state[_MASTERS[_MASTERS[True] in state]]
    return masters


def _moments(state: Mapping[str, Any], moment: str) -> list[LazyTensor]:
    inner = _inner_states(state)
    return [inner[group][moment] for group in sorted(inner)]


def _inner_states(state: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    """AdamW's own state: flat vectors by number of their group."""
    inner = state.get("optimizer_state_dict" if _MASTERS[True] in state else "base_optimizer_state")
    found = inner.get("state") if isinstance(inner, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _find_places(by_file: Iterable[Iterable[LazyTensor]]) -> None:
    """Find tensors of many files, which takes a read for most, in many files at once."""

    def find(tensors: Iterable[LazyTensor]) -> None:
        for tensor in tensors:
            tensor.find()

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(find, by_file))


def _read_files(run: RunDirectory, commit: Commit, files: Files) -> tuple[list[Any], list[Any]]:
    """Contents of the files with model states and of those with optimizer states, both by rank."""
    sizes = {file.name: file.bytes for file in commit.files}
    folder = run.path("checkpoints", folder_name(commit.step))

    def check_size(name: str) -> None:
        try:
            found = run.storage.size(run.storage.join(folder, name))
        except FileNotFoundError:
            raise damaged(run.storage.join(folder, name), "it is missing") from None
        if found != sizes[name]:
            raise damaged(run.storage.join(folder, name), f"it has {found} bytes, not {sizes[name]}")

    def read(name: str) -> Any:
        return read_archive(files, run.storage.join(folder, name), sizes[name])

    models, optimizers = (_by_rank(sizes, suffix) for suffix in ("_model_states.pt", "_optim_states.pt"))
    if not models or not optimizers:
        raise CheckpointError("checkpoint", "must hold ZeRO files", folder, "choose another --step")
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(check_size, sizes))
        return list(threads.map(read, models)), list(threads.map(read, optimizers))


def _by_rank(names: Mapping[str, int], suffix: str) -> list[str]:
    found = [name for name in names if name.endswith(suffix)]
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _check_kind(run: RunDirectory, models: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what DeepSpeed can save and nothing here was made for."""
    first = models[0]
    config = first.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    offloads = [zero.get(what) for what in ("offload_optimizer", "offload_param")] if isinstance(zero, Mapping) else []
    kinds = {
        "without offload": any(isinstance(to, Mapping) and to.get("device", "none") != "none" for to in offloads),
        "without tensor parallelism": first.get("mp_world_size", 1) != 1,
        "without mixture of experts": bool(first.get("num_experts")),
    }
    for rule, is_broken in kinds.items():
        if is_broken:
            raise CheckpointError("checkpoint", f"must be {rule}", run.name, "choose another run; no recipe makes such")


def _check_adamw(run: RunDirectory, state: Mapping[str, Any]) -> None:
    inner = _inner_states(state)
    found = sorted({field for group in inner.values() for field in group})
    if len(inner) != len(_masters(state)) or found != [*MOMENTS, "step"]:
        rule = f"must be of AdamW, with a state of {', '.join(MOMENTS)} and step for each vector"
        value = f"{', '.join(found) or 'nothing'} for {len(inner)} of {len(_masters(state))} in {run.name}"
        raise CheckpointError("checkpoint", rule, value, "choose another run; no recipe makes such")


def _check_ranks(run: RunDirectory, states: Sequence[Mapping[str, Any]]) -> None:
    counts = states[0].get("partition_count", len(states))
    ranks = max(counts) if isinstance(counts, list) else counts
    if ranks != len(states):
        rule = f"must hold the optimizer states of all its {ranks} ranks"
        raise CheckpointError("checkpoint", rule, f"{len(states)} of {run.name}", "choose another --step")


def _cut_groups(
    run: RunDirectory,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    groups: Sequence[Sequence[LazyTensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[SourceTensor]:
    """ZeRO 1 and 2. DeepSpeed aligns groups to twice the ranks, and may pad behind each parameter."""
    align = 2 * len(groups)
    for index, group in enumerate(shapes):
        vector, offset = Vector([rank[index] for rank in groups]), 0
        for number, (name, shape) in enumerate(group.items()):
            yield SourceTensor(name, tuple(shape), (vector,), offset, max(1, math.prod(shape)))
            offset += math.prod(shape) + (paddings[index][number] if paddings else 0)
        _check_length(run, math.ceil(offset / align) * align, math.ceil(vector.elements / align) * align)


def _cut_parameters(
    run: RunDirectory, shapes: Sequence[Mapping[str, tuple[int, ...]]], groups: Sequence[Sequence[LazyTensor]]
) -> Iterator[SourceTensor]:
    """ZeRO 3."""
    vectors, offset = tuple(Vector(rank) for rank in groups), 0
    for group in shapes:
        for name, shape in group.items():
            share = math.ceil(math.prod(shape) / len(vectors))
            yield SourceTensor(name, tuple(shape), vectors, offset, max(1, share))
            offset += share
    for vector in vectors:
        _check_length(run, offset, vector.elements)


def _check_length(run: RunDirectory, needed: int, there: int) -> None:
    if needed != there:
        rule = f"must hold as many values as its parameters have ({needed})"
        raise CheckpointError("checkpoint", rule, f"{there} in {run.name}", "choose another --step")


def _fixed(models: Sequence[Mapping[str, Any]], trained: set[str]) -> Iterator[SourceTensor]:
    """Frozen parameters and buffers: in the module's state below ZeRO 3, else frozen parameters lie in ranges."""
    frozen = models[0].get("frozen_param_shapes") or {}
    for name, tensor in models[0]["module"].items():
        if name not in trained and name not in frozen and isinstance(tensor, LazyTensor):
            yield SourceTensor(name, tensor.shape, (Vector([tensor]),), 0, max(1, tensor.elements))
    _find_places([model["frozen_param_fragments"][name] for name in frozen] for model in models)
    for name, shape in frozen.items():
        fragments = tuple(Vector([model["frozen_param_fragments"][name]]) for model in models)
        share = math.ceil(math.prod(shape) / len(fragments))
        yield SourceTensor(name, tuple(shape), fragments, 0, max(1, share))
