"""The README of an exported model: what it is, how it was trained, how it is loaded, and its pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from jobs.report.curves import Floats, Series, Steps, thinned, trend
from jobs.run.directory import RECONSTRUCTIONS_NAME, RunDirectory
from jobs.weights.consolidated import Weights
from pipeline.image.channels import GRAY_CHANNELS, RGB_CHANNELS

RAW_POINTS = 1200
TREND_POINTS = 120
LOSS_PICTURE = "loss.png"

_CARD = """\
---
library_name: pytorch
pipeline_tag: image-feature-extraction
tags:
- convmae
- masked-image-modeling
- self-supervised
---

# $name

ConvMAE ([arXiv:2205.03892](https://arxiv.org/abs/2205.03892)), pretrained by reconstructing masked images: an encoder
whose three stages give maps at strides 4, 8 and 16, and the decoder of the pretraining. It has no classification head.

$facts

## Use

With convmae-pretrain installed, the whole model:

```python
import json

from safetensors.torch import load_file
from model import Backbone, ConvMAE, ConvMAEConfig

config = ConvMAEConfig(**json.load(open("config.json"))["convmae"])
model = ConvMAE(config)
model.load_state_dict(load_file("model.safetensors"))
```
$backbone
Images are $colours, scaled to 0..1 and normalised with the mean and deviation in `preprocessor_config.json`.
$results
## Recipe

| field | value |
|---|---|
$recipe

## Provenance

| | |
|---|---|
$provenance
"""
_BACKBONE = """
The encoder alone, for images of any size:

```python
backbone = Backbone(config, drop_path=0.1)
backbone.load(load_file("model.safetensors"))
stage1, stage2, stage3 = backbone(images)  # images: (B, $channels, H, W)
```
"""


def write_card(folder: Path, weights: Weights, run: RunDirectory | None) -> None:
    """Write `README.md` into a local folder, with the pictures of the run beside it.

    Args:
        folder: Destination.
        weights: What the card describes.
        run: Whose recipe, history and reconstructions are shown; None if it is unknown.
    """
    losses = _losses_until(run, weights.metadata) if run else None
    if losses:
        (folder / LOSS_PICTURE).write_bytes(loss_picture(*losses))
    if run and run.storage.exists(picture := run.path(RECONSTRUCTIONS_NAME)):
        (folder / RECONSTRUCTIONS_NAME).write_bytes(run.storage.read(picture))
    has_picture = (folder / RECONSTRUCTIONS_NAME).exists()
    (folder / "README.md").write_text(card(weights, run, losses, has_picture=has_picture), "utf-8")


def card(weights: Weights, run: RunDirectory | None, losses: Series | None, *, has_picture: bool) -> str:
    """The text of the README."""
    recipe: Mapping[str, Any] = run.read_recipe().to_json() if run else {}
    metadata, channels = dict(weights.metadata), weights.config.in_channels
    fields = {**{key: value for key, value in recipe.items() if key not in ("model", "run_root")}, **_model(weights)}
    pictures = [f"![loss over steps]({LOSS_PICTURE})"] if losses else []
    pictures += [f"![originals, masked images and reconstructions]({RECONSTRUCTIONS_NAME})"] if has_picture else []
    return Template(_CARD).substitute(
        name=metadata.get("run") or "ConvMAE",
        facts="\n".join(f"- {line}" for line in _facts(weights, losses)),
        backbone=Template(_BACKBONE).substitute(channels=channels) if weights.config.has_convolutions else "",
        colours={GRAY_CHANNELS: "gray", RGB_CHANNELS: "RGB"}.get(channels, f"{channels} bands"),
        results="\n## Pretraining\n\n" + "\n\n".join(pictures) + "\n" if pictures else "",
        recipe="\n".join(_row(key, value) for key, value in fields.items()),
        provenance="\n".join(_row(key, value) for key, value in metadata.items()),
    )


def loss_picture(steps: Steps, losses: Floats) -> bytes:
    """The loss over steps as PNG: as recorded, and its trend."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 3), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*thinned(steps, losses, RAW_POINTS), color="#b8c4d6", linewidth=0.7)
        axes.plot(*trend(steps, losses, TREND_POINTS), color="#1f4e9c", linewidth=1.5)
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _losses_until(run: RunDirectory, metadata: Mapping[str, str]) -> Series | None:
    """Steps and losses up to the step of the weights; None without one."""
    steps = run.read_latest_steps(("step", "loss"))
    if metadata.get("step", "").isdecimal():
        steps = steps.where(steps.steps <= int(metadata["step"]))
    losses = steps.numbers("loss")
    is_done = np.isfinite(losses)
    return (steps.steps[is_done], losses[is_done]) if is_done.any() else None


def _facts(weights: Weights, losses: Series | None) -> Iterator[str]:
    config, metadata = weights.config, weights.metadata
    numbers = sum(tensor.numel() for tensor in weights.tensors.values())
    yield f"{numbers:,} numbers, images of {' x '.join(map(str, config.image_shape))} pixels"
    if "step" in metadata:
        yield f"{metadata['step']} steps, {metadata.get('epoch', '?')} epochs"
    if losses:
        pixels = "normalised pixels" if config.norm_pix else "pixels"
        yield f"loss at the last step: {losses[1][-1]:.4f} ({config.loss} on {pixels})"


def _model(weights: Weights) -> dict[str, object]:
    return {f"model.{key}": value for key, value in asdict(weights.config).items()}


def _row(key: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"| `{key}` | {text.replace('|', chr(92) + '|')} |"
