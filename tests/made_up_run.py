"""A run with one made-up checkpoint, to consolidate, damage and inspect."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from zero_material import Material, commit_state, commit_zero_files, random_material, write_zero_files

from jobs.checkpoint import checkpoint
from jobs.consolidation.consolidate import consolidate
from jobs.consolidation.target import ONE_FILE, ConsolidatedWeights, Target
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

STEP = 7
PART_BYTES = 4096
"""So small that every tensor lies in several parts, and every part in several tensors or ranks."""
CHUNK_BYTES = 1000
"""So small that moments, which are not read, have chunks of their own; not a multiple of any type's size."""
MATERIAL = random_material(9000, tensor_elements=2500)

Damage = Callable[[Path], None]


def make_run(folder: Path, stage: int, world_size: int, material: Material = MATERIAL) -> RunDirectory:
    """A run with one made-up checkpoint."""
    run = RunDirectory.of(Storage(retry_seconds=2), str(folder / "runs"), f"zero{stage}-of-{world_size}")
    recipe = named_recipe("tiny")
    commit_state(run, recipe, material, step=STEP, stage=stage, world_size=world_size, chunk_bytes=CHUNK_BYTES)
    return run


def make_older_run(
    folder: Path, stage: int, world_size: int, material: Material = MATERIAL, *, bf16: bool = False
) -> RunDirectory:
    """The same in DeepSpeed's own files, as format 3 had them."""
    files = folder / f"zero{stage}-of-{world_size}"
    write_zero_files(files, material, stage, world_size, bf16=bf16)
    run = RunDirectory.of(Storage(retry_seconds=2), str(folder / "older"), files.name)
    recipe = named_recipe("tiny")
    commit_zero_files(run, recipe, files, step=STEP, stage=stage, world_size=world_size, chunk_bytes=CHUNK_BYTES)
    return run


def made(run: RunDirectory, target: Target = ONE_FILE, **options: Any) -> ConsolidatedWeights:
    """Consolidate it in small parts."""
    return consolidate(run, target=target, **{"part_bytes": PART_BYTES, **options})


def tensors_of(result: ConsolidatedWeights) -> dict[str, Tensor]:
    """All tensors of a result."""
    return {name: tensor for file in result.files for name, tensor in load_file(file.url).items()}


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def files_of(run: RunDirectory, suffix: str = "") -> list[Path]:
    """Files of its checkpoint."""
    return sorted(Path(run.path("checkpoints", checkpoint.folder_name(STEP))).glob(f"*{suffix}"))


def left_behind(run: RunDirectory) -> list[str]:
    """Everything in the folder of results, including hidden files."""
    folder = Path(run.path("consolidated"))
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def flip(place: Callable[[Path], int]) -> Damage:
    """Change one bit."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place(path)] ^= 1
        path.write_bytes(data)

    return damage


def within(key: str, offset: int) -> Callable[[Path], int]:
    """A place among the values under a key of a safetensors file."""

    def place(path: Path) -> int:
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        first, end = json.loads(data[8:begin])[key]["data_offsets"]
        return begin + first + offset % (end - first)

    return place


def within_record(record: str, offset: int) -> Callable[[Path], int]:
    """A place in a record of an archive of torch.save's."""

    def place(path: Path) -> int:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            info = next(info for info in archive.infolist() if info.filename.endswith(record))
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            return info.header_offset + 30 + name + extra + offset % info.file_size

    return place
