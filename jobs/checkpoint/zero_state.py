"""A run's state as one rank needs it, and putting it into the engine that resumes.

What a rank owns follows from parameter groups, stage, rank and world size alone, so that it is known before an engine
is built; the engine must then agree. It depends on what DeepSpeed does not document, by deepspeed_internals.
Knows no store: jobs.checkpoint.state_reading fills it from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.checkpoint.deepspeed_internals import MOMENTS, PINNED, adam_slots, owned_slices
from jobs.errors import CheckpointError

if TYPE_CHECKING:
    import deepspeed

_ALIGNED = 2
"""In ZeRO 1 and 2 each rank's range of a group is a multiple of this many values."""


TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their names in safetensors."""


@dataclass(frozen=True)
class ZeroState:
    """What one rank needs to resume. Holds the model's weights once, and this rank's share of the moments."""

    weights: Mapping[str, Tensor]
    """The model's whole state dict: fp32 masters, frozen parameters, buffers."""
    owned: Mapping[str, range]
    """The values of each trained parameter, flattened, whose moments are here."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """`exp_avg` and `exp_avg_sq`: the owned values of each parameter."""
    optimizer_step: float
    """AdamW's step count, for its bias correction."""


def owned_ranges(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], *, stage: int, rank: int, world_size: int
) -> dict[str, range]:
    """The values of each trained parameter, flattened, that this rank will update.

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


def restore_optimizer(engine: deepspeed.DeepSpeedEngine, state: ZeroState) -> None:
    """Put masters, moments and step into a fresh engine, whose module already holds the weights of `state`.

    Every rank copies the ranges that it owns, and nothing is communicated.

    Raises:
        CheckpointError: The engine owns other ranges than were read: this is not the pinned version of DeepSpeed.
    """
    slices = owned_slices(engine)
    found = {piece.name: range(piece.start, piece.start + piece.length) for _, pieces in slices for piece in pieces}
    if found != {name: values for name, values in state.owned.items() if values}:
        rule, remedy = f"must partition the optimizer's state as {PINNED} does", "install the pinned version"
        raise CheckpointError("deepspeed", rule, version("deepspeed"), remedy)
    for flat, pieces in slices:
        slots = adam_slots(engine, flat)
        slots["step"] = torch.tensor(state.optimizer_step, dtype=torch.float32, device=flat.device)
        for moment in MOMENTS:
            slots[moment] = torch.zeros_like(flat)
        for piece in pieces:
            place = slice(piece.offset, piece.offset + piece.length)
            values = state.owned[piece.name]
            flat.data[place].copy_(state.weights[piece.name].reshape(-1)[values.start : values.stop])
            for moment in MOMENTS:
                slots[moment][place].copy_(state.moments[moment][piece.name])
