"""The dense encoder as ONNX: whole images in, three maps out, compared with PyTorch before it is released."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import ExportError
from model import Backbone

INPUT = "images"
OUTPUTS = ("stage1", "stage2", "stage3")
"""Maps at strides 4, 8 and 16."""
OPSET = 20
TOLERANCE = 1e-3
"""Largest difference to PyTorch, relative to the largest value of a map."""
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class _Maps(nn.Module):
    """The backbone with a plain tuple as its result."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stage1, stage2, stage3 = self.backbone(images)
        return stage1, stage2, stage3


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


def write(backbone: Backbone, path: Path, image_size: tuple[int, int]) -> None:
    """Write `backbone` for images of one size and batches of any, and compare it with PyTorch.

    Args:
        backbone: In evaluation mode.
        path: The file to write; weights are inside it.
        image_size: Height and width in pixels.

    Raises:
        ExportError: ONNX Runtime computes something other than PyTorch.
    """
    images = torch.randn(2, 3, *image_size, device="cpu", generator=torch.Generator().manual_seed(0))
    maps = _Maps(backbone.float()).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        torch.onnx.export(
            maps,
            (images,),
            path,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    difference = largest_difference(maps, path, [images, images[:1], torch.cat([images, images.flip(0)])])
    if not difference <= TOLERANCE:
        rule = f"must agree with PyTorch within {TOLERANCE:g} of the largest value"
        remedy = "export on another machine, or use --format backbone"
        raise ExportError("--format onnx", rule, f"{difference:.2g}", remedy)


def largest_difference(maps: nn.Module, path: Path, batches: Sequence[Tensor]) -> float:
    """Between ONNX Runtime and PyTorch on the CPU, relative to the largest value of each map."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in batches:
        with torch.no_grad():
            expected = maps(images)
        found = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        for one, other in zip(expected, found, strict=True):
            difference = (one - torch.from_numpy(other)).abs().max() / one.abs().max()
            worst = max(worst, float(difference)) if torch.isfinite(difference) else float("inf")
    return worst
