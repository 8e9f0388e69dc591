"""The backbone's maps in torchvision's feature pyramid and Mask R-CNN (He et al. 2017, arXiv:1703.06870).

Heads are those of the official detector: two convolutions for proposals, four and a linear layer for boxes, four for
masks. Norms are GroupNorm, where the official code synchronises BatchNorm: batches of a process are small.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import cast

from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from model import Backbone, ChannelStatistics

LEVELS = ("0", "1", "2", "3")
"""Strides 4, 8, 16 and 32."""

_HIDDEN = 1024
"""Of the box head."""

_norm = partial(nn.GroupNorm, 8)

Target = dict[str, Tensor]


class PyramidBackbone(nn.Module):
    """Backbone and feature pyramid, with the one attribute and the named maps that torchvision's detectors want."""

    def __init__(self, backbone: Backbone, out_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = out_channels
        channels = [*backbone.channels, backbone.channels[-1]]
        self.pyramid = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool(), _norm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps of `out_channels` channels at strides 4 to 64."""
        maps = self.backbone(images)
        levels: dict[str, Tensor] = self.pyramid(OrderedDict(zip(LEVELS, (*maps, maps.pooled), strict=True)))
        return levels


class SquareTransform(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision has no types
    """Normalises images and fills them to squares; resizes for testing alone, since training has jittered the scale."""

    def __init__(self, image_size: int, statistics: ChannelStatistics) -> None:
        mean, std = (list(values) for values in statistics)
        super().__init__(image_size, image_size, mean, std, size_divisible=image_size)

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """The image as it is in training, else with its long side as long as the square's."""
        if self.training:
            return image, target
        return cast(tuple[Tensor, Target | None], super().resize(image, target))


def detector(
    backbone: Backbone,
    classes: int,
    *,
    statistics: ChannelStatistics,
    image_size: int,
    channels: int,
    regions: int,
) -> MaskRCNN:
    """Mask R-CNN on RGB images in 0 to 1.

    Args:
        backbone: The encoder.
        classes: Without the background, which is class 0.
        statistics: By which images are normalised.
        image_size: Side of the squares, in pixels.
        channels: Of the pyramid and the heads.
        regions: Of an image, from which the box head learns.
    """
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    model = MaskRCNN(
        PyramidBackbone(backbone, channels),
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS), output_size=7, sampling_ratio=2),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [_HIDDEN], _norm),
        box_predictor=FastRCNNPredictor(_HIDDEN, classes + 1),
        box_batch_size_per_image=regions,
        mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, _norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
    )
    model.transform = SquareTransform(image_size, statistics)
    return model
