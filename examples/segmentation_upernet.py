"""Semantic segmentation: the backbone's maps in a UPerNet-style head (Xiao et al. 2018, arXiv:1807.10221).

    python examples/segmentation_upernet.py --weights first-step-00000400-backbone.safetensors

Trains on random images whose right half is another class, to show that everything fits together; takes seconds.
"""

from __future__ import annotations

import torch
from pretrained import arguments, backbone
from torch import Tensor, nn
from torch.nn import functional

from model import Backbone
from model.dense import Features

CLASSES = 3


def convolution(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """Convolution, norm and ReLU that keep the map's size; GroupNorm, since batches are small."""
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


class UPerNet(nn.Module):
    """Backbone, pyramid pooling on the coarsest map, top-down pathway, and all levels fused at stride 4."""

    def __init__(self, backbone: Backbone, classes: int, width: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        *fine, coarse = backbone.channels
        self.pooling = PyramidPooling(coarse, width)
        self.middle = convolution(coarse, width, 1)
        self.lateral = nn.ModuleList(convolution(channels, width, 1) for channels in fine)
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in range(3))
        self.classify = nn.Sequential(convolution(4 * width, width, 3), nn.Conv2d(width, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, classes, H, W)."""
        maps: Features = self.backbone(images)
        levels = [self.pooling(maps.pooled)]
        laterals = [self.middle(maps.stage3), self.lateral[1](maps.stage2), self.lateral[0](maps.stage1)]
        for lateral in laterals:
            levels.append(lateral + resized(levels[-1], lateral))
        smoothed = [levels[0], *(smooth(level) for smooth, level in zip(self.smooth, levels[1:], strict=True))]
        fused = torch.cat([resized(level, levels[-1]) for level in smoothed], dim=1)
        return resized(self.classify(fused), images)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`."""
    return functional.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def main() -> None:
    """Train a few steps on random data and print the loss."""
    given = arguments(__doc__ or "")
    torch.manual_seed(0)
    model = UPerNet(backbone(given.weights), CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(2, 3, given.image_size, given.image_size)
    labels = torch.zeros(2, given.image_size, given.image_size, dtype=torch.long)
    labels[:, :, given.image_size // 2 :] = 1
    images[:, 0] += labels
    for step in range(1, given.steps + 1):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")
    with torch.no_grad():
        correct = (model.eval()(images).argmax(1) == labels).float().mean()
    print(f"pixels classified as they are labelled: {correct:.1%}")


if __name__ == "__main__":
    main()
