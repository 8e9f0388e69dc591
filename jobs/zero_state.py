"""DeepSpeed's native ZeRO files, read as whole named tensors and laid out again for any world size.

DeepSpeed 0.19.8 loads a checkpoint only at the world size that wrote it. Its files hold flat vectors:

- ZeRO 1 and 2: one vector a parameter group, parameters one after the other, cut into world_size equal ranges;
- ZeRO 3: each parameter cut into world_size equal ranges (the last padded), a rank's ranges one after the other.

Both are undone here into {name: tensor} for the fp32 master and the two AdamW moments, and done again with the layout
of the engine that resumes. This leans on private fields of DeepSpeed: its version is pinned, and the exactness test
must stay green.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.errors import CheckpointError

if TYPE_CHECKING:
    import deepspeed

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ZeroState:
    """The state of a run, independent of how many ranks held it."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """`master`, `exp_avg`, `exp_avg_sq`: each parameter's name to its fp32 tensor, in its own shape."""
    fixed: Mapping[str, Tensor]
    """Frozen parameters and buffers by name."""
    optimizer_step: float
    """AdamW's step count, for its bias correction."""

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state dict in fp32."""
        return {**self.fixed, **self.tensors[MASTER]}


def read_zero_state(folder: Path) -> ZeroState:
    """Read the files that `engine.save_checkpoint` wrote into `folder`, of any world size and stage.

    Tensors are memory-mapped; a parameter that lay in one piece is a view of its file.

    Raises:
        CheckpointError: If `folder` holds no such files, or files of another kind of optimizer.
    """
    model_states = [_load(path) for path in _by_rank(folder, "*_model_states.pt")]
    optimizer_states = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    stage = int(optimizer_states[0]["zero_stage"])
    shapes = model_states[0]["param_shapes"]
    flats = _flat_vectors(optimizer_states, stage)
    merge = _merge_whole if stage == 3 else _merge_groups
    inner = _inner_optimizer(optimizer_states[0], stage)
    return ZeroState(
        tensors={kind: dict(merge(shapes, by_rank)) for kind, by_rank in flats.items()},
        fixed=_fixed_tensors(model_states),
        optimizer_step=float(inner[0]["step"]),
    )


def restore_optimizer(engine: deepspeed.DeepSpeedEngine, state: ZeroState) -> None:
    """Put masters, moments and step into a fresh engine, whose module already holds `state.weights()`.

    Every rank copies the ranges that it owns, and nothing is communicated.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    owned = _whole_slices(optimizer, names) if stage == 3 else _group_slices(optimizer, names)
    for flat, pieces in owned:
        slots = optimizer.optimizer.state[flat]
        slots["step"] = torch.tensor(state.optimizer_step, dtype=torch.float32)
        for moment in MOMENTS:
            slots[moment] = torch.zeros_like(flat)
        for kind, target in [(MASTER, flat.data), *((moment, slots[moment]) for moment in MOMENTS)]:
            for piece in pieces:
                source = state.tensors[kind][piece.name].reshape(-1)[piece.start : piece.start + piece.length]
                target[piece.offset : piece.offset + piece.length].copy_(source)


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
            pieces.append(_Piece(names[id(parameter)], rank * share, length, offset))
            offset += share
        yield flat, pieces


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    paths = list(folder.glob(pattern))
    if not paths:
        raise CheckpointError("checkpoint", f"must hold {pattern}", folder.name, "choose another step")
    return sorted(paths, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _load(path: Path) -> dict[str, Any]:
    # DeepSpeed pickles its loss scaler and configuration beside the tensors, so weights_only cannot read these files.
    # They are this run's own, and their CRC was checked against the commit. Unpickling imports DeepSpeed, which looks
    # for an accelerator and warns where there is none; outside of training the CPU is all that is needed.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return state


def _inner_optimizer(optimizer_state: Mapping[str, Any], stage: int) -> dict[int, dict[str, Any]]:
    """AdamW's own state: flat vectors by number."""
    inner = optimizer_state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    states: dict[int, dict[str, Any]] = inner["state"]
    return states


def _flat_vectors(optimizer_states: list[dict[str, Any]], stage: int) -> dict[str, list[list[Tensor]]]:
    """`kind` to the flat vectors of each rank, in the order of its groups."""
    for paddings in optimizer_states[0].get("param_alignment_paddings") or []:
        if any(paddings):
            raise CheckpointError("checkpoint", "must have no parameter alignment", paddings, "save without it")
    masters = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flats = {MASTER: [[flat.detach() for flat in rank[masters]] for rank in optimizer_states]}
    for moment in MOMENTS:
        inner = [_inner_optimizer(rank, stage) for rank in optimizer_states]
        flats[moment] = [[rank[index][moment] for index in sorted(rank)] for rank in inner]
    return flats


def _merge_groups(shapes: list[Mapping[str, torch.Size]], by_rank: list[list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for group, group_shapes in enumerate(shapes):
        ranges = [rank[group] for rank in by_rank]
        vector, offset = torch.cat(ranges) if len(ranges) > 1 else ranges[0], 0
        for name, shape in group_shapes.items():
            yield name, vector[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()


def _merge_whole(shapes: list[Mapping[str, torch.Size]], by_rank: list[list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    vectors, offset = [torch.cat(groups) if len(groups) > 1 else groups[0] for groups in by_rank], 0
    for group_shapes in shapes:
        for name, shape in group_shapes.items():
            share = math.ceil(shape.numel() / len(vectors))
            whole = torch.cat([vector[offset : offset + share] for vector in vectors])
            yield name, whole[: shape.numel()].view(shape)
            offset += share


def _fixed_tensors(model_states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Frozen parameters and buffers: in the module's state below ZeRO 3, else frozen parameters lie in ranges."""
    first = model_states[0]
    trained = {name for group in first["param_shapes"] for name in group}
    frozen = first.get("frozen_param_shapes") or {}
    fixed = {name: value for name, value in first["module"].items() if name not in trained and name not in frozen}
    for name, shape in frozen.items():
        fragments = [state["frozen_param_fragments"][name].reshape(-1) for state in model_states]
        whole = torch.cat(fragments) if len(fragments) > 1 else fragments[0]
        fixed[name] = whole[: shape.numel()].view(shape)
    return {name: value.float() if value.is_floating_point() else value for name, value in fixed.items()}
