"""What is evaluated: weights and their model, from a run, a file or a seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jobs.errors import EvaluationError, WeightsFileError
from jobs.evaluate.encoder import FrozenEncoder
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated
from jobs.weights.consolidated import Weights
from jobs.weights.image_size import image_shape
from jobs.weights.initial import read_foreign
from jobs.weights.names import fresh_tensors, model_names
from jobs.weights.weight_files import SUFFIX, local_copy, model_config, opened_file
from model import ConvMAE, ConvMAEConfig
from pipeline.access.places import is_place, normal
from pipeline.store.storage import Storage

RANDOM = "random"
"""Instead of a run or a file: weights that nothing has trained, as a control."""
OFFICIAL_RECIPE = "convmae_base_official"
"""Whose model a file of the official code has, unless another recipe is named."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_STEP = re.compile(r"(.+)@([0-9]{1,12})")


@dataclass(frozen=True, eq=False)
class Subject:
    """Weights to evaluate."""

    name: str
    """For people."""
    config: ConvMAEConfig
    tensors: Mapping[str, Tensor]
    """By our names; without those of the decoder where the source has none."""
    origin: Mapping[str, Any]
    """`kind` (`run`, `file` or `random`), and what is known of where they come from."""

    @classmethod
    def of_run(cls, run: RunDirectory, step: int | None = None) -> Subject:
        """The weights of one of a run's steps; None: the newest.

        Raises:
            CheckpointError: There is no such step, or a file of it is missing or altered.
        """
        weights = consolidated.of_run(run, step)
        known = _known(weights)
        return cls(f"{run.name}, step {known.get('step', '?')}", weights.config, weights.tensors, {
            "kind": "run", "url": run.url, **known
        })  # fmt: skip

    @classmethod
    def of_file(
        cls, storage: Storage, url: str, config: ConvMAEConfig | None = None, *, encoder_alone: bool = False
    ) -> Subject:
        """The weights in a file: consolidated ones know their model, those of the official code are of `config`.

        Args:
            storage: Reaches the file.
            url: Of a safetensors or PyTorch file, or of a folder of consolidated weights.
            config: Of a foreign file's model; None: it is a consolidated one.
            encoder_alone: Whether a foreign file may lack the decoder.

        Raises:
            WeightsFileError: It is missing, altered, or of another architecture.
        """
        name = url.rpartition("/")[2]
        if config is not None:
            tensors = read_foreign(storage, url, config, encoder_alone=encoder_alone)
            return cls(name, config, tensors, {"kind": "file", "url": url})
        try:
            weights = consolidated.of_file(storage, url)
        except WeightsFileError:
            # What `convmae export --format backbone` wrote knows its model too.
            if not encoder_alone or (known := _model_of(storage, url)) is None:
                raise
            return cls.of_file(storage, url, known, encoder_alone=True)
        return cls(name, weights.config, weights.tensors, {"kind": "file", "url": url, **_known(weights)})

    @classmethod
    def of_seed(cls, config: ConvMAEConfig, seed: int, recipe: str) -> Subject:
        """The weights with which a run of that seed begins."""
        tensors = fresh_tensors(model_names(config), config, seed)
        origin = {"kind": RANDOM, "recipe": recipe, "seed": seed}
        return cls(f"random weights of {recipe}, seed {seed}", config, tensors, origin)

    def encoder(self, image_size: str = "") -> FrozenEncoder:
        """The encoder, for images of a size as written on the command line; empty: that of the pretraining.

        Raises:
            UserError: The size is invalid.
            WeightsFileError: A weight is not finite.
        """
        return FrozenEncoder.of(self.config, self.tensors, image_shape(image_size, self.config), self.name)

    def model(self) -> ConvMAE:
        """The whole model, in evaluation mode.

        Raises:
            WeightsFileError: There is no decoder.
        """
        model = ConvMAE(self.config)
        if missing := [name for name in model.state_dict() if name not in self.tensors]:
            rule = f"must have a decoder ({len(missing)} tensors of pretraining are missing)"
            raise WeightsFileError("weights", rule, self.name, "give weights of a pretraining")
        model.load_state_dict(dict(self.tensors))
        return model.eval().requires_grad_(False)


def is_file(storage: Storage, what: str) -> bool:
    """Whether weights are meant by a file, or a folder of consolidated ones, rather than by a run.

    Args:
        storage: Reaches it.
        what: As it was given; a bare word without a suffix of weights is a run.
    """
    if what.endswith(TORCH_SUFFIXES) or consolidated.is_weights(storage, normal(what) if is_place(what) else what):
        return True
    return is_place(what) and storage.exists(normal(what))


def parted(what: str, step: int | None) -> tuple[str, int | None]:
    """A run and a step out of RUN@STEP, or what else was given.

    Raises:
        EvaluationError: A step is given twice.
    """
    match = _STEP.fullmatch(what)
    if match is None:
        return what, step
    if step is not None:
        raise EvaluationError("--step", "must not be given with RUN@STEP", step, "give one of the two")
    return match[1], int(match[2])


def _model_of(storage: Storage, url: str) -> ConvMAEConfig | None:
    """The model that the metadata of a file name; None where they do not, or the file has a decoder."""
    if not url.endswith(SUFFIX):
        return None
    try:
        with local_copy(storage, url) as path, opened_file(path, url) as file:
            config = model_config(dict(file.metadata() or {}), url)
            has_decoder = any("decoder" in name for name in file.keys())  # noqa: SIM118  it is no mapping
    except WeightsFileError:
        return None
    return None if has_decoder else config


def _known(weights: Weights) -> dict[str, Any]:
    """What the metadata say of run, step and epoch."""
    metadata = weights.metadata
    numbers = {name: int(metadata[name]) for name in ("step", "epoch") if metadata.get(name, "").isdecimal()}
    return ({"run": metadata["run"]} if "run" in metadata else {}) | numbers
