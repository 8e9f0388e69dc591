"""Checkpoints as DeepSpeed's ZeRO 1, 2 and 3 write them, of any size and world size, without training anything.

Only what readers look at is filled in. That the layout is right is for DeepSpeed's own `zero_to_fp32` to say, which the
tests ask of every such checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checkpoint import Commit
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Material:
    """A model's state, before it is cut up."""

    groups: Sequence[Tensors]
    """fp32 masters of each parameter group."""
    frozen: Tensors
    buffers: Tensors


def model_material(model: torch.nn.Module) -> Material:
    """A model's parameters and buffers, with weights and the rest in groups of their own, as the engine has them."""
    from jobs.step.engine import parameter_groups

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {names[id(parameter)]: parameter.detach() for parameter in group["params"]}
        for group in parameter_groups(model, weight_decay=0.05)
    ]
    frozen = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    return Material(groups, frozen, dict(model.named_buffers()))


def random_material(elements: int, seed: int = 0, tensor_elements: int = 1 << 24) -> Material:
    """About `elements` values in tensors of two groups, frozen ones and buffers among them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(prefix: str, count: int, largest: int) -> dict[str, Tensor]:
        sizes = [largest] * (count // largest) + [count % largest]
        return {f"{prefix}.{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes) if size}

    large, small = drawn("weight", elements, tensor_elements), drawn("bias", max(7, elements // 1000), 997)
    buffers = {"steps": torch.tensor(12345), "mean": torch.randn(3, generator=generator, dtype=torch.float64)}
    return Material([large, small], drawn("frozen", 1001, 1001), buffers)


def write_zero_files(folder: Path, material: Material, stage: int, world_size: int, *, bf16: bool = False) -> None:
    """Write the files of all ranks into a new folder."""
    folder.mkdir(parents=True)
    module_dtype = torch.bfloat16 if bf16 else torch.float32
    shapes = [{name: value.shape for name, value in group.items()} for group in material.groups]
    flats = [_cut(list(group.values()), stage, world_size) for group in material.groups]
    for rank in range(world_size):
        mine = [group[rank].clone() for group in flats]
        torch.save(
            {"optimizer_state_dict": _optimizer_state(mine, shapes, stage, world_size), "ds_version": "0.19.8"},
            folder / f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            state = _model_state(material, shapes, stage=stage, world_size=world_size, rank=rank, dtype=module_dtype)
            torch.save(state, folder / f"{name}_model_states.pt")


def commit_zero_files(
    run: RunDirectory,
    recipe: Recipe,
    folder: Path,
    *,
    step: int,
    stage: int,
    world_size: int,
    chunk_bytes: int = checkpoint.CHUNK_BYTES,
    milestone: bool = False,
) -> Commit:
    """Make a committed checkpoint of a run of the files in `folder`."""
    run.claim(recipe)
    commit = Commit(
        step=step,
        epoch=step // 10,
        world_size=world_size,
        zero_stage=stage,
        precision=recipe.precision,
        recipe_digest=recipe.digest(),
        dataset_digest="d" * 64,
        order_version=1,
        seed=0,
        attempt=1,
        created_at_seconds=time.time(),
        milestone=milestone,
        counters={},
        versions={"torch": torch.__version__, "git": "c0ffee"},
        files=tuple(checkpoint.upload_files(run, step, folder, chunk_bytes=chunk_bytes)),
    )
    checkpoint.write_commit(run, commit)
    return commit


def _cut(tensors: Sequence[Tensor], stage: int, world_size: int) -> list[Tensor]:
    """A group's flat vector, as each rank holds its part of it."""
    if stage == 3:
        shares = [_shares(tensor, world_size) for tensor in tensors]
        return [torch.cat([share[rank] for share in shares]) for rank in range(world_size)]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    align = 2 * world_size  # as DeepSpeed does, for NCCL
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % align))
    return list(padded.chunk(world_size))


def _shares(tensor: Tensor, world_size: int) -> list[Tensor]:
    share = math.ceil(tensor.numel() / world_size)
    padded = torch.nn.functional.pad(tensor.reshape(-1), (0, share * world_size - tensor.numel()))
    return list(padded.split(share))


def _optimizer_state(mine: list[Tensor], shapes: Sequence[Any], stage: int, world_size: int) -> dict[str, Any]:
    moments = {
        i: {"step": torch.tensor(2.0), "exp_avg": flat * 0.5, "exp_avg_sq": flat.square()}
        for i, flat in enumerate(mine)
    }
    inner = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [i]} for i in range(len(mine))]}
    if stage == 3:
        return {"zero_stage": 3, "partition_count": world_size, "optimizer_state_dict": inner, "fp32_flat_groups": mine}
    return {
        "zero_stage": stage,
        "partition_count": [world_size] * len(mine),
        "base_optimizer_state": inner,
        "single_partition_of_fp32_groups": mine,
        "param_alignment_paddings": [[0] * len(group) for group in shapes],
    }


def _model_state(
    material: Material, shapes: Sequence[Any], *, stage: int, world_size: int, rank: int, dtype: torch.dtype
) -> dict[str, Any]:
    trained = {name: value for group in material.groups for name, value in group.items()}
    frozen = {name: value.to(dtype) for name, value in material.frozen.items()}
    buffers = {n: b.to(dtype) if b.dtype == torch.float32 else b for n, b in material.buffers.items()}
    module: dict[str, Tensor] = {name: value.to(dtype) for name, value in {**trained, **frozen}.items()}
    fragments = None
    if stage == 3:
        module = dict.fromkeys(module, torch.empty(0))
        fragments = {name: _shares(value, world_size)[rank].clone() for name, value in frozen.items()}
    elif stage == 2:
        fragments = frozen
    return {
        "module": {**module, **buffers},
        "buffer_names": list(buffers),
        "param_shapes": shapes,
        "frozen_param_shapes": None if stage == 1 else {name: value.shape for name, value in frozen.items()},
        "frozen_param_fragments": fragments,
        "shared_params": {},
        "ds_version": "0.19.8",
    }
