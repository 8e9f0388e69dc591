"""The backbone's maps in UPerNet (Xiao et al. 2018, arXiv:1807.10221): pyramid pooling, a top-down path, one fused map.

A head of a fully convolutional network on the third map (stride 16) helps training, as in the official configuration.
Norms are GroupNorm, where the official code synchronises BatchNorm: batches of a process are small.
"""

from __future__ import annotations

import torch
from pictures import UNLABELLED
from torch import Tensor, nn
from torch.nn import functional

from model import Backbone
from model.dense import Features


def convolution(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """Convolution, norm and ReLU that keep the map's size."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()
    )


class PyramidPooling(nn.Module):
    """The coarsest map beside its means over 1, 2, 3 and 6 parts of a side: context from the whole image."""

    def __init__(self, inputs: int, outputs: int, parts: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.parts = parts
        self.reduce = nn.ModuleList(convolution(inputs, outputs, 1) for _ in parts)
        self.merge = convolution(inputs + len(parts) * outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        pooled = [
            reduce(functional.adaptive_avg_pool2d(x, n)) for n, reduce in zip(self.parts, self.reduce, strict=True)
        ]
        merged: Tensor = self.merge(torch.cat([x, *(resized(part, x) for part in pooled)], dim=1))
        return merged


class UPerHead(nn.Module):
    """Maps at strides 4 to 32 -> logits at stride 4."""

    def __init__(self, inputs: tuple[int, int, int], classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        *fine, coarse = inputs
        self.pooling = PyramidPooling(coarse, channels)
        self.lateral = nn.ModuleList(convolution(count, channels, 1) for count in (*fine, coarse))
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in range(3))
        self.fuse = convolution(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1))

    def forward(self, maps: Features) -> Tensor:
        """(B, classes, H/4, W/4)."""
        coarsest = self.pooling(maps.pooled)
        levels = [coarsest]
        for lateral, x in zip(reversed(self.lateral), reversed(maps), strict=True):
            y = lateral(x)
            levels.append(y + resized(levels[-1], y))
        smoothed = [coarsest, *(smooth(level) for smooth, level in zip(self.smooth, levels[1:], strict=True))]
        logits: Tensor = self.classify(self.fuse(torch.cat([resized(level, levels[-1]) for level in smoothed], dim=1)))
        return logits


class UPerNet(nn.Module):
    """Losses in training, else logits of every pixel.

    Args:
        backbone: The encoder.
        classes: Without the unlabelled.
        channels: Of the head.
        auxiliary_channels: Of the head on the third map.
        auxiliary_weight: Of that head's loss.
        dropout: Before the last convolution of both.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        channels: int = 768,
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliary_weight = auxiliary_weight
        self.head = UPerHead(backbone.channels, classes, channels, dropout)
        self.auxiliary = nn.Sequential(
            convolution(backbone.channels[2], auxiliary_channels, 3),
            nn.Dropout2d(dropout),
            nn.Conv2d(auxiliary_channels, classes, 1),
        )

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of both heads.

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B, H, W) classes, or `UNLABELLED`.
        """
        maps: Features = self.backbone(images)
        return {
            "loss": _cross_entropy(self.head(maps), labels),
            "auxiliary_loss": self.auxiliary_weight * _cross_entropy(self.auxiliary(maps.stage3), labels),
        }

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Losses where there are labels, else (B, classes, H, W)."""
        if labels is not None:
            return self.losses(images, labels)
        return resized(self.head(self.backbone(images)), images)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`."""
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all pixels, of which unlabelled ones count as 0, as in mmsegmentation: never a division by 0."""
    each = functional.cross_entropy(resized(logits, labels), labels, ignore_index=UNLABELLED, reduction="none")
    return each.mean()
