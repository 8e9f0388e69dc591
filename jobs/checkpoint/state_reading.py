"""Resharding: a run's state from a checkpoint of any world size and ZeRO stage, as one rank of another group needs it.

Files are read by ranges, by the layout of the ranks that wrote them. Each rank's module needs the weights whole: each
rank reads a part, and the ranks add the parts up. Of AdamW's moments each rank reads what it will own. So a checkpoint
is read and verified before an engine is built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from jobs.checkpoint.checked_files import CheckedFiles, Copy
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.rank_group import BUCKET_BYTES, RankGroup, Room
from jobs.checkpoint.state_layout import Layout
from jobs.checkpoint.tensor_ranges import ITEM_BYTES, SourceTensor
from jobs.checkpoint.zero_state import TORCH_DTYPES, ZeroState
from jobs.errors import CheckpointError

READ_AGAIN, REQUESTS = 4, 16
"""Moments are read by their owners if all owners together read at most this many times what there is, in at most this
many requests per rank in addition to those that would read each byte once."""


def read_zero_state(files: CheckedFiles, layout: Layout, owned: Mapping[str, range], group: RankGroup) -> ZeroState:
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
        self._among = among or sources
        self._room = Room({source.name: (source.shape, TORCH_DTYPES[source.dtype]) for source in sources})

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name, as they are stored."""
        return self._room.tensors

    def mine(self) -> list[Copy]:
        """The copies that this rank reads."""
        there = self._files.holding(place for source in self._among for place in source.byte_ranges(0, source.elements))
        chunks = np.array_split(there, self._group.world_size)[self._group.rank]
        if not len(chunks):
            return []
        urls = self._files.urls(chunks)
        copies = (copy for source in self._sources for copy in _copies(source, self._bytes(source), urls=urls))
        return list(self._files.clipped(copies, int(chunks[0]), int(chunks[-1])))

    def _bytes(self, source: SourceTensor) -> Tensor:
        return self.tensors[source.name].reshape(-1).view(torch.uint8)

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
            tensor = torch.empty(len(wanted), device="cpu", dtype=TORCH_DTYPES[tensors[name].dtype])
            moments[moment][name] = tensor
            copies += _copies(tensors[name], tensor.view(torch.uint8), wanted)
    return moments, copies


def _is_read_by_owners(
    sources: Mapping[str, Mapping[str, SourceTensor]], copies: Sequence[Copy], files: CheckedFiles, group: RankGroup
) -> bool:
    """Whether each rank reads the moments that it owns, in whole chunks of which others own parts. The same on all.

    Ranks would read too much, in too many requests, where ZeRO 3 deals each parameter of a few large files to many of
    them.
    """
    tensors = [tensor for moment in sources.values() for tensor in moment.values()]
    there = files.holding(place for tensor in tensors for place in tensor.byte_ranges(0, tensor.elements))
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


def _copies(
    source: SourceTensor, room: Tensor, wanted: range | None = None, *, urls: Set[str] | None = None
) -> Iterator[Copy]:
    """The copies that fill `room`, of bytes, with some elements of a tensor: of all files, or of those in `urls`."""
    target, position = room.numpy().data, 0
    chosen = range(source.elements) if wanted is None else wanted
    for place in source.byte_ranges(chosen.start, chosen.stop):
        if urls is None or place.url in urls:
            yield Copy(place.url, place.offset, target[position : position + place.length])
        position += place.length
