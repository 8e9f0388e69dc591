"""A run's state out of a checkpoint of any world size and ZeRO stage, and into the engine that goes on.

DeepSpeed 0.19.8 loads a checkpoint only at the world size that wrote it. Here its files are read by ranges, through the
layout of whoever wrote them (jobs.zero_layout): the weights whole, since each rank's module needs them, and of AdamW's
moments what this rank will own. What a rank owns follows from parameter groups, stage, rank and world size alone, so
that a checkpoint is read and found whole before an engine is built; the engine must then agree. This leans on private
fields of DeepSpeed: its version is pinned, and the exactness test must stay green.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.checked_files import CheckedFiles, Copy
from jobs.errors import CheckpointError
from jobs.torch_archive import LazyTensor
from jobs.zero_layout import MOMENTS, SourceTensor, Vector, ZeroFiles

if TYPE_CHECKING:
    import deepspeed

_ALIGNED = 2
"""ZeRO 1 and 2 make each rank's range of a group a multiple of so many values."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class ZeroState:
    """What one rank needs to go on. Holds the model's weights once, and this rank's share of the moments."""

    weights: Mapping[str, Tensor]
    """The model's whole state dict: fp32 masters, frozen parameters, buffers."""
    owned: Mapping[str, range]
    """Of each trained parameter, flattened: the values whose moments are here."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """`exp_avg` and `exp_avg_sq`: the owned values of each parameter."""
    optimizer_step: float
    """AdamW's step count, for its bias correction."""


def owned_ranges(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], *, stage: int, rank: int, world_size: int
) -> dict[str, range]:
    """Which values of each trained parameter, flattened, this rank will update.

    Args:
        model: Has the parameters' names.
        groups: The optimizer's parameter groups, before DeepSpeed changes them.
        stage: ZeRO 1, 2 or 3.
        rank: Of this process.
        world_size: Number of processes that train together.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = {}
    for group in groups:
        sizes = {names[id(parameter)]: parameter.numel() for parameter in group["params"]}
        share = math.ceil(sum(sizes.values()) / (world_size * _ALIGNED)) * _ALIGNED
        begin = -rank * share  # of the parameter, counted from that of this rank's range of the group
        for name, size in sizes.items():
            if stage == 3:
                share = math.ceil(size / world_size)
                begin = -rank * share
            owned[name] = range(min(max(0, -begin), size), min(max(0, share - begin), size))
            begin += size
    return owned


def read_zero_state(files: CheckedFiles, owned: Mapping[str, range]) -> ZeroState:
    """Read weights, and the moments that this rank owns.

    Args:
        files: Of the checkpoint.
        owned: From `owned_ranges`; empty where weights are all that is wanted.

    Raises:
        DamagedCheckpointError: A file is missing, truncated or, where it was read, altered.
        CheckpointError: The files are of a kind that is not handled, or of another model.
    """
    layout = ZeroFiles.read(files.run, files.commit, files)
    copies: list[Copy] = []
    weights = {
        source.name: _room(source, range(source.elements), copies).view(source.shape) for source in layout.weights()
    }
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for moment, sources in (layout.moments() if owned else {}).items():
        for name, wanted in owned.items():
            if name not in sources or wanted.stop > sources[name].elements:
                rule, remedy = f"must hold {moment} of {name}", "resume with the model that the run began with"
                raise CheckpointError("checkpoint", rule, files.run.name, remedy)
            moments[moment][name] = _room(sources[name], wanted, copies)
    told = layout.optimizer_step() if owned else 0.0
    step: Tensor | float = _room(_scalar(told), range(1), copies) if isinstance(told, LazyTensor) else told
    files.read_into(copies)
    return ZeroState(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()},
        owned,
        moments,
        float(step),
    )


def restore_optimizer(engine: deepspeed.DeepSpeedEngine, state: ZeroState) -> None:
    """Put masters, moments and step into a fresh engine, whose module already holds the weights of `state`.

    Every rank copies the ranges that it owns, and nothing is communicated.

    Raises:
        CheckpointError: The engine owns other ranges than were read: DeepSpeed is not the version that is pinned.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    cut = _whole_slices(optimizer, names) if stage == 3 else _group_slices(optimizer, names)
    slices = list(cut)
    found = {piece.name: range(piece.start, piece.start + piece.length) for _, pieces in slices for piece in pieces}
    if found != {name: values for name, values in state.owned.items() if values}:
        rule, remedy = "must share out the optimizer's state as 0.19.8 does", "install the version that is pinned"
        raise CheckpointError("deepspeed", rule, _version(), remedy)
    for flat, pieces in slices:
        slots = optimizer.optimizer.state[flat]
        slots["step"] = torch.tensor(state.optimizer_step, dtype=torch.float32)
        for moment in MOMENTS:
            slots[moment] = torch.zeros_like(flat)
        for piece in pieces:
            place = slice(piece.offset, piece.offset + piece.length)
            values = state.owned[piece.name]
            flat.data[place].copy_(state.weights[piece.name].reshape(-1)[values.start : values.stop])
            for moment in MOMENTS:
                slots[moment][place].copy_(state.moments[moment][piece.name])


def _scalar(tensor: LazyTensor) -> SourceTensor:
    return SourceTensor("step", (1,), (Vector([tensor]),), 0, 1)


def _room(source: SourceTensor, wanted: range, copies: list[Copy]) -> Tensor:
    """Room for values of a tensor, flattened; adds what is to be copied there."""
    tensor = torch.empty(len(wanted), dtype=_DTYPES[source.dtype])
    room, position = tensor.view(torch.uint8).numpy().data, 0
    for extent in source.extents(wanted.start, wanted.stop):
        target = room[position : position + extent.bytes]
        copies.append(Copy(extent.record.url, extent.record.offset + extent.start, target))
        position += extent.bytes
    return tensor


def _version() -> str:
    import deepspeed

    version: str = deepspeed.__version__
    return version


@dataclass(frozen=True)
class _Piece:
    """`length` values of parameter `name` from `start` on, which lie at `offset` of a rank's flat vector."""

    name: str
    start: int
    length: int
    offset: int


def _group_slices(optimizer: Any, names: Mapping[int, str]) -> Iterator[tuple[Tensor, list[_Piece]]]:
    """ZeRO 1 and 2: this rank's range of each group, as pieces of parameters."""
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[index])
        begin, pieces, position = rank * flat.numel(), [], 0
        for parameter in optimizer.round_robin_bit16_groups[index]:
            low, high = max(begin, position), min(begin + flat.numel(), position + parameter.numel())
            if low < high:
                pieces.append(_Piece(names[id(parameter)], low - position, high - low, low - begin))
            position += parameter.numel()
        yield flat, pieces


def _whole_slices(optimizer: Any, names: Mapping[int, str]) -> Iterator[tuple[Tensor, list[_Piece]]]:
    """ZeRO 3: this rank's range of each parameter."""
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces, offset = [], 0
        for parameter in parameters:
            share = parameter.ds_tensor.ds_numel
            length = max(0, min(share, parameter.ds_numel - rank * share))
            if length:
                pieces.append(_Piece(names[id(parameter)], rank * share, length, offset))
            offset += share
        yield flat, pieces
