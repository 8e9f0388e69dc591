"""What is evaluated: weights and their model, from a run, a file or a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from jobs.errors import WeightsFileError
from jobs.evaluate.encoder import FrozenEncoder
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated
from jobs.weights.consolidated import ClassifierHead, Weights
from jobs.weights.file_statistics import IMAGENET, statistics_in
from jobs.weights.foreign_classifier import foreign_classifier
from jobs.weights.image_size import image_shape
from jobs.weights.initial import foreign_weights
from jobs.weights.named_weights import RANDOM
from jobs.weights.names import fresh_tensors, model_names
from jobs.weights.weight_files import SUFFIX, local_copy, model_config, opened_file
from model import ChannelStatistics, ConvMAE, ConvMAEConfig
from pipeline.store.storage import Storage

OFFICIAL_RECIPE = "convmae_base_official"
"""Whose model a file of the official code has, unless another recipe is named."""


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
    head: ClassifierHead | None = None
    """Of a fine-tuned classifier."""
    has_class_names: bool = True
    """Whether the head's classes are known by more than their numbers."""
    statistics: ChannelStatistics = IMAGENET
    """By which images are normalised; for the official weights ImageNet's."""

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
        }, weights.head, statistics=weights.statistics)  # fmt: skip

    @classmethod
    def of_file(
        cls, storage: Storage, url: str, config: ConvMAEConfig | None = None, *, encoder_alone: bool = False
    ) -> Subject:
        """The weights in a file: consolidated ones know their model, those of the official code are of `config`.

        Args:
            storage: Reaches the file.
            url: Of a safetensors or PyTorch file, or of a folder of consolidated weights.
            config: Of a foreign file's model; None: it is a consolidated one.
            encoder_alone: Whether a foreign file may lack the decoder, or be a fine-tuned classifier.

        Raises:
            WeightsFileError: It is missing, altered, or of another architecture.
        """
        name = url.rpartition("/")[2]
        if config is not None:
            about = {"kind": "file", "url": url}
            with local_copy(storage, url) as path:
                statistics = statistics_in(path, url, config)
                if encoder_alone and (found := foreign_classifier(path, url, config)):
                    return cls(
                        name, config, found.tensors, about, found.head, has_class_names=False, statistics=statistics
                    )
                tensors = foreign_weights(path, url, config, encoder_alone=encoder_alone)
                return cls(name, config, tensors, about, statistics=statistics)
        try:
            weights = consolidated.of_file(storage, url)
        except WeightsFileError:
            # What `convmae export --format backbone` wrote knows its model too.
            if not encoder_alone or (known := _model_of(storage, url)) is None:
                raise
            return cls.of_file(storage, url, known, encoder_alone=True)
        about = {"kind": "file", "url": url, **_known(weights)}
        return cls(name, weights.config, weights.tensors, about, weights.head, statistics=weights.statistics)

    @classmethod
    def of_seed(
        cls, config: ConvMAEConfig, seed: int, recipe: str, statistics: ChannelStatistics = IMAGENET
    ) -> Subject:
        """The weights with which a run of that seed begins."""
        tensors = fresh_tensors(model_names(config), config, seed)
        origin = {"kind": RANDOM, "recipe": recipe, "seed": seed}
        return cls(f"random weights of {recipe}, seed {seed}", config, tensors, origin, statistics=statistics)

    def encoder(self, image_size: str = "") -> FrozenEncoder:
        """The encoder, for images of a size as written on the command line; empty: that of the pretraining.

        Raises:
            UserError: The size is invalid.
            WeightsFileError: A weight is not finite.
        """
        shape = image_shape(image_size, self.config)
        return FrozenEncoder.of(self.config, self.tensors, shape, self.name, statistics=self.statistics)

    def classifier(self, classes: tuple[str, ...], image_size: str = "") -> FrozenEncoder:
        """The classifier with the names of its classes, for images of a size as of `encoder`.

        Raises:
            UserError: The size is invalid.
            WeightsFileError: A weight is not finite.
        """
        assert self.head
        head = replace(self.head, classes=classes)
        shape = image_shape(image_size, self.config)
        return FrozenEncoder.of(self.config, self.tensors, shape, self.name, statistics=self.statistics, head=head)

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
