"""Checkpoints of any size, world size and ZeRO stage, without training anything: as ours are, and as DeepSpeed's own.

Of DeepSpeed's files only what readers look at is filled in. That the layout is right is for DeepSpeed's own
`zero_to_fp32` to say, which the tests ask of every such checkpoint.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import CHUNK_BYTES, DEEPSPEED_FORMATS, CheckpointFile, Commit, StateTensor
from jobs.checkpoint.rank_file import DTYPE_NAMES, CopyRoom, RankPart, header_of
from jobs.checkpoint.zero_state import owned_ranges
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory

Tensors = Mapping[str, Tensor]

_PLACES, _TENSORS = TypeAdapter(CheckpointFile), TypeAdapter(tuple[StateTensor, ...])


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


def upload_files(
    run: RunDirectory, step: int, folder: Path, owner: str = "", *, chunk_bytes: int = CHUNK_BYTES
) -> list[CheckpointFile]:
    """Upload every file of `folder` into the checkpoint of `step`, without saying what they hold."""
    return [
        checkpoint.upload(
            run, step, path, CheckpointFile(path.name, 0, 0), content=memoryview(path.read_bytes()), owner=owner,
            chunk_bytes=chunk_bytes,
        )
        for path in sorted(path for path in folder.iterdir() if path.is_file())
    ]  # fmt: skip


def state_parts(material: Material, stage: int, world_size: int) -> list[RankPart]:
    """The part of every rank, as it is saved by a rank that trained `material`."""
    trained = {name: value for group in material.groups for name, value in group.items()}
    everything = {**trained, **material.frozen, **material.buffers}
    tensors = tuple(
        StateTensor(name, tuple(value.shape), DTYPE_NAMES[value.dtype]) for name, value in everything.items()
    )
    numbers = {name: number for number, name in enumerate(everything)}
    model: Any = SimpleNamespace(named_parameters=trained.items)
    groups = [{"params": list(group.values())} for group in material.groups]
    parts = []
    for rank in range(world_size):
        owned = owned_ranges(model, groups, stage=stage, rank=rank, world_size=world_size)
        fixed = {name: range(value.numel()) for name, value in material.buffers.items() if rank == 0}
        for name, value in material.frozen.items():
            share = math.ceil(value.numel() / world_size) if stage == 3 else (value.numel() if rank == 0 else 0)
            begin = min(rank * share, value.numel())
            fixed[name] = range(begin, min(begin + share, value.numel()))
        ranges = [
            tuple((numbers[name], values.start, values.stop) for name, values in kind.items() if values)
            for kind in (owned, fixed)
        ]
        flat = {name: everything[name].reshape(-1)[values.start : values.stop] for name, values in owned.items()}
        kinds = [flat.values(), [value * 0.5 for value in flat.values()], [value.square() for value in flat.values()]]
        kinds.append([everything[name].reshape(-1)[values.start : values.stop] for name, values in fixed.items()])
        header = header_of(tensors, *ranges)
        data = header + b"".join(
            value.contiguous().view(torch.uint8).numpy().tobytes() for kind in kinds for value in kind
        )
        places = CheckpointFile(
            f"rank-{rank:05d}.safetensors", 0, 0, data_offset=len(header), trained=ranges[0], fixed=ranges[1]
        )
        parts.append(RankPart(CopyRoom(Path(), memoryview(data)), places, tensors, 2.0))
    return parts


def commit_state(
    run: RunDirectory, recipe: Recipe, material: Material, *, stage: int, world_size: int, **fields: Any
) -> Commit:
    """Make a committed checkpoint of `material`, whose moments are half its values, and their squares.

    `fields` are those of `commit_parts`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in state_parts(material, stage, world_size):
            save_part(part, Path(folder))
        return commit_parts(run, recipe, Path(folder), stage=stage, world_size=world_size, **fields)


def save_part(part: RankPart, folder: Path) -> None:
    """Write a rank's part into a folder, for `commit_parts`."""
    (folder / part.places.name).write_bytes(part.content)
    fields = {
        "places": asdict(part.places),
        "tensors": [asdict(tensor) for tensor in part.tensors],
        "optimizer_step": part.optimizer_step,
    }
    (folder / f"{part.places.name}.json").write_text(json.dumps(fields))


def commit_parts(
    run: RunDirectory, recipe: Recipe, folder: Path, *, step: int, chunk_bytes: int = CHUNK_BYTES, **fields: Any
) -> Commit:
    """Make a committed checkpoint of what `save_part` wrote into a folder; `fields` are those of `commit_files`."""
    files: list[CheckpointFile] = []
    said: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        said = json.loads(path.with_name(f"{path.name}.json").read_text())
        places, content = _PLACES.validate_python(said["places"]), memoryview(path.read_bytes())
        files.append(checkpoint.upload(run, step, path, places, content=content, chunk_bytes=chunk_bytes))
    tensors = _TENSORS.validate_python(said["tensors"])
    return commit_files(run, recipe, files, step=step, tensors=tensors, optimizer_step=said["optimizer_step"], **fields)


def commit_zero_files(
    run: RunDirectory, recipe: Recipe, folder: Path, *, step: int, chunk_bytes: int = CHUNK_BYTES, **fields: Any
) -> Commit:
    """Make a committed checkpoint, of the newest format that had them, of DeepSpeed's files in `folder`.

    `fields` are those of `commit_files`.
    """
    files = upload_files(run, step, folder, chunk_bytes=chunk_bytes)
    return commit_files(run, recipe, files, step=step, format_version=max(DEEPSPEED_FORMATS), **fields)


def commit_files(
    run: RunDirectory,
    recipe: Recipe,
    files: Sequence[CheckpointFile],
    *,
    step: int,
    stage: int,
    world_size: int,
    milestone: bool = False,
    **fields: Any,
) -> Commit:
    """Make a committed checkpoint of a run of files that are there, one of each rank."""
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
        files=tuple(files),
        **fields,
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
