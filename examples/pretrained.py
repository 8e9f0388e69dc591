"""The backbone of both examples: pretrained where a file is given, else of a size that a laptop trains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors import safe_open

from model import Backbone, ConvMAEConfig


def arguments(description: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--weights", type=Path, help="of `convmae consolidate` or `export --format backbone`")
    parser.add_argument("--steps", type=int, default=20, help="training steps on random data")
    parser.add_argument("--image-size", type=int, default=128, help="side of the images, in pixels")
    return parser.parse_args()


def backbone(weights: Path | None) -> Backbone:
    """The encoder with stochastic depth, as fine-tuning wants it; randomly initialised where there are no weights."""
    if weights is None:
        return Backbone(ConvMAEConfig.preset("tiny"), drop_path=0.1)
    with safe_open(weights, "pt") as file:
        made = Backbone(ConvMAEConfig(**json.loads(file.metadata()["model"])), drop_path=0.1)
        made.load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  it is no mapping
    return made
