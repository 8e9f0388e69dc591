"""Where a run starts from: weights of another training, official or our own, instead of random ones.

`convmae import` turns an official file into a consolidated one; the recipe's `init_from` names that. Its SHA-256
becomes part of the run, so that every attempt before the first checkpoint starts from the same bytes. A run that has a
checkpoint goes on from there.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.errors import WeightsFileError
from jobs.recipe import Recipe
from jobs.run_directory import RunDirectory
from jobs.weights_file import SUFFIX, check_against, check_header, local_copy, model_json, read_weights, sha256_of
from model import ConvMAE, ConvMAEConfig
from model.weights import to_official
from pipeline.scratch import scratch_folder
from pipeline.storage import Storage


@dataclass(frozen=True)
class Imported:
    """A file that runs can start from."""

    url: str
    bytes: int
    sha256: str
    source_sha256: str


def import_weights(storage: Storage, source: str, out: str, config: ConvMAEConfig, *, force: bool = False) -> Imported:
    """Turn an official pretraining checkpoint, or a consolidated file, into a file that a run can start from.

    Args:
        storage: Reaches both.
        source: URL of a `.pth` of the official code, or of a consolidated file.
        out: URL of the file to write; `.safetensors`.
        config: Of the model that shall take the weights.
        force: Replace what is there.

    Raises:
        WeightsFileError: The file cannot be read, or is of another model (names every missing, unexpected and
            misshapen tensor), or the target exists.
    """
    if not out.endswith(SUFFIX):
        raise WeightsFileError("OUT", f"must end in {SUFFIX}", out, f"write it as {out.rstrip('/')}/weights{SUFFIX}")
    storage.check(out.rpartition("/")[0] or ".", write=True)
    if storage.exists(out) and not force:
        raise WeightsFileError("OUT", "must not exist yet", out, "take another place, or replace it with --force")
    with local_copy(storage, source) as path, scratch_folder() as scratch:
        source_sha256 = sha256_of(path)
        if source.endswith(SUFFIX):
            check_header(path, source, config)
            tensors: Mapping[str, Tensor] = read_weights(path, source).tensors
        else:
            tensors = _from_official(_loaded(path, source), config, source)
        target = Path(scratch, "weights")
        metadata = {
            "format": "pt",
            "model": model_json(config),
            "imported_from": source,
            "source_sha256": source_sha256,
        }
        save_file({name: value.float().contiguous() for name, value in tensors.items()}, target, metadata=metadata)
        storage.upload(target, out)
        sha256 = sha256_of(target)
        storage.write(f"{out}.sha256", f"{sha256}  {out.rpartition('/')[2]}\n".encode())
        return Imported(out, target.stat().st_size, sha256, source_sha256)


def pinned(storage: Storage, recipe: Recipe, run: RunDirectory) -> Recipe:
    """The recipe with the SHA-256 of the file that `init_from` names, which is compared with the model.

    A run that exists keeps what it began with; its file may be gone by now.

    Raises:
        WeightsFileError: The file is missing, of another model, or not the one whose `init_sha256` was given.
    """
    if not recipe.init_from:
        return recipe
    if run.exists():
        began = run.read_recipe()
        if began.init_from == recipe.init_from and recipe.init_sha256 in ("", began.init_sha256):
            return recipe.amended({"init_sha256": began.init_sha256})
    with local_copy(storage, recipe.init_from) as path:
        check_header(path, recipe.init_from, recipe.model)
        return recipe.amended({"init_sha256": _checked_sha256(path, recipe)})


def load_initial_weights(storage: Storage, recipe: Recipe) -> dict[str, Tensor]:
    """The state dict that a new run starts from.

    Raises:
        WeightsFileError: The file is not the one that the run was submitted with.
    """
    with local_copy(storage, recipe.init_from) as path:
        _checked_sha256(path, recipe)
        return dict(load_file(path))


def _checked_sha256(path: Path, recipe: Recipe) -> str:
    found = sha256_of(path)
    if recipe.init_sha256 not in ("", found):
        rule = f"must be the file with SHA-256 {recipe.init_sha256[:16]}…, and that there has {found[:16]}…"
        raise WeightsFileError("init_from", rule, recipe.init_from, "bring it back, or start another run")
    return found


def _loaded(path: Path, url: str) -> Mapping[str, Any]:
    remedy = "give the .pth that the official main_pretrain.py or `convmae export --format official` wrote"
    try:
        # The official code keeps its argparse.Namespace beside the weights: a plain record, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsFileError("weights", f"must be a PyTorch file of tensors ({reason})", url, remedy) from None
    state = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsFileError("weights", 'must hold a state dict, or one under "model"', url, remedy)
    return state


def _from_official(state: Mapping[str, Any], config: ConvMAEConfig, url: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        ours = list(ConvMAE(config).state_dict())
    by_official = {next(iter(to_official({name: torch.empty(0)}))): name for name in ours}
    named = {by_official.get(name, name): value for name, value in state.items()}
    check_against(named, config, url)
    return named
