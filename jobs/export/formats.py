"""Exports of a checkpoint: the official names, our backbone, a Hugging Face folder, ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from jobs.checkpoint.checkpoint import folder_name
from jobs.errors import ExportError
from jobs.export import onnx_export
from jobs.export.model_card import write_card
from jobs.export.run_tables import TABLE_SUFFIXES
from jobs.export.written import Exported, written_files
from jobs.recipe.image_statistics import statistics_metadata
from jobs.run.directory import RunDirectory
from jobs.weights.consolidated import Weights
from jobs.weights.image_size import image_shape
from jobs.weights.weight_files import model_json, write_tensors
from model import Backbone, ConvMAE, ConvMAEConfig
from model.config import PATCH_PIXELS
from model.errors import ModelConfigError
from model.weights import to_official
from pipeline.access.places import normal
from pipeline.store.storage import Storage

OFFICIAL_KERNEL_SIZE = 5
ABOUT = "convmae_pretrain"
"""Key of our metadata in an official file, beside `model`; the official code does not read it."""


@dataclass(frozen=True)
class Source:
    """What is exported, and where it comes from."""

    weights: Weights
    run: RunDirectory | None
    """Its history and pictures are put into the model card; None for a file on its own."""
    image_size: tuple[int, int]
    """Of the ONNX model's input."""

    @classmethod
    def of(cls, weights: Weights, run: RunDirectory | None, image_size: str = "") -> Source:
        """Weights with an image size as written on the command line; empty: that of the pretraining.

        Raises:
            UserError: The size is invalid.
        """
        return cls(weights, run, image_shape(image_size, weights.config))

    @property
    def stem(self) -> str:
        """Of file names: run and step, as far as they are known."""
        metadata = self.weights.metadata
        step = f"-{folder_name(int(metadata['step']))}" if metadata.get("step", "").isdecimal() else ""
        return f"{metadata.get('run') or 'convmae'}{step}"


@dataclass(frozen=True)
class Format:
    """One format, and how it is written into a local folder."""

    suffix: str
    """Of its only file; empty where it is a folder of files."""
    write: Callable[[Source, Path, str], None]
    """Given the source, an empty local folder, and the name of the only file."""
    without_head: str = ""
    """What is written of a classifier, if not all of it."""


def export(source: Source, name: str, storage: Storage, out: str, *, force: bool = False) -> list[Exported]:
    """Write a checkpoint in the format `name`.

    Args:
        source: What to export.
        name: One of FORMATS.
        storage: Reaches `out`.
        out: The file, if it has the format's suffix; else a folder.
        force: Replace what is there.

    Raises:
        ExportError: The target exists, a package is missing, or the format cannot hold this model.
    """
    check_format(name)
    form = FORMATS[name]
    folder, file_name = normal(out), f"{source.stem}-{name}{form.suffix}"
    if form.suffix and folder.endswith(form.suffix):
        folder, _, file_name = folder.rpartition("/")
    note = form.without_head if source.weights.head else ""
    written = written_files(
        storage, folder, file_name if form.suffix else "", lambda at: form.write(source, at, file_name), force=force
    )
    return [replace(each, note=note) for each in written]


def check_format(name: str) -> None:
    """Check before any work that a format can be written.

    Raises:
        ExportError: It is unknown, or a package is missing.
    """
    if name not in FORMATS:
        known = ", ".join([*FORMATS, *TABLE_SUFFIXES])
        raise ExportError("--format", f"must be one of {known}", name, "see `convmae export --help`")
    if name == "onnx":
        onnx_export.check_packages()


def _write_official(source: Source, folder: Path, name: str) -> None:
    weights = source.weights
    if weights.head:
        check_official(replace(weights.config, fusion=weights.config.has_convolutions))  # a classifier has none
        official = weights.classifier().to_official()
    else:
        check_official(weights.config)
        official = to_official(weights.tensors)
    state = {key: value.contiguous() for key, value in official.items()}
    about = {**weights.metadata, **_statistics(weights), "model": model_json(weights.config)}
    if weights.head:
        about["classifier"] = json.dumps(asdict(weights.head), sort_keys=True)
    torch.save({"model": state, ABOUT: about}, folder / name)


def check_official(config: ConvMAEConfig) -> None:
    """Check that the official pretraining class can have this shape.

    Raises:
        ExportError: It cannot; names the field.
    """
    rows, columns = config.grid
    limits: list[tuple[str, object, object]] = [
        ("image_size", rows == columns, True),
        ("in_channels", config.in_channels, 3),
    ]
    if config.has_convolutions:
        limits += [("kernel_size", config.kernel_size, OFFICIAL_KERNEL_SIZE), ("fusion", config.fusion, True)]
    for field, value, wanted in limits:
        if value != wanted:
            rule = f"must be {'square' if field == 'image_size' else wanted} in the official code"
            remedy = "the formats hf and backbone hold every model"
            raise ExportError(f"model.{field}", rule, getattr(config, field), remedy)


def _write_backbone(source: Source, folder: Path, name: str) -> None:
    state = _backbone(source.weights).state_dict()
    _save(state, folder / name, source.weights)


def _write_hugging_face(source: Source, folder: Path, _: str) -> None:
    weights = source.weights
    if weights.head:
        remedy = "use --format official, or backbone for the encoder"
        raise ExportError("--format", "must be official, backbone or onnx for a classifier", "hf", remedy)
    model = ConvMAE(weights.config)
    model.load_state_dict(dict(weights.tensors), strict=True)
    _save(model.state_dict(), folder / "model.safetensors", weights)
    _write_json(folder / "config.json", hugging_face_config(weights))
    height, width = weights.config.image_shape
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / ((1 << weights.image_bits) - 1),
            "do_normalize": True,
            "image_mean": weights.statistics.mean,
            "image_std": weights.statistics.std,
        },
    )
    write_card(folder, weights, source.run)


def hugging_face_config(weights: Weights) -> dict[str, object]:
    """Contents of `config.json`: the names that `transformers` uses, and under `convmae` all fields as they are."""
    config = weights.config
    return {
        "model_type": "convmae",
        "architectures": ["ConvMAE"],
        "torch_dtype": str(next(iter(weights.tensors.values())).dtype).removeprefix("torch."),
        "image_size": list(config.image_shape),
        "patch_size": PATCH_PIXELS,
        "num_channels": config.in_channels,
        "hidden_sizes": list(config.embed_dim),
        "depths": list(config.depth),
        "num_attention_heads": config.num_heads,
        "mlp_ratio": list(config.mlp_ratio),
        "decoder_hidden_size": config.decoder_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix,
        "convmae": json.loads(model_json(config)),
        "pretraining": {**weights.metadata, **_statistics(weights)},
    }


def _write_onnx(source: Source, folder: Path, name: str) -> None:
    weights = source.weights
    model, about = weights.classifier() if weights.head else _backbone(weights), _statistics(weights)
    if weights.head:
        about[onnx_export.CLASSES] = json.dumps(weights.head.classes)
    onnx_export.write(model, folder / name, source.image_size, about)


def _statistics(weights: Weights) -> dict[str, str]:
    """What images must be normalised by, also where the weights are older than its record."""
    return statistics_metadata(*weights.statistics, weights.image_bits)


def _backbone(weights: Weights) -> Backbone:
    try:
        backbone = Backbone(weights.config)
    except ModelConfigError as error:
        remedy = f"use --format official or {'onnx' if weights.head else 'hf'}"
        raise ExportError(f"model.{error.field}", error.rule, error.value, remedy) from None
    backbone.load(weights.tensors)
    return backbone.eval()


def _save(state: Mapping[str, Tensor], path: Path, weights: Weights) -> None:
    metadata = {**weights.metadata, **_statistics(weights), "format": "pt", "model": model_json(weights.config)}
    write_tensors(state, path, metadata)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


FORMATS: Mapping[str, Format] = {
    "official": Format(".pth", _write_official),
    "backbone": Format(".safetensors", _write_backbone, "the encoder of the classifier, without its head"),
    "hf": Format("", _write_hugging_face),
    "onnx": Format(".onnx", _write_onnx),
}
