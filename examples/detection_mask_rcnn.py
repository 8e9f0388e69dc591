"""Detection and instance segmentation: the backbone's maps in torchvision's feature pyramid and Mask R-CNN.

    python examples/detection_mask_rcnn.py --weights first-step-00000400-backbone.safetensors

Needs a torchvision that was built for the installed torch. Trains on random images with one bright square each, to show
that everything fits together.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import torch
from pretrained import arguments, backbone
from torch import Tensor, nn

from model import Backbone

try:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
except (ImportError, RuntimeError) as error:  # RuntimeError: one that was built for another torch
    reason = str(error).splitlines()[0]
    sys.exit(f"this example needs a torchvision that was built for torch {torch.__version__} ({reason})")

LEVELS = ("0", "1", "2", "3")
"""Strides 4, 8, 16 and 32."""
CLASSES = 2
"""The background and squares."""


class PyramidBackbone(nn.Module):
    """Backbone and feature pyramid, with the one attribute and the named maps that torchvision's detectors want."""

    def __init__(self, backbone: Backbone, out_channels: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = out_channels
        channels = [*backbone.channels, backbone.channels[-1]]
        self.pyramid = FeaturePyramidNetwork(channels, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps of `out_channels` channels at strides 4 to 64."""
        maps = self.backbone(images)
        levels: dict[str, Tensor] = self.pyramid(OrderedDict(zip(LEVELS, (*maps, maps.pooled), strict=True)))
        return levels


def detector(backbone: Backbone, classes: int, image_size: int) -> MaskRCNN:
    """Mask R-CNN; it normalises images with ImageNet's mean and deviation, as the pretraining did."""
    return MaskRCNN(
        PyramidBackbone(backbone),
        num_classes=classes,
        min_size=image_size,
        max_size=image_size,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS), output_size=7, sampling_ratio=2),
        mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), output_size=14, sampling_ratio=2),
    )


def squares(count: int, image_size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Dark images in 0..1 with one bright square each, and what a detector shall find in them."""
    images, targets = [], []
    side = image_size // 3
    for _ in range(count):
        row, column = torch.randint(0, image_size - side, (2,)).tolist()
        image, mask = 0.3 * torch.rand(3, image_size, image_size), torch.zeros(1, image_size, image_size)
        mask[:, row : row + side, column : column + side] = 1
        images.append(torch.maximum(image, 0.9 * mask))
        box = torch.tensor([[column, row, column + side, row + side]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.long), "masks": mask.to(torch.uint8)})
    return images, targets


def main() -> None:
    """Train a few steps on random data and print the losses."""
    given = arguments(__doc__ or "")
    torch.manual_seed(0)
    model = detector(backbone(given.weights), CLASSES, given.image_size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(1, given.steps + 1):
        losses = model(*squares(2, given.image_size))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        print(f"step {step}  " + "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
    with torch.no_grad():
        (found,) = model.eval()(squares(1, given.image_size)[0])
    print(f"found {len(found['boxes'])} boxes, masks of shape {tuple(found['masks'].shape)}")


if __name__ == "__main__":
    main()
