"""Random erasing: a rectangle of some images becomes noise, as a function of (seed, epoch, sample).

Source: Zhong et al. 2020, arXiv:1708.04896, with the parameters of timm's RandomErasing in its mode `pixel`, with which
the official fine-tuning trains.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.noise import ERASING_STREAM, sample_noise
from pipeline.order import hashing

AREA = (0.02, 1 / 3)
"""Range of the rectangle's share of the image's area."""
RATIO = (0.3, 1 / 0.3)
"""Range of its height over its width, uniform in its logarithm."""
ATTEMPTS = 10
_STREAM = 0x45726173

Box = tuple[int, int, int, int]
"""Top, bottom, left and right, in pixels."""


def erased(images: Tensor, seed: int, epoch: int, sample_ids: Tensor, probability: float) -> Tensor:
    """The images, of which some have a rectangle of standard normal noise.

    Args:
        images: (B, 3, H, W) normalised.
        seed: The run's.
        epoch: From 0.
        sample_ids: (B,) int64, on the host.
        probability: Of erasing in an image.
    """
    boxes = erased_boxes(seed, epoch, sample_ids.numpy(), probability, (images.shape[2], images.shape[3]))
    chosen = [place for place, box in enumerate(boxes) if box]
    if not chosen:
        return images
    images, size = images.clone(), images[0].numel()
    noise = _normal(sample_noise(seed, epoch, sample_ids[chosen], 2 * size, images.device, stream=ERASING_STREAM))
    for place, values in zip(chosen, noise.view(-1, *images.shape[1:]), strict=True):
        top, bottom, left, right = boxes[place] or (0, 0, 0, 0)
        images[place, :, top:bottom, left:right] = values[:, top:bottom, left:right]
    return images


def erased_boxes(
    seed: int, epoch: int, sample_ids: npt.NDArray[np.int64], probability: float, image_shape: tuple[int, int]
) -> list[Box | None]:
    """Of each image the rectangle that is erased, or None.

    Args:
        seed: The run's.
        epoch: From 0.
        sample_ids: (B,).
        probability: Of erasing in an image.
        image_shape: Height and width, in pixels.
    """
    draws = hashing.uniforms(hashing.key(_STREAM, seed, epoch), sample_ids, 4 * ATTEMPTS + 1)
    return [_box(row[1:].tolist(), image_shape) if row[0] < probability else None for row in draws]


def _box(draws: list[float], image_shape: tuple[int, int]) -> Box | None:
    """The first of the drawn rectangles that is smaller than the image on both sides."""
    height, width = image_shape
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(ATTEMPTS):
        share, ratio, down, right = draws[4 * attempt : 4 * attempt + 4]
        area = height * width * (AREA[0] + share * (AREA[1] - AREA[0]))
        aspect = math.exp(low + ratio * (high - low))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
            return top, top + rows, left, left + columns
    return None


def _normal(noise: Tensor) -> Tensor:
    """(B, 2 n) uniform -> (B, n) standard normal (Box and Muller 1958, doi:10.1214/aoms/1177706645)."""
    first, second = noise.chunk(2, dim=1)
    radius = (-2 * torch.log1p(-first)).sqrt()
    return radius * torch.cos(2 * math.pi * second)
