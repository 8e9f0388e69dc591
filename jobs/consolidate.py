"""From a checkpoint's ZeRO files to one safetensors file that `ConvMAE.load_state_dict` takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

from jobs import checkpoint
from jobs.checkpoint import Commit, scratch_folder
from jobs.errors import CheckpointError
from jobs.run_directory import RunDirectory
from jobs.zero_state import read_zero_state


@dataclass(frozen=True)
class Consolidated:
    """One consolidated file."""

    url: str
    step: int
    bytes: int
    sha256: str


def consolidated_url(run: RunDirectory, step: int) -> str:
    """Where the consolidated weights of `step` are."""
    return run.path("consolidated", f"{checkpoint.folder_name(step)}.safetensors")


def consolidate(run: RunDirectory, step: int | None = None) -> Consolidated:
    """Write the fp32 weights of a checkpoint, frozen parameters and buffers included, as one safetensors file.

    Args:
        run: The run; it may be training.
        step: A committed step; None for the newest.

    Raises:
        CheckpointError: If there is no such checkpoint, or a file of it is missing or altered.
    """
    commit = checkpoint.latest_commit(run) if step is None else checkpoint.read_commit(run, step)
    if commit is None:
        remedy = "wait for the first one, or lower checkpoint_every_steps"
        raise CheckpointError("run", "must have a committed checkpoint", run.name, remedy)
    with scratch_folder() as scratch:
        folder = Path(scratch)
        checkpoint.download_files(run, commit, folder)
        tensors = {name: tensor.contiguous() for name, tensor in read_zero_state(folder).weights().items()}
        target = folder / "model.safetensors"
        save_file(tensors, target, metadata=_metadata(run, commit))
        url = consolidated_url(run, commit.step)
        run.storage.upload(target, url)
        with target.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        run.storage.write(f"{url}.sha256", f"{sha256}  {url.rpartition('/')[2]}\n".encode())
        return Consolidated(url, commit.step, target.stat().st_size, sha256)


def load_consolidated(run: RunDirectory, step: int) -> dict[str, Tensor]:
    """The tensors of a consolidated file by name."""
    return dict(load(run.storage.read(consolidated_url(run, step))))


def _metadata(run: RunDirectory, commit: Commit) -> dict[str, str]:
    recipe = run.read_recipe()
    return {
        "format": "pt",
        "run": run.name,
        "step": str(commit.step),
        "epoch": str(commit.epoch),
        "recipe_digest": commit.recipe_digest,
        "dataset_digest": commit.dataset_digest,
        "model": json.dumps(recipe.to_json()["model"], sort_keys=True),
        "versions": json.dumps(dict(commit.versions), sort_keys=True),
    }
