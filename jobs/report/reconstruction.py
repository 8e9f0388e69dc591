"""Pictures of what a model has learned: photographs, what it sees of them, and how it reconstructs the rest.

Letters: B images, C channels, of pictures 1 or 3, H and W pixels.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jobs.run.directory import RECONSTRUCTIONS_NAME, RunDirectory
from model import ChannelStatistics, ConvMAE, ConvMAEConfig
from model.masking import draw_mask
from model.noise import mask_noise
from model.pixels import denormalise, normalise, patch_moments, patchify, unpatchify
from pipeline.image.augment import center_crop
from pipeline.image.channels import GRAY_CHANNELS, RGB_CHANNELS, PixelKind
from pipeline.image.decode import Decoder, decode
from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.load.shard_reader import Sample
from pipeline.order import hashing

HIDDEN_GRAY = 127
SHOWN_DEVIATIONS = 2.0
"""From the mean to black and to white, where images are no photographs; of these every value is shown as it is."""
CANDIDATES = 4
"""Images considered for each one shown, so that those shown are of different classes."""

LEAST_WIDTH_PIXELS = 1000
"""Small images are enlarged by a whole factor, so that a row of them is at least this wide."""
MOST_WIDTH_PIXELS = 1800
"""Large images are shrunk, so that a row of them is at most this wide."""
_GAP_PIXELS = 8
_CAPTION_PIXELS = 26
_FONT_PIXELS = 16
_SAMPLES_STREAM = 0x50494354  # separates the choice of samples from other uses of the seed


class Panels(NamedTuple):
    """The reconstruction of images by one model, each (B, C, H, W) uint8."""

    original: Tensor
    masked: Tensor
    """Hidden patches are HIDDEN_GRAY."""
    reconstruction: Tensor
    """The prediction where pixels were hidden, the original elsewhere."""


class Stage(NamedTuple):
    """A model at one stage of its training."""

    caption: str
    weights: Mapping[str, Tensor]
    """Its state dict."""


def reconstruction_grid(
    config: ConvMAEConfig,
    statistics: ChannelStatistics,
    stages: Iterable[Stage],
    dataset: Dataset,
    *,
    seed: int,
    count: int = 8,
) -> Image.Image:
    """Draw originals, masked images and a row of reconstructions for each stage, one column for each image.

    The same arguments give the same picture. Images are centre-cropped; masks are those of epoch 0. What a `norm_pix`
    model predicts has no brightness or contrast of its own: each predicted patch is given the mean and variance of
    the original patch, which such a model never sees. Pictures of models with and without it do not compare.

    Args:
        config: The model's.
        statistics: By which its images were normalised.
        stages: At least one; each is dropped before the next is requested.
        dataset: Where the images come from.
        seed: Chooses images and masks.
        count: Columns; fewer where the data set has fewer images.
    """
    model = ConvMAE(config).eval()
    kind = dataset.pixel_kind(config.in_channels)
    decoded = partial(decode, channels=kind.channels, bits=kind.bits)
    samples = varied(usable(dataset, spread_samples(dataset.samples, CANDIDATES * count, seed), decoded), count)
    crops = [center_crop(decoded(sample.data), config.image_shape) for sample in samples]
    noise = mask_noise(
        seed, 0, torch.tensor([sample.id for sample in samples], device="cpu"), config.mask_patches, "cpu"
    )
    images, rows = torch.from_numpy(np.stack(crops)), list[tuple[str, Tensor]]()
    for stage in stages:
        model.load_state_dict(stage.weights)
        panels = reconstruct_panels(model, statistics, images, noise)
        rows = rows or [
            ("original", panels.original),
            (f"what the model sees: {config.mask_ratio:.0%} is hidden", panels.masked),
        ]
        rows.append((stage.caption, panels.reconstruction))
    return draw_grid(rows)


def write_reconstructions(run: RunDirectory, stages: Iterable[Stage], dataset: Dataset) -> str:
    """Draw the reconstructions of a run's model as `reconstructions.png` in its directory; returns the URL.

    Args:
        run: Its recipe gives model and seed.
        stages: The run's model, as `consolidate` writes it.
        dataset: Where the images come from.
    """
    recipe = run.read_recipe()
    data = io.BytesIO()
    grid = reconstruction_grid(recipe.model, recipe.statistics, stages, dataset, seed=recipe.seed)
    grid.save(data, "PNG", optimize=True)
    url = run.path(RECONSTRUCTIONS_NAME)
    run.storage.write(url, data.getvalue())
    return url


def spread_samples(samples: int, count: int, seed: int) -> list[int]:
    """Choose `count` distinct sample ids, ascending, one from each equal part of the data set."""
    count = min(count, samples)
    places = hashing.uniforms(hashing.key(_SAMPLES_STREAM, seed), np.arange(count), 1)[:, 0].tolist()
    ends = [samples * part // count for part in range(count + 1)]
    return [start + int(place * (end - start)) for start, end, place in zip(ends, ends[1:], places, strict=False)]


def usable(dataset: Dataset, sample_ids: Sequence[int], decoded: Decoder) -> list[Sample]:
    """The samples that are as they were ingested and that decode.

    Raises:
        DatasetError: There is none.
    """
    samples, bad = [], []
    for found in dataset.read_each(sample_ids):
        if isinstance(found, BadSample):
            bad.append(found)
            continue
        try:
            decoded(found.data)
        except ValueError as error:
            bad.append(found.bad("undecodable", f"{found.member} does not decode ({error})"))
        else:
            samples.append(found)
    if not samples:
        raise bad[0].error()
    return samples


def varied(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Choose `count` samples of as many classes as possible, in their given order."""
    seen: Counter[int | None] = Counter()
    turns = []
    for sample in samples:
        turns.append(seen[sample.label])
        seen[sample.label] += 1
    chosen = sorted(range(len(samples)), key=lambda index: turns[index])[:count]
    return [samples[index] for index in sorted(chosen)]


@torch.inference_mode()
def reconstruct_panels(model: ConvMAE, statistics: ChannelStatistics, images: Tensor, noise: Tensor) -> Panels:
    """Mask images, and fill what was hidden with the model's prediction.

    Of images that are no photographs the first three bands are shown as RGB, or the first as gray, from
    SHOWN_DEVIATIONS below the mean to as much above it.

    Args:
        model: In evaluation mode.
        statistics: By which its images were normalised.
        images: (B, C, H, W) uint8 or uint16.
        noise: (B, draws), what the model masks by.
    """
    config, inputs = model.config, normalise(images, statistics)
    prediction = model.reconstruct(inputs, noise=noise).float()
    if config.norm_pix:
        mean, deviation = patch_moments(patchify(inputs))
        prediction = prediction * deviation + mean
    hidden = _hidden_pixels(config, noise)
    filled = unpatchify(prediction, config.grid)
    if PixelKind(images.shape[1], torch.iinfo(images.dtype).bits).is_photographic:
        original, filled = images, denormalise(filled, statistics)
    else:
        original, filled = _stretched(inputs), _stretched(filled)
    masked = original.masked_fill(hidden, HIDDEN_GRAY)
    return Panels(original, masked, torch.where(hidden, filled, original))


def draw_grid(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Lay images out in captioned rows, about LEAST_WIDTH_PIXELS to MOST_WIDTH_PIXELS wide.

    Args:
        rows: Caption and images, (B, C, H, W) uint8, of each.
    """
    count, _, height, width = rows[0][1].shape
    whole_factor = math.ceil(LEAST_WIDTH_PIXELS / (count * width))
    cell_width = min(whole_factor * width, MOST_WIDTH_PIXELS // count)
    cell_height = round(height * cell_width / width)
    # Whole factors show the model's pixels as they are.
    method = Image.Resampling.BICUBIC if cell_width % width else Image.Resampling.NEAREST
    row_height = _CAPTION_PIXELS + cell_height + _GAP_PIXELS
    picture = Image.new("RGB", (_GAP_PIXELS + count * (cell_width + _GAP_PIXELS), len(rows) * row_height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_PIXELS)
    for number, (caption, images) in enumerate(rows):
        top = number * row_height
        pen.text((_GAP_PIXELS, top + _CAPTION_PIXELS // 2), caption, "black", font, anchor="lm")
        for column, image in enumerate(images):
            shown = image.expand(3, -1, -1)  # of a gray one all channels are alike
            cell = Image.fromarray(shown.permute(1, 2, 0).numpy()).resize((cell_width, cell_height), method)
            picture.paste(cell, (_GAP_PIXELS + column * (cell_width + _GAP_PIXELS), top + _CAPTION_PIXELS))
    return picture


def _stretched(images: Tensor) -> Tensor:
    """Normalised (B, C, H, W) as uint8 of 1 or 3 channels."""
    shown = images[:, : RGB_CHANNELS if images.shape[1] >= RGB_CHANNELS else GRAY_CHANNELS]
    return ((shown / SHOWN_DEVIATIONS + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _hidden_pixels(config: ConvMAEConfig, noise: Tensor) -> Tensor:
    """(B, 1, H, W), True where a pixel's patch (or cell, with random masking) is hidden."""
    mask = draw_mask(noise, config.kept).mask.view(-1, 1, *config.noise_shape).bool()
    side = config.mask_pixels
    return mask.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
