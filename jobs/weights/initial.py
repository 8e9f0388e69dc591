"""Initial weights of a run: those of another training, official or our own, instead of random ones.

`convmae import` converts a foreign file into consolidated weights, which the recipe's `init_from` names. Their SHA-256
becomes part of the run, so that every attempt before the first checkpoint starts from the same bytes. A run that has a
checkpoint resumes from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from jobs.checkpoint.rank_group import RankGroup, Room
from jobs.errors import WeightsFileError
from jobs.recipe.image_statistics import statistics_metadata
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.weights.deepspeed_folder import weights_in_folder
from jobs.weights.file_statistics import IMAGENET, image_bits, metadata_in, statistics_for, statistics_in
from jobs.weights.names import WeightNames, described, fresh_tensors, weight_names
from jobs.weights.torch_file import is_safetensors, torch_tensors
from jobs.weights.weight_checks import check_dtypes, check_finite, check_header, check_heads, check_values
from jobs.weights.weight_files import (
    SUFFIX,
    local_copy,
    model_config,
    model_json,
    opened_file,
    shapes_of,
    tensors_in,
    write_tensors,
)
from model import ConvMAEConfig
from model.config import ENCODER_FIELDS, PATCH_PIXELS
from model.weights import to_bands
from pipeline.host.local_files import sha256_of
from pipeline.host.scratch import scratch_folder
from pipeline.image.channels import RGB_CHANNELS
from pipeline.store.storage import Storage

KINDS = ("file", "deepspeed")
"""What weights are imported from: one file, or a folder with DeepSpeed's own files of all ranks."""


@dataclass(frozen=True)
class Imported:
    """A file that runs can start from."""

    url: str
    bytes: int
    sha256: str
    source_sha256: str
    notes: tuple[str, ...]
    """How the file was read, if its tensors are not simply those of the model; one line each."""


def import_weights(
    storage: Storage,
    source: str,
    out: str,
    config: ConvMAEConfig,
    *,
    kind: str = "file",
    fresh_decoder_seed: int | None = None,
    force: bool = False,
) -> Imported:
    """Convert weights of the official code, published or your own, into a file that a run can start from.

    Args:
        storage: Reaches both.
        source: URL of a PyTorch or safetensors file, also one of ours; or of a folder with DeepSpeed's own files.
        out: URL of the file to write; `.safetensors`.
        config: Of the model that is to load the weights.
        kind: What `source` is, of KINDS.
        fresh_decoder_seed: Import the encoder alone, with the initial decoder of a run of this seed.
        force: Replace what is there.

    Raises:
        WeightsFileError: The file cannot be read, is of another model (names the missing, unexpected and misshapen
            tensors) or holds values that are not weights, or the target exists.
        CheckpointError: DeepSpeed's files are damaged, or of a kind that is not handled.
    """
    if kind not in KINDS:
        raise WeightsFileError("--format", f"must be {' or '.join(KINDS)}", kind, "correct it")
    if not out.endswith(SUFFIX):
        raise WeightsFileError("OUT", f"must end in {SUFFIX}", out, f"write it as {out.rstrip('/')}/weights{SUFFIX}")
    storage.check(out.rpartition("/")[0] or ".", write=True)
    if storage.exists(out) and not force:
        raise WeightsFileError("OUT", "must not exist yet", out, "choose another place, or replace it with --force")
    metadata = {"format": "pt", "model": model_json(config), "imported_from": source}
    fresh_decoder = fresh_decoder_seed is not None
    if kind == "deepspeed":
        state, metadata["source_sha256"] = weights_in_folder(storage, source)
        metadata |= statistics_metadata(*statistics_for(config, IMAGENET))
        tensors, names = _chosen(state, source, config, fresh_decoder=fresh_decoder)
    else:
        with local_copy(storage, source) as path:
            metadata["source_sha256"] = sha256_of(path)
            bits = image_bits(metadata_in(path, source))
            metadata |= statistics_metadata(*statistics_in(path, source, config), bits)
            tensors, names = _taken(path, source, config, fresh_decoder=fresh_decoder)
    check_finite(tensors.items(), source)
    notes = names.notes
    if fresh_decoder_seed is not None:
        tensors |= fresh_tensors(names.fresh, config, fresh_decoder_seed)
        metadata["fresh_decoder_seed"] = str(fresh_decoder_seed)
        notes += (f"fresh from seed {fresh_decoder_seed}: {described(names.fresh)}",)
    return _written(storage, out, tensors, metadata, notes)


def foreign_weights(path: Path, url: str, config: ConvMAEConfig, *, encoder_alone: bool = False) -> dict[str, Tensor]:
    """Weights of the official code, published or your own, by our names.

    Args:
        path: A local PyTorch or safetensors file.
        url: Where it comes from.
        config: Of the model that the weights are of.
        encoder_alone: Leave out the decoder, which the file then need not have, nor what only pretraining has.

    Raises:
        WeightsFileError: As `import_weights`.
    """
    tensors, _ = _taken(path, url, config, fresh_decoder=encoder_alone, encoder_alone=encoder_alone)
    check_finite(tensors.items(), url)
    return tensors


def _written(
    storage: Storage, out: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], notes: tuple[str, ...]
) -> Imported:
    with scratch_folder() as scratch:
        path = Path(scratch, "weights")
        write_tensors({name: value.float() for name, value in tensors.items()}, path, metadata)
        storage.upload(path, out)
        sha256 = sha256_of(path)
        storage.write(f"{out}.sha256", f"{sha256}  {out.rpartition('/')[2]}\n".encode())
        return Imported(out, path.stat().st_size, sha256, metadata["source_sha256"], notes)


def _taken(
    path: Path, url: str, config: ConvMAEConfig, *, fresh_decoder: bool, encoder_alone: bool = False
) -> tuple[dict[str, Tensor], WeightNames]:
    """The tensors of a local file by our names, each of a type that weights may have."""
    if not is_safetensors(path, url):
        state = torch_tensors(path, url)
        return _chosen(state, url, config, fresh_decoder=fresh_decoder, encoder_alone=encoder_alone)
    with opened_file(path, url) as file:
        if "model" in (metadata := dict(file.metadata() or {})):
            check_heads(model_config(metadata, url), config, url)
        if config.in_channels != RGB_CHANNELS:
            state = dict(tensors_in(file, url))
            return _chosen(state, url, config, fresh_decoder=fresh_decoder, encoder_alone=encoder_alone)
        names = weight_names(shapes_of(file), config, url, fresh_decoder=fresh_decoder, encoder_alone=encoder_alone)
        check_dtypes({name: file.get_slice(theirs).get_dtype() for name, theirs in names.places.items()}, url)
        return {name: file.get_tensor(theirs) for name, theirs in names.places.items()}, names


def _chosen(
    state: Mapping[str, Tensor], url: str, config: ConvMAEConfig, *, fresh_decoder: bool, encoder_alone: bool = False
) -> tuple[dict[str, Tensor], WeightNames]:
    """The tensors of a state dict by our names, each of a type that weights may have; RGB ones for other bands."""
    if config.in_channels != RGB_CHANNELS:
        state = to_bands(state, config.in_channels)
    names = weight_names(state, config, url, fresh_decoder=fresh_decoder, encoder_alone=encoder_alone)
    tensors = {name: state[theirs] for name, theirs in names.places.items()}
    check_dtypes({name: tensor.dtype for name, tensor in tensors.items()}, url)
    return tensors, names


def pinned(storage: Storage, recipe: Recipe, run: RunDirectory) -> Recipe:
    """The recipe with the SHA-256 of the file that `init_from` names, which is compared with the model.

    Images are normalised as they were for these weights, unless the recipe says otherwise.

    An existing run keeps what it began with, whose file may be gone by now.

    Raises:
        WeightsFileError: The file is missing, of another model, not finite, or not the one whose `init_sha256` was
            given.
    """
    if not recipe.init_from:
        return recipe
    if run.exists():
        began = run.read_recipe()
        if began.init_from == recipe.init_from and recipe.init_sha256 in ("", began.init_sha256):
            return recipe.amended({"init_sha256": began.init_sha256}).with_statistics(*began.statistics)
    with local_copy(storage, recipe.init_from) as path:
        if recipe.finetune:
            _encoder_in(path, recipe.init_from, recipe.model)
        else:
            check_header(path, recipe.init_from, recipe.model)
            check_values(path, recipe.init_from)
        begun = recipe.amended({"init_sha256": _checked_sha256(path, recipe)})
        return begun.with_statistics(*statistics_in(path, recipe.init_from, recipe.model))


def load_initial_weights(storage: Storage, recipe: Recipe, group: RankGroup) -> dict[str, Tensor]:
    """The state dict that a new run starts from. Collective: rank 0 reads the file and sends it to the others.

    Raises:
        WeightsFileError: The file is not the one that the run was submitted with; the same on all ranks.
    """

    def read() -> dict[str, Tensor]:
        with local_copy(storage, recipe.init_from) as path:
            _checked_sha256(path, recipe)
            return dict(load_file(path))

    return _shared(group, group.together(lambda: read() if group.rank == 0 else {}))


def load_pretrained_encoder(
    storage: Storage, recipe: Recipe, group: RankGroup
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The encoder that a new fine-tuning starts from, and its grid of patches. Collective, as `load_initial_weights`.

    Raises:
        WeightsFileError: The file is not the one that the run was submitted with; the same on all ranks.
    """

    def read() -> tuple[dict[str, Tensor], tuple[int, int]]:
        if group.rank:
            return {}, (0, 0)
        with local_copy(storage, recipe.init_from) as path:
            _checked_sha256(path, recipe)
            return _encoder_in(path, recipe.init_from, recipe.model)

    state, grid = group.together(read)
    return _shared(group, state), group.broadcast(grid)


def _encoder_in(path: Path, url: str, config: ConvMAEConfig) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The encoder in a local file, of our code or of the official one, and its grid of patches.

    Raises:
        WeightsFileError: It is of another architecture, damaged, or not finite.
    """
    source = config
    if is_safetensors(path, url):
        with opened_file(path, url) as file:
            metadata = dict(file.metadata() or {})
        if "model" in metadata:
            source = replace(model_config(metadata, url), in_channels=config.in_channels)
            _check_encoder(source, config, url)
    elif (position := torch_tensors(path, url).get("pos_embed")) is not None and position.ndim == 3:
        side = math.isqrt(position.shape[1])  # the official code knows squares alone
        if (side, side) != config.grid and side**2 + config.class_tokens == position.shape[1]:
            source = replace(config, image_size=side * PATCH_PIXELS, views=1)  # an encoder has none
    tensors, _ = _taken(path, url, source, fresh_decoder=True, encoder_alone=True)
    check_finite(tensors.items(), url)
    return {name: value.float() for name, value in tensors.items()}, source.grid


def _check_encoder(theirs: ConvMAEConfig, config: ConvMAEConfig, url: str) -> None:
    """Compare what makes up an encoder, but for the image size.

    Raises:
        WeightsFileError: A field differs; the remedy has all that do.
    """
    fields = [name for name in ENCODER_FIELDS if getattr(theirs, name) != getattr(config, name)]
    if fields:
        rule = f"must be of the recipe's architecture ({fields[0]} is {getattr(theirs, fields[0])} there"
        rule += f", and {getattr(config, fields[0])} in the recipe)"
        changes = " ".join(f"model.{name}={_written_field(getattr(theirs, name))}" for name in fields)
        raise WeightsFileError("init_from", rule, url, f"give other weights, or set {changes}")


def _written_field(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _shared(group: RankGroup, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of rank 0, on all ranks."""
    kinds = group.broadcast({name: (value.shape, value.dtype) for name, value in state.items()})
    shared = Room(kinds)
    for name, value in state.items():
        shared.tensors[name].copy_(value)
    group.add_up(shared.bytes)
    return dict(shared.tensors)


def _checked_sha256(path: Path, recipe: Recipe) -> str:
    found = sha256_of(path)
    if recipe.init_sha256 not in ("", found):
        rule = f"must be the file with SHA-256 {recipe.init_sha256[:16]}…, but the file there has {found[:16]}…"
        raise WeightsFileError("init_from", rule, recipe.init_from, "restore it, or start another run")
    return found
