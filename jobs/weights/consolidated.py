"""Reading of consolidated weights, in one safetensors file or several, verified against their checksums and model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.opened import opened
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.state_reading import read_zero_state
from jobs.consolidation.file_layout import FILE_NAME, INDEX_NAME
from jobs.consolidation.target import SEVERAL_FILES, recorded_sha256
from jobs.errors import CheckpointError, WeightsFileError
from jobs.recipe.image_statistics import statistics_metadata
from jobs.run.directory import RunDirectory
from jobs.weights.file_statistics import image_bits, image_statistics
from jobs.weights.weight_checks import check_against, check_dtypes
from jobs.weights.weight_files import SUFFIX, local_copy, model_config, opened_file, tensors_in
from model import ChannelStatistics, Classifier, ConvMAEConfig
from model.classifier import KINDS
from model.errors import WeightsError, listed
from model.weights import check_names
from pipeline.errors import clipped
from pipeline.host.local_files import sha256_of
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD_NAME = re.compile(r"[^/\\]+\.safetensors")
_RESULT = re.compile(r"step-(\d+)(\.safetensors)?")


@dataclass(frozen=True)
class ClassifierHead:
    """What a file says of a classifier beside its model."""

    kind: str
    """`full` or `linear`."""
    classes: tuple[str, ...]
    """Names, in the order of the outputs."""

    @classmethod
    def of(cls, metadata: Mapping[str, str], url: str) -> ClassifierHead | None:
        """From the metadata of a file; None where it is of a pretraining.

        Raises:
            WeightsFileError: It is damaged.
        """
        if "classifier" not in metadata:
            return None
        try:
            fields = parsed_object(metadata["classifier"])
            kind, classes = fields["kind"], fields["classes"]
            if kind not in KINDS or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise ValueError("no kind and classes")
        except (ValueError, LookupError) as error:
            remedy = "get the file again from where it was written"
            raise WeightsFileError("weights", f"must name its classes ({clipped(str(error))})", url, remedy) from None
        return cls(kind, tuple(classes))


@dataclass(frozen=True)
class Weights:
    """A whole model: of a pretraining, for `ConvMAE(config).load_state_dict(tensors)`, or a classifier."""

    config: ConvMAEConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    """Run, step, epoch, digests and versions, as far as they are known."""
    head: ClassifierHead | None = None
    """Of a fine-tuning; None: it is a pretraining's model."""

    @property
    def statistics(self) -> ChannelStatistics:
        """What its images were normalised by.

        Raises:
            WeightsFileError: The metadata are damaged.
        """
        return image_statistics(self.metadata, self.metadata.get("run", "weights"))

    @property
    def image_bits(self) -> int:
        """Of a value of the images with which they were trained."""
        return image_bits(self.metadata)

    def classifier(self) -> Classifier:
        """The model of a fine-tuning, with these weights, in evaluation mode."""
        assert self.head
        model = Classifier(self.config, len(self.head.classes), kind=self.head.kind)
        model.load_state_dict(dict(self.tensors), strict=True)
        return model.eval().requires_grad_(False)

    def check(self, value: str) -> None:
        """Compare the tensors with the configuration.

        Raises:
            WeightsFileError: As `check_against` and `check_dtypes`.
        """
        if self.head:
            with torch.device("meta"):
                expected = Classifier(self.config, len(self.head.classes), kind=self.head.kind).state_dict()
            try:
                check_names(self.tensors, expected)
            except WeightsError as error:
                assert isinstance(error.value, list)
                raise WeightsFileError("weights", error.rule, value, listed(error.value)) from None
            return
        check_against(self.tensors, self.config, value)
        check_dtypes({name: tensor.dtype for name, tensor in self.tensors.items()}, value)


def of_file(storage: Storage, url: str) -> Weights:
    """Read consolidated weights: one file, or several by their index or their folder.

    Each file is compared with the SHA-256 beside it where there is one.

    Raises:
        WeightsFileError: A file is missing, altered, not a safetensors file, not of one of our models, or not one that
            the index names.
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
    """Whether `of_file` can read a place: a file, an index, or a folder that holds one of them."""
    if url.endswith((SUFFIX, INDEX_SUFFIX)):
        return True
    return "/" in url and any(storage.exists(Storage.join(url, name)) for name in (INDEX_NAME, FILE_NAME))


def folder_beside(url: str) -> str:
    """The default place for exports of weights: the folder of a single file, or the parent of the folder of several."""
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
            tensors.update(tensors_in(file, url))
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
        rule = f"must hold the tensors that {index_url.rpartition('/')[2]} lists ({listed(faults)})"
        raise WeightsFileError("weights", rule, url, "consolidate the checkpoint again with --force")


def _check_same(url: str, before: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    for key in sorted({*before, *theirs}):
        if before.get(key) != theirs.get(key):
            was, found = (clipped(repr(metadata.get(key))) for metadata in (before, theirs))
            rule = f"must be of the same consolidation as the files before it ({clipped(key)} was {was})"
            raise WeightsFileError("weights", rule, f"{url}, {clipped(key)} {found}", "get the folder again")


def of_run(run: RunDirectory, step: int | None = None) -> Weights:
    """The weights of a run: consolidated ones, or else those of its checkpoint.

    Args:
        run: It may be training.
        step: A consolidated or committed step; None for the newest.

    Raises:
        CheckpointError: There is no such step, or a file of it is missing or altered.
    """
    written = urls_by_step(run)
    if step is None:
        step = max([*written, *checkpoint.committed_steps(run)], default=None)
    if step is None:
        remedy = "wait for the first one, or save more often (checkpoint_interval)"
        raise CheckpointError("run", "must have a committed checkpoint", run.name, remedy)
    if step in written:
        return of_file(run.storage, written[step])
    return _of_checkpoint(run, checkpoint.read_commit(run, step))


def _of_checkpoint(run: RunDirectory, commit: Commit) -> Weights:
    recipe = run.read_recipe()
    config, part = recipe.model, recipe.finetune
    files, layout = opened(run, commit)
    tensors = read_zero_state(files, layout, {}, RankGroup()).weights
    metadata = {
        "run": run.name,
        "step": str(commit.step),
        "epoch": str(commit.epoch),
        "recipe_digest": commit.recipe_digest,
        "dataset_digest": commit.dataset_digest,
        "versions": json.dumps(dict(commit.versions), sort_keys=True),
        **statistics_metadata(*recipe.statistics, recipe.image_bits),
    }
    head = ClassifierHead(part.kind, part.classes) if part else None
    weights = Weights(config, tensors, metadata, head)
    weights.check(f"step {commit.step} of {run.name}")
    return weights


def urls_by_step(run: RunDirectory) -> dict[int, str]:
    """URL of each step's consolidated fp32 weights: the file, or else the folder of several, if finished."""
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
        return _weights(tensors_in(file, url), dict(file.metadata() or {}), url)


def _weights(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], url: str) -> Weights:
    others = {name: value for name, value in metadata.items() if name not in ("model", "format", "classifier")}
    weights = Weights(model_config(metadata, url), tensors, others, ClassifierHead.of(metadata, url))
    image_statistics(metadata, url)
    weights.check(url)
    return weights


@contextmanager
def _checked_copy(storage: Storage, url: str) -> Iterator[Path]:
    with local_copy(storage, url) as path:
        if (expected := recorded_sha256(storage, url)) and sha256_of(path) != expected:
            rule = f"must have the SHA-256 in {url.rpartition('/')[2]}.sha256 beside it"
            raise WeightsFileError("weights", rule, url, "consolidate the checkpoint again, or get the file again")
        yield path
