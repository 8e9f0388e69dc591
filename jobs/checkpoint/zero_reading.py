"""Resharding: a run's state from a checkpoint of any world size and ZeRO stage, as one rank of another group needs it.

It is hand-written since DeepSpeed 0.19.8 loads a checkpoint only at the world size that wrote it, and no other library
reads its files (zero_layout). They are read by ranges, by the layout of the ranks that wrote them. Each rank's module
needs the weights whole: each rank reads a part, and the ranks add the parts up. Of AdamW's moments each rank reads what
it will own. So a checkpoint is read and verified before an engine is built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.checkpoint.checked_files import CheckedFiles, Copy
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.rank_group import BUCKET_BYTES, RankGroup, Room
from jobs.checkpoint.torch_archive import ITEM_BYTES
from jobs.checkpoint.zero_layout import Held, SourceTensor, ZeroFiles
from jobs.checkpoint.zero_state import ZeroState
from jobs.errors import CheckpointError

READ_AGAIN, REQUESTS = 4, 16
"""Moments are read by their owners if all owners together read at most this many times what there is, in at most this
many requests per rank in addition to those that would read each byte once."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_zero_state(files: CheckedFiles, layout: ZeroFiles, owned: Mapping[str, range], group: RankGroup) -> ZeroState:
    """Read weights, and the moments that this rank owns. Collective.

    Args:
        files: Of the checkpoint.
        layout: Of the same files.
        owned: From `owned_ranges`; empty to read weights alone.
        group: The ranks that read together.

    Raises:
        DamagedCheckpointError: A file is missing, truncated or, where it was read, altered. The same on all ranks.
        CheckpointError: The files are of another model. The same on all ranks.
    """
    weights = WholeTensors(layout.weights(), files, group)
    sources = layout.moments() if owned else {}
    moments, copies = group.together(lambda: rooms_of_moments(sources, owned, files.run.name))
    by_own_reads = _is_read_by_owners(sources, copies, files, group)
    group.together(lambda: files.read_into([*weights.mine(), *(copies if by_own_reads else [])]))
    weights.add_up()
    if not by_own_reads:
        for moment, tensors in sources.items():
            _fill_together(moments[moment], owned, list(tensors.values()), files, group)
    whole = {name: value.float() if value.is_floating_point() else value for name, value in weights.tensors.items()}
    return ZeroState(whole, owned, moments, layout.optimizer_step)


class WholeTensors:
    """Tensors that every rank gets whole, and of which each rank reads a part.

    The chunks that hold them are dealt out, neighbours to one rank, so all ranks together read each byte once.

    Owns: one room for all, with zeros where nothing was read.
    """

    def __init__(
        self, sources: Sequence[SourceTensor], files: CheckedFiles, group: RankGroup, among: Sequence[SourceTensor] = ()
    ) -> None:
        """Allocate the room; does no I/O.

        Args:
            sources: The tensors.
            files: The files that hold them.
            group: The ranks that get them.
            among: Deal the chunks as if these were read; `sources` if empty.
        """
        self._sources, self._files, self._group = sources, files, group
        self._vectors = {id(source.vectors): source.vectors for source in among or sources}
        self._room = Room({source.name: (source.shape, _DTYPES[source.dtype]) for source in sources})

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name, as they are stored."""
        return self._room.tensors

    def mine(self) -> list[Copy]:
        """The copies that this rank reads."""
        places = (place for vectors in self._vectors.values() for vector in vectors for place in vector.places)
        held_chunks = self._files.holding(place.byte_range for place in places)
        chunks = np.array_split(held_chunks, self._group.world_size)[self._group.rank]
        if not len(chunks):
            return []
        urls = self._files.urls(chunks)
        held = {
            key: [Held(index, *found) for index, vector in enumerate(vectors) for found in vector.held(urls)]
            for key, vectors in self._vectors.items()
        }
        copies: list[Copy] = []
        for source in self._sources:
            room, item = self.tensors[source.name].reshape(-1).view(torch.uint8), ITEM_BYTES[source.dtype]
            for part in source.ranges(held[id(source.vectors)]):
                copies += _copies(source, part, room[part.start * item : part.stop * item])
        return list(self._files.clipped(copies, int(chunks[0]), int(chunks[-1])))

    def add_up(self) -> None:
        """Put the ranks' parts together. Collective."""
        self._group.add_up(self._room.bytes)


def rooms_of_moments(
    sources: Mapping[str, Mapping[str, SourceTensor]], owned: Mapping[str, range], run_name: str
) -> tuple[dict[str, dict[str, Tensor]], list[Copy]]:
    """Room for the moments that a rank owns, and the copies that fill it."""
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    copies: list[Copy] = []
    for moment, tensors in sources.items():
        for name, wanted in owned.items():
            if name not in tensors or wanted.stop > tensors[name].elements:
                rule, remedy = f"must hold {moment} of {name}", "resume with the model that the run began with"
                raise CheckpointError("checkpoint", rule, run_name, remedy)
            tensor = torch.empty(len(wanted), device="cpu", dtype=_DTYPES[tensors[name].dtype])
            moments[moment][name] = tensor
            copies += _copies(tensors[name], wanted, tensor.view(torch.uint8))
    return moments, copies


def _is_read_by_owners(
    sources: Mapping[str, Mapping[str, SourceTensor]], copies: Sequence[Copy], files: CheckedFiles, group: RankGroup
) -> bool:
    """Whether each rank reads the moments that it owns, in whole chunks of which others own parts. The same on all.

    Ranks would read too much, in too many requests, where ZeRO 3 deals each parameter of a few large files to many of
    them.
    """
    by_vectors = {id(source.vectors): source.vectors for moment in sources.values() for source in moment.values()}
    places = (place for vectors in by_vectors.values() for vector in vectors for place in vector.places)
    there = files.holding(place.byte_range for place in places)
    mine = files.holding(copy.source for copy in copies)
    allowed = REQUESTS * group.world_size + sum(1 for _ in files.requests(there))
    return (
        group.total(len(mine)) <= READ_AGAIN * len(there)
        and group.total(sum(1 for _ in files.requests(mine))) <= allowed
    )  # fmt: skip


def _fill_together(
    targets: Mapping[str, Tensor],
    owned: Mapping[str, range],
    sources: Sequence[SourceTensor],
    files: CheckedFiles,
    group: RankGroup,
) -> None:
    """Send a whole moment past every rank, a bounded part at a time; each takes what it owns. Collective."""
    for some in _buckets(sources):
        whole = WholeTensors(some, files, group, among=sources)
        copies = whole.mine()
        group.together(functools.partial(files.read_into, copies))
        whole.add_up()
        for name, tensor in whole.tensors.items():
            if name in owned:
                targets[name].copy_(tensor.reshape(-1)[owned[name].start : owned[name].stop])


def _buckets(sources: Iterable[SourceTensor]) -> Iterator[list[SourceTensor]]:
    bucket: list[SourceTensor] = []
    for source in sources:
        bucket.append(source)
        if sum(each.elements * ITEM_BYTES[each.dtype] for each in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _copies(source: SourceTensor, wanted: range, room: Tensor) -> Iterator[Copy]:
    """The copies that fill `room`, of bytes, with some elements of a tensor."""
    target, position = room.numpy().data, 0
    for url, offset, length in source.byte_ranges(wanted.start, wanted.stop):
        yield Copy(url, offset, target[position : position + length])
        position += length
