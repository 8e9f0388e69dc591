"""Augmentations of pictures with outlines or class maps, as functions of draws in [0, 1).

Draws are functions of (seed, epoch, sample), so that neither the number of processes nor a restart changes a picture.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pictures import UNLABELLED, Pixels
from PIL import Image

from pipeline.order import hashing

Draws = npt.NDArray[np.float64]

DETECTION_DRAWS = 4
CROPS = 10
"""Attempts at a crop that no class fills."""
SEGMENTATION_DRAWS = 1 + 2 * CROPS + 1 + 8

_STREAM = 0x4A495454  # keeps these draws apart from what else is keyed by (seed, epoch)
_BRIGHTNESS, _CONTRAST, _HUE = 32, (0.5, 1.5), 18 / 180


def draws_of(seed: int, epoch: int, sample: int, count: int) -> Draws:
    """(count,) numbers in [0, 1)."""
    (draws,) = hashing.uniforms(hashing.key(_STREAM, seed, epoch), np.array([sample], np.int64), count)
    return np.asarray(draws)


def scaled_crop(
    picture: Pixels, masks: Pixels, draws: Draws, side: int, scale: tuple[float, float]
) -> tuple[Pixels, Pixels, npt.NDArray[np.bool_]]:
    """Large-scale jitter (Ghiasi et al. 2021, arXiv:2012.07177): scaled, cropped to a square at most, mirrored by half.

    Args:
        picture: (H, W, 3).
        masks: (N, H, W) of 0 and 1.
        draws: (DETECTION_DRAWS,).
        side: Of the square, in pixels.
        scale: Range of the factor by which the picture is larger than what fits into the square.

    Returns:
        Picture, masks of what is still seen, neither side longer than the square's, and which of the objects are.
    """
    height, width = picture.shape[:2]
    factor = _between(scale, draws[0]) * min(side / height, side / width)
    rows, columns = (max(1, round(size * factor)) for size in (height, width))
    top, left = (int(draw * (max(0, size - side) + 1)) for draw, size in ((draws[1], rows), (draws[2], columns)))
    rows_kept, columns_kept = min(side, rows), min(side, columns)
    window = (left, top, left + columns_kept, top + rows_kept)
    ratios = (width / columns, height / rows)
    picture = _resized(picture, window, ratios, Image.Resampling.BILINEAR)
    cut = [_resized(mask, window, ratios, Image.Resampling.NEAREST) for mask in masks]
    masks = np.stack(cut) if cut else np.zeros((0, rows_kept, columns_kept), np.uint8)
    if draws[3] < 0.5:
        picture, masks = picture[:, ::-1], masks[:, :, ::-1]
    seen = np.asarray(masks.any(axis=(1, 2)))
    return np.ascontiguousarray(picture), np.ascontiguousarray(masks[seen]), seen


def boxes_of(masks: Pixels) -> npt.NDArray[np.float32]:
    """(N, 4) left, top, right and bottom of (N, H, W) masks, none of which is empty; right and bottom lie outside."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def fitted(picture: Pixels, longest: int, shortest: int) -> Pixels:
    """A picture scaled as far as neither side is longer than that, and no farther."""
    height, width = picture.shape[:2]
    factor = min(longest / max(height, width), shortest / min(height, width))
    return _scaled(picture, factor, Image.Resampling.BILINEAR)


def labelled_crop(
    picture: Pixels,
    labels: Pixels,
    draws: Draws,
    *,
    image_scale: tuple[int, int],
    scale: tuple[float, float],
    side: int,
    most_of_one_class: float,
) -> tuple[Pixels, Pixels]:
    """mmsegmentation's pipeline for ADE20K: scaled, cropped, mirrored by half, colours distorted.

    Args:
        picture: (H, W, 3).
        labels: (H, W).
        draws: (SEGMENTATION_DRAWS,).
        image_scale: Most pixels of the long and the short side before the factor.
        scale: Range of the factor.
        side: Of the crop, in pixels.
        most_of_one_class: Share of the labelled pixels of a crop.

    Returns:
        Picture and labels; smaller than the crop where the scaled picture is.
    """
    height, width = labels.shape
    fit = min(max(image_scale) / max(height, width), min(image_scale) / min(height, width))
    factor = fit * _between(scale, draws[0])
    picture = _scaled(picture, factor, Image.Resampling.BILINEAR)
    labels = _scaled(labels, factor, Image.Resampling.NEAREST)
    rows, columns = _varied_window(labels, draws[1 : 1 + 2 * CROPS], side, most_of_one_class)
    picture, labels = picture[rows, columns], labels[rows, columns]
    if draws[1 + 2 * CROPS] < 0.5:
        picture, labels = picture[:, ::-1], labels[:, ::-1]
    return distorted(np.ascontiguousarray(picture), draws[2 + 2 * CROPS :]), np.ascontiguousarray(labels)


def distorted(picture: Pixels, draws: Draws) -> Pixels:
    """mmsegmentation's PhotoMetricDistortion: brightness, contrast, saturation and hue, each by half.

    Args:
        picture: (H, W, 3).
        draws: (8,): whether and by how much, for each.
    """
    image = picture.astype(np.float32)
    if draws[0] < 0.5:
        image = _clipped(image + _between((-_BRIGHTNESS, _BRIGHTNESS), draws[1]))
    if draws[2] < 0.5:
        image = _clipped(image * _between(_CONTRAST, draws[3]))
    if draws[4] >= 0.5 and draws[6] >= 0.5:
        return image.astype(np.uint8)
    hsv = np.asarray(Image.fromarray(image.astype(np.uint8)).convert("HSV")).astype(np.float32)
    if draws[4] < 0.5:
        hsv[..., 1] = _clipped(hsv[..., 1] * _between(_CONTRAST, draws[5]))
    if draws[6] < 0.5:
        hsv[..., 0] = (hsv[..., 0] + 256 * _between((-_HUE, _HUE), draws[7])) % 256
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(hsv.astype(np.uint8), -1, 0)]
    return np.asarray(Image.merge("HSV", planes).convert("RGB"))


def _varied_window(labels: Pixels, draws: Draws, side: int, most: float) -> tuple[slice, slice]:
    """The first of ten windows in which several classes are and none has more than its share, else the last."""
    room = [max(0, size - side) + 1 for size in labels.shape]
    for down, across in draws.reshape(CROPS, 2):
        top, left = int(down * room[0]), int(across * room[1])
        window = slice(top, top + side), slice(left, left + side)
        inside = labels[window]
        counts = np.bincount(inside[inside != UNLABELLED], minlength=1)
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < most:
            break
    return window


def _resized(
    array: Pixels, window: tuple[int, int, int, int], ratios: tuple[float, float], how: Image.Resampling
) -> Pixels:
    """A window of a scaled array without scaling the rest of it.

    Args:
        array: (H, W) or (H, W, 3).
        window: Left, top, right and bottom in the scaled array.
        ratios: Width and height of the array over those of the scaled one.
        how: To resample.
    """
    left, top, right, bottom = window
    height, width = array.shape[:2]
    box = (left * ratios[0], top * ratios[1], min(width, right * ratios[0]), min(height, bottom * ratios[1]))
    return np.asarray(Image.fromarray(array).resize((right - left, bottom - top), how, box))


def _scaled(array: Pixels, factor: float, how: Image.Resampling) -> Pixels:
    height, width = array.shape[:2]
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(array).resize(size, how))


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _clipped(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.clip(image, 0, 255)
