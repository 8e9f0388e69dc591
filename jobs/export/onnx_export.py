"""The dense encoder or a classifier as ONNX, compared with PyTorch before it is released.

Whole images in; three maps out, or the logits of their classes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import ExportError
from model import Backbone, Classifier

INPUT = "images"
MAPS = ("stage1", "stage2", "stage3")
"""Outputs of a backbone, at strides 4, 8 and 16."""
LOGITS = ("logits",)
"""Output of a classifier, (batch, classes)."""
CLASSES = "classes"
"""Key of the file's metadata under which a classifier has their names, as JSON, in the order of the logits."""
OPSET = 20
TOLERANCE = 1e-3
"""Largest difference to PyTorch, relative to the largest value of an output."""
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class _Plain(nn.Module):
    """A model with a plain tuple as its result."""

    def __init__(self, model: Backbone | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model(images)
        return (out,) if isinstance(out, Tensor) else tuple(out)


def check_packages() -> None:
    """Check before any work that the export can be made.

    Raises:
        ExportError: A package is missing; names the extra that brings it.
    """
    for name in _PACKAGES:
        try:
            __import__(name)
        except ImportError:
            remedy = "pip install 'convmae-pretrain[export]'"
            raise ExportError("--format onnx", "needs a package that is not installed", name, remedy) from None


def write(model: Backbone | Classifier, path: Path, image_size: tuple[int, int], metadata: Mapping[str, str]) -> None:
    """Write a model for images of one size and batches of any, and compare it with PyTorch.

    Args:
        model: In evaluation mode.
        path: The file to write; weights are inside it.
        image_size: Height and width in pixels.
        metadata: Of the file: what images are to be normalised by; under CLASSES the names of a classifier's outputs.

    Raises:
        ExportError: ONNX Runtime computes something other than PyTorch.
    """
    images = torch.randn(
        2, model.config.in_channels, *image_size, device="cpu", generator=torch.Generator().manual_seed(0)
    )
    plain = _Plain(model.float()).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        torch.onnx.export(
            plain,
            (images,),
            path,
            input_names=[INPUT],
            output_names=list(MAPS if isinstance(model, Backbone) else LOGITS),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    difference = largest_difference(plain, path, [images, images[:1], torch.cat([images, images.flip(0)])])
    if not difference <= TOLERANCE:
        rule = f"must agree with PyTorch within {TOLERANCE:g} of the largest value"
        remedy = "export on another machine, or use --format backbone or official"
        raise ExportError("--format onnx", rule, f"{difference:.2g}", remedy)
    _describe(path, metadata)


def _describe(path: Path, metadata: Mapping[str, str]) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


def largest_difference(model: nn.Module, path: Path, batches: Sequence[Tensor]) -> float:
    """Between ONNX Runtime and PyTorch on the CPU, relative to the largest value of each output."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in batches:
        with torch.no_grad():
            expected = model(images)
        found = session.run(None, {INPUT: images.numpy()})
        for one, other in zip(expected, found, strict=True):
            difference = (one - torch.from_numpy(other)).abs().max() / one.abs().max()
            worst = max(worst, float(difference)) if torch.isfinite(difference) else float("inf")
    return worst
