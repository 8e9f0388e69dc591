"""Contents of single ZeRO files, as values that processes can exchange: names, shapes and places.

Imports no torch, and reads no weights.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.checkpoint import deepspeed_internals as keys
from jobs.checkpoint.checkpoint import file_url
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.deepspeed_files.torch_archive import Files, LazyTensor, TensorPlace, read_archive
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.tensor_ranges import damaged
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory
from pipeline.errors import UserError

_THREADS = 8
"""Files that are looked into at once."""
_SCALARS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelFile:
    """A file of model states. All have fragments; only that of the first rank has the rest."""

    fragments: Mapping[str, TensorPlace]
    """In ZeRO 2 and 3: this rank's range of each frozen parameter."""
    shapes: tuple[Mapping[str, Shape], ...] = ()
    """Of the trained parameters of each group, in the order in which they lie in its vectors."""
    frozen: Mapping[str, Shape] = field(default_factory=dict)
    """Of the parameters in fragments."""
    fixed: Mapping[str, TensorPlace] = field(default_factory=dict)
    """What only the module's state holds: buffers, and below ZeRO 2 frozen parameters."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of trained parameters."""


@dataclass(frozen=True)
class OptimizerFile:
    """A file of optimizer states: one rank's vectors."""

    is_stage_3: bool
    masters: tuple[TensorPlace, ...]
    """fp32, one vector per group; in ZeRO 3 possibly several."""
    moments: Mapping[str, tuple[TensorPlace, ...]] = field(default_factory=dict)
    """Each of MOMENTS, laid out as the masters; empty if they were not looked for."""
    ranks: int = 0
    """That wrote the checkpoint; this and the following fields are only in the first rank's file."""
    paddings: tuple[tuple[int, ...], ...] | None = None
    """Values of padding after each parameter of each group, in ZeRO 1 and 2."""
    step: float = 0.0
    """AdamW's step count, for its bias correction, if its state was looked for."""


FilesFound = Mapping[str, ModelFile | OptimizerFile]
"""By name."""


def file_names(commit: Commit) -> tuple[list[str], list[str]]:
    """Names of the files with model states, and of those with optimizer states, both by rank.

    Raises:
        CheckpointError: There are none.
    """
    models, optimizers = (_by_rank(commit, suffix) for suffix in (keys.MODEL_SUFFIX, keys.OPTIMIZER_SUFFIX))
    if not models or not optimizers:
        raise CheckpointError("checkpoint", "must hold ZeRO files", f"step {commit.step}", "choose another --step")
    return models, optimizers


def look_into(
    run: RunDirectory, commit: Commit, files: Files, *, moments: bool, part: int = 0, parts: int = 1
) -> dict[str, ModelFile | OptimizerFile]:
    """What the files of a checkpoint hold; each of several processes looks into a part of them.

    Args:
        run: Whose checkpoint it is.
        commit: Of the checkpoint.
        files: What the archives are read through.
        moments: Whether to look for AdamW's moments and step.
        part: Which part, in [0, parts); the first ranks' files are in part 0.
        parts: How many parts the files are dealt into.

    Raises:
        DamagedCheckpointError: A file is missing, truncated, or not as it was written.
        CheckpointError: A file is of a kind that is not handled.
    """
    models, optimizers = file_names(commit)
    sizes = {file.name: file.bytes for file in commit.files}

    def look(name: str) -> ModelFile | OptimizerFile:
        contents = read_archive(files, file_url(run, commit.step, name), sizes[name])
        with of_deepspeed(run):
            if name in known_models:
                return _model_file(run, contents, is_first=name == models[0])
            return _optimizer_file(run, contents, files, moments=moments, is_first=name == optimizers[0])

    known_models = set(models)
    names = [*models[part::parts], *optimizers[part::parts]]
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(look, names), strict=True))


@contextlib.contextmanager
def of_deepspeed(run: RunDirectory) -> Iterator[None]:
    """A reading of contents: whole files may hold something else, and what cannot be found in them is damage."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        what = f"its files hold something other than what DeepSpeed writes: {type(error).__name__}"
        raise damaged(run.url, what) from error


def _by_rank(commit: Commit, suffix: str) -> list[str]:
    found = [file.name for file in commit.files if file.name.endswith(suffix)]
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _model_file(run: RunDirectory, contents: Mapping[str, Any], *, is_first: bool) -> ModelFile:
    places = {_text(name): tensor.place() for name, tensor in (contents.get(keys.FROZEN_FRAGMENTS) or {}).items()}
    if not is_first:
        return ModelFile(places)
    _check_kind(run, contents)
    shapes = tuple(_shapes(group) for group in contents[keys.SHAPES])
    frozen = _shapes(contents.get(keys.FROZEN_SHAPES) or {})
    elsewhere = {*frozen, *(name for group in shapes for name in group)}
    fixed = {
        _text(name): tensor.place()
        for name, tensor in contents[keys.MODULE].items()
        if name not in elsewhere and isinstance(tensor, LazyTensor)
    }
    aliases = {_text(alias): _text(name) for alias, name in contents.get(keys.ALIASES, {}).items()}
    return ModelFile(places if frozen else {}, shapes, frozen, fixed, aliases)


def _optimizer_file(
    run: RunDirectory, contents: Mapping[str, Any], files: Files, *, moments: bool, is_first: bool
) -> OptimizerFile:
    state = contents[keys.STATE]
    is_stage_3 = keys.MASTERS_OF_STAGE_3 in state
    where = keys.MASTERS_OF_STAGE_3 if is_stage_3 else keys.MASTERS
    if where not in state:
        raise CheckpointError("checkpoint", "must be of ZeRO 1, 2 or 3", run.name, "choose another --step")
    masters = tuple(tensor.place() for tensor in state[where])
    inner = _inner_states(state)
    found: dict[str, tuple[TensorPlace, ...]] = {}
    if moments:
        _check_adamw(run, inner, len(masters))
        found = {moment: tuple(inner[group][moment].place() for group in sorted(inner)) for moment in MOMENTS}
    if not is_first:
        return OptimizerFile(is_stage_3, masters, found)
    counts, paddings = state.get(keys.RANKS, 0), state.get(keys.PADDINGS)
    ranks = operator.index(max(counts) if isinstance(counts, list) else counts)
    padded = paddings and tuple(tuple(operator.index(count) for count in group) for group in paddings)
    step = _number(files, inner[min(inner)]["step"]) if moments else 0.0
    return OptimizerFile(is_stage_3, masters, found, ranks, padded or None, step)


def _inner_states(state: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    """AdamW's own state: flat vectors by number of their group."""
    inner = state.get(keys.STATE if keys.MASTERS_OF_STAGE_3 in state else keys.INNER_STATE)
    found = inner.get("state") if isinstance(inner, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _number(files: Files, value: LazyTensor | float) -> float:
    if not isinstance(value, LazyTensor):
        return float(value)
    place = value.place()
    kind = np.dtype(_SCALARS[place.dtype])
    url, offset, _ = place.byte_range
    return float(np.frombuffer(files.read_range(url, offset, kind.itemsize), kind)[0])


def _shapes(found: Mapping[Any, Any]) -> dict[str, Shape]:
    return {_text(name): tuple(operator.index(length) for length in shape) for name, shape in found.items()}


def _text(name: object) -> str:
    """A name; nothing else may be sent to other processes as one."""
    if not isinstance(name, str):
        raise TypeError("a name that is not a string")
    return name


def _check_kind(run: RunDirectory, first: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed can save and is not handled here."""
    config = first.get(keys.CONFIG)
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    offloads = [zero.get(what) for what in ("offload_optimizer", "offload_param")] if isinstance(zero, Mapping) else []
    kinds = {
        "without offload": any(isinstance(to, Mapping) and to.get("device", "none") != "none" for to in offloads),
        "without tensor parallelism": first.get(keys.TENSOR_PARALLEL_RANKS, 1) != 1,
        "without mixture of experts": bool(first.get(keys.EXPERTS)),
    }
    for rule, is_broken in kinds.items():
        if is_broken:
            raise CheckpointError("checkpoint", f"must be {rule}", run.name, "choose another run; no recipe makes this")


def _check_adamw(run: RunDirectory, inner: Mapping[int, Mapping[str, Any]], vectors: int) -> None:
    found = sorted({field for group in inner.values() for field in group})
    if len(inner) != vectors or found != [*MOMENTS, "step"]:
        rule = f"must be of AdamW, with a state of {', '.join(MOMENTS)} and step for each vector"
        value = f"{', '.join(found) or 'nothing'} for {len(inner)} of {vectors} in {run.name}"
        raise CheckpointError("checkpoint", rule, value, "choose another run; no recipe makes this")
