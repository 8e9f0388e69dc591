"""Consolidated weights, in one safetensors file or several: configuration, tensors, and whether they are as written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checked_files import CheckedFiles, with_chunks
from jobs.checkpoint.checkpoint import Commit
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.zero_layout import ZeroFiles
from jobs.checkpoint.zero_state import read_zero_state
from jobs.errors import CheckpointError, WeightsFileError
from jobs.run.directory import RunDirectory
from jobs.weights.file_layout import FILE_NAME, INDEX_NAME
from jobs.weights.results import SEVERAL_FILES, recorded_sha256
from model import ConvMAE, ConvMAEConfig
from model.errors import ModelConfigError, listed
from model.weights import check_names
from pipeline.errors import clipped
from pipeline.host.scratch import scratch_folder
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_SHARD_NAME = re.compile(r"[^/\\]+\.safetensors")
_RESULT = re.compile(r"step-(\d+)(\.safetensors)?")
_NOT_IN_SHAPES = ("num_heads", "decoder_num_heads")
"""Fields of a model that its tensors do not tell."""
_LENGTH_BYTES = 8
"""Of a safetensors header's length, which stands before it."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be of, by safetensors' names; what training computes with can be made of them."""


@dataclass(frozen=True)
class Weights:
    """A whole pretraining model: `ConvMAE(config).load_state_dict(tensors)` takes it."""

    config: ConvMAEConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    """Run, step, epoch, digests and versions, as far as they are known."""

    def check(self, value: str) -> None:
        """Compare the tensors with the configuration.

        Raises:
            WeightsFileError: As `check_against` and `check_dtypes`.
        """
        check_against(self.tensors, self.config, value)
        check_dtypes({name: tensor.dtype for name, tensor in self.tensors.items()}, value)


def check_against(
    tensors: Mapping[str, Any], config: ConvMAEConfig, value: str, *, absent: Collection[str] = ()
) -> None:
    """Compare names and shapes with those of a model, without making it.

    Args:
        tensors: Anything with a shape, by name.
        config: Of the model.
        value: What the tensors come from, for the message.
        absent: Names of the model that need not be there.

    Raises:
        WeightsFileError: A name is missing or unexpected, or a shape is another; names them.
    """
    with torch.device("meta"):
        expected = ConvMAE(config).state_dict()
    try:
        check_names(tensors, {name: value for name, value in expected.items() if name not in absent})
    except ModelConfigError as error:
        assert isinstance(error.value, list)
        rule = f"must be those of the model ({listed(error.value)})"
        raise WeightsFileError("weights", rule, value, error.remedy) from None


def check_dtypes(dtypes: Mapping[str, object], value: str) -> None:
    """Compare types, by name, torch's or as safetensors calls them, with those that weights may be of.

    Raises:
        WeightsFileError: One is no floating-point type of 16 bits or more, so that its values are no weights.
    """
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS and dtype not in _FLOATS.values():
            rule = f"must be of float16, bfloat16, float32 or float64 ({clipped(name)} is of {dtype})"
            remedy = "give weights as they were trained, neither quantized nor converted"
            raise WeightsFileError("weights", rule, value, remedy)


def check_finite(tensors: Iterable[tuple[str, Tensor]], value: str) -> None:
    """Look for values with which no training can begin.

    Raises:
        WeightsFileError: One is infinite or not a number, perhaps only in fp32; names the first tensor.
    """
    for name, tensor in tensors:
        if not tensor.float().isfinite().all():
            rule = f"must be finite in fp32 ({clipped(name)} is not)"
            raise WeightsFileError("weights", rule, value, "take an earlier checkpoint, from before the loss diverged")


def of_file(storage: Storage, url: str) -> Weights:
    """Read consolidated weights: one file, or several by their index or their folder.

    Each file is compared with the SHA-256 beside it where there is one.

    Raises:
        WeightsFileError: A file is missing, altered, no safetensors file, not of one of our models, or not one of those
            that the index was written for.
    """
    if url.endswith(SUFFIX):
        with _checked_copy(storage, url) as path:
            return read_weights(path, url)
    if url.endswith(INDEX_SUFFIX):
        return _of_shards(storage, url)
    for name, read in ((INDEX_NAME, _of_shards), (FILE_NAME, of_file)):
        if storage.exists(place := Storage.join(url, name)):
            return read(storage, place)
    rule = f"must end in {SUFFIX}, or be a folder with {INDEX_NAME}"
    raise WeightsFileError("weights", rule, url, "give what `convmae consolidate` wrote")


def is_weights(storage: Storage, url: str) -> bool:
    """Whether `of_file` is meant by a place: a file, an index, or a folder that holds one of them."""
    if url.endswith((SUFFIX, INDEX_SUFFIX)):
        return True
    return "/" in url and any(storage.exists(Storage.join(url, name)) for name in (INDEX_NAME, FILE_NAME))


def folder_beside(url: str) -> str:
    """Where what is made of weights goes: the folder of a file; for several, the one in which theirs lies."""
    place = url.removesuffix(f"/{INDEX_NAME}").rstrip("/")
    return place.rpartition("/")[0]


def _of_shards(storage: Storage, index_url: str) -> Weights:
    folder, places = index_url.rpartition("/")[0], _weight_map(storage, index_url)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(places.values())):
        url = Storage.join(folder, name)
        with _checked_copy(storage, url) as path, opened_file(path, url) as file:
            theirs = dict(file.metadata() or {})
            _check_shard(url, index_url, {key for key, place in places.items() if place == name}, set(file.keys()))
            _check_same(url, metadata or theirs, theirs)
            tensors.update(_tensors(file, url))
        metadata = theirs
    return _weights(tensors, metadata, index_url)


def _weight_map(storage: Storage, index_url: str) -> dict[str, str]:
    """The file of each tensor."""
    remedy = "consolidate the checkpoint again, or get the folder again"
    try:
        data = storage.read(index_url)
    except FileNotFoundError:
        raise WeightsFileError("weights", "must exist", index_url, remedy) from None
    try:
        places = parsed_object(data)["weight_map"]
    except (ValueError, LookupError) as error:
        rule = f"must be the index of several files ({type(error).__name__}: {clipped(str(error))})"
        raise WeightsFileError("weights", rule, index_url, remedy) from None
    is_map = isinstance(places, dict) and bool(places)
    if not is_map or not all(isinstance(name, str) and _SHARD_NAME.fullmatch(name) for name in places.values()):
        rule = f"must name {SUFFIX} files of its own folder for all tensors"
        raise WeightsFileError("weights", rule, index_url, remedy)
    return dict(places)


def _check_shard(url: str, index_url: str, expected: set[str], found: set[str]) -> None:
    faults = [f"missing {name}" for name in sorted(expected - found)]
    faults += [f"unexpected {name}" for name in sorted(found - expected)]
    if faults:
        rule = f"must hold the tensors that {index_url.rpartition('/')[2]} says ({listed(faults)})"
        raise WeightsFileError("weights", rule, url, "consolidate the checkpoint again with --force")


def _check_same(url: str, before: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    for key in sorted({*before, *theirs}):
        if before.get(key) != theirs.get(key):
            was, found = (clipped(repr(metadata.get(key))) for metadata in (before, theirs))
            rule = f"must be of the same consolidation as the files before it ({clipped(key)} was {was})"
            raise WeightsFileError("weights", rule, f"{url}, {clipped(key)} {found}", "get the folder again")


def of_run(run: RunDirectory, step: int | None = None) -> Weights:
    """The weights of a run: what was consolidated, or else what its checkpoint holds.

    Args:
        run: It may be training.
        step: A consolidated or committed step; None for the newest.

    Raises:
        CheckpointError: There is no such step, or a file of it is missing or altered.
    """
    written = consolidated(run)
    if step is None:
        step = max([*written, *checkpoint.committed_steps(run)], default=None)
    if step is None:
        remedy = "wait for the first one, or save more often (checkpoint_interval)"
        raise CheckpointError("run", "must have a committed checkpoint", run.name, remedy)
    if step in written:
        return of_file(run.storage, written[step])
    return _of_checkpoint(run, checkpoint.read_commit(run, step))


def _of_checkpoint(run: RunDirectory, commit: Commit) -> Weights:
    config = run.read_recipe().model
    commit = replace(commit, files=tuple(with_chunks(run, commit.step, commit.files)))
    files = CheckedFiles(run, commit)
    tensors = read_zero_state(files, ZeroFiles.read(run, commit, files), {}, RankGroup()).weights
    metadata = {
        "run": run.name,
        "step": str(commit.step),
        "epoch": str(commit.epoch),
        "recipe_digest": commit.recipe_digest,
        "dataset_digest": commit.dataset_digest,
        "versions": json.dumps(dict(commit.versions), sort_keys=True),
    }
    weights = Weights(config, tensors, metadata)
    weights.check(f"step {commit.step} of {run.name}")
    return weights


def consolidated(run: RunDirectory) -> dict[int, str]:
    """Where each step's fp32 weights are: the file, or else the folder of several that are finished."""
    found: dict[int, str] = {}
    for name in sorted(run.storage.list_names(run.path("consolidated"))):  # a folder comes before its file
        match = _RESULT.fullmatch(name)
        url = run.path("consolidated", name)
        if match and (match[2] or SEVERAL_FILES.is_finished(run.storage, url)):
            found[int(match[1])] = url
    return found


def read_weights(path: Path, url: str) -> Weights:
    """Read a local file whole.

    Raises:
        WeightsFileError: As `of_file`.
    """
    with opened_file(path, url) as file:
        return _weights(_tensors(file, url), dict(file.metadata() or {}), url)


def _weights(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], url: str) -> Weights:
    told = {name: value for name, value in metadata.items() if name not in ("model", "format")}
    weights = Weights(model_config(metadata, url), tensors, told)
    weights.check(url)
    return weights


def check_header(path: Path, url: str, config: ConvMAEConfig) -> None:
    """Compare names, shapes, types and numbers of heads in a local file with a model; reads no tensor.

    Raises:
        WeightsFileError: They are those of another model; names them.
    """
    with opened_file(path, url) as file:
        theirs = model_config(dict(file.metadata() or {}), url)
        check_against(shapes_of(file), config, url)
        check_dtypes({name: file.get_slice(name).get_dtype() for name in file.keys()}, url)  # noqa: SIM118
    check_heads(theirs, config, url)


def check_heads(theirs: ConvMAEConfig, config: ConvMAEConfig, url: str) -> None:
    """Compare what shapes do not tell of two models.

    Raises:
        WeightsFileError: A number of heads is another; names it.
    """
    for name in _NOT_IN_SHAPES:
        if getattr(theirs, name) != getattr(config, name):
            rule = f"must be of a model with {name} = {getattr(config, name)}, not {getattr(theirs, name)}"
            raise WeightsFileError("weights", rule, url, f"set model.{name}={getattr(theirs, name)}")


def check_values(path: Path, url: str) -> None:
    """Read a local file, one tensor at a time, for values with which no training can begin; call after `check_header`.

    Raises:
        WeightsFileError: As `check_finite`.
    """
    with opened_file(path, url) as file:
        check_finite(((name, file.get_tensor(name)) for name in file.keys()), url)  # noqa: SIM118


def _tensors(file: Any, url: str) -> dict[str, Tensor]:
    try:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (TypeError, RuntimeError):  # a hostile header names shapes that torch cannot make
        rule, remedy = "must hold tensors that can be made", "get the file again from where it was written"
        raise WeightsFileError("weights", rule, url, remedy) from None


def shapes_of(file: Any) -> dict[str, SimpleNamespace]:
    """Shapes by name, without tensors, which torch cannot make of all."""
    return {name: SimpleNamespace(shape=tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118


@contextmanager
def opened_file(path: Path, url: str) -> Iterator[Any]:
    """A safetensors file, open for reading.

    Raises:
        WeightsFileError: It is none, or not whole; also what reading from it raises.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        remedy = "give a file that `convmae consolidate` or `convmae import` wrote"
        raise WeightsFileError("weights", f"must be a whole safetensors file ({error})", url, remedy) from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a local file; the same tensors and metadata give the same bytes."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=dict(metadata))
    with path.open("r+b") as file:  # safetensors writes metadata in an order that changes from one call to the next
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(_LENGTH_BYTES)
        file.write(text)


def model_config(metadata: Mapping[str, str], url: str) -> ConvMAEConfig:
    """The configuration that a file was made with.

    Raises:
        WeightsFileError: It has none, or one that is not of a known model.
    """
    remedy = "give a file that `convmae consolidate` or `convmae import` wrote"
    if "model" not in metadata:
        raise WeightsFileError("weights", "must say in its metadata of which model it is", url, remedy)
    try:
        return ConvMAEConfig(**parsed_object(metadata["model"]))
    except (ValueError, TypeError) as error:
        rule = f"must be of a model that is known ({clipped(str(error))})"
        raise WeightsFileError("weights", rule, url, remedy) from None


def model_json(config: ConvMAEConfig) -> str:
    """What a file's metadata says of its model."""
    return json.dumps(asdict(config), sort_keys=True)


@contextmanager
def local_copy(storage: Storage, url: str) -> Iterator[Path]:
    """The file on local disk while the context is open.

    Raises:
        WeightsFileError: It is missing.
    """
    with scratch_folder() as scratch:
        path = Path(scratch, "weights")
        try:
            storage.download(url, path)
        except FileNotFoundError:
            remedy = "`convmae checkpoints RUN` shows which steps a run has; `convmae consolidate` writes the file"
            raise WeightsFileError("weights", "must exist", url, remedy) from None
        yield path


@contextmanager
def _checked_copy(storage: Storage, url: str) -> Iterator[Path]:
    with local_copy(storage, url) as path:
        if (expected := recorded_sha256(storage, url)) and sha256_of(path) != expected:
            rule = f"must have the SHA-256 in {url.rpartition('/')[2]}.sha256 beside it"
            raise WeightsFileError("weights", rule, url, "consolidate the checkpoint again, or get the file again")
        yield path


def sha256_of(path: Path) -> str:
    """Of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
