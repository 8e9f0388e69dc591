"""The whole state in DeepSpeed's ZeRO files as named tensors, read by `torch.load` without the readers of `jobs`.

Another way to the same values, so that tests do not compare the code with itself.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class WholeState:
    """The state of a run, independent of how many ranks held it."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """`master`, `exp_avg`, `exp_avg_sq`: each parameter's name to its fp32 tensor, in its own shape."""
    fixed: Mapping[str, Tensor]
    """Frozen parameters and buffers by name."""
    optimizer_step: float

    def weights(self) -> dict[str, Tensor]:
        return {**self.fixed, **self.tensors[MASTER]}


def whole_state(folder: Path) -> WholeState:
    """Read the files of DeepSpeed's that zero_worker saved into `folder`, of any world size and stage."""
    folder = folder / "deepspeed"
    model_states = [_load(path) for path in _by_rank(folder, "*_model_states.pt")]
    optimizer_states = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    stage = int(optimizer_states[0]["zero_stage"])
    shapes = model_states[0]["param_shapes"]
    flats = _flat_vectors(optimizer_states, stage)
    merge = _merge_whole if stage == 3 else _merge_groups
    inner = _inner_optimizer(optimizer_states[0], stage)
    return WholeState(
        tensors={kind: dict(merge(shapes, by_rank)) for kind, by_rank in flats.items()},
        fixed=_fixed_tensors(model_states),
        optimizer_step=float(inner[0]["step"]),
    )


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    paths = list(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(folder / pattern)
    return sorted(paths, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _load(path: Path) -> dict[str, Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unpickling imports DeepSpeed, which looks for one
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return state


def _inner_optimizer(optimizer_state: Mapping[str, Any], stage: int) -> dict[int, dict[str, Any]]:
    """AdamW's own state: flat vectors by number."""
    inner = optimizer_state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    states: dict[int, dict[str, Any]] = inner["state"]
    return states


def _flat_vectors(optimizer_states: list[dict[str, Any]], stage: int) -> dict[str, list[list[Tensor]]]:
    """`kind` to the flat vectors of each rank, in the order of its groups."""
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
