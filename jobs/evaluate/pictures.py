"""Reconstructions of one's own pictures: original, what the model sees of it, and what it makes of the rest."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.errors import EvaluationError
from jobs.report.reconstruction import draw_grid, reconstruct_panels
from model import ChannelStatistics, ConvMAE, ConvMAEConfig
from model.noise import mask_noise
from pipeline.access.places import Given, Listed
from pipeline.errors import clipped
from pipeline.image.augment import center_crop
from pipeline.image.bands import file_bits
from pipeline.image.decode import Pixels, decode
from pipeline.ingest.source import IMAGE_SUFFIXES, suffix
from pipeline.store.storage import Storage

COLUMNS = 8
MOST_PICTURES = 64
_WHITE = 255


def found_pictures(storage: Storage, places: Sequence[str], folder: str) -> list[str]:
    """URLs of pictures.

    Args:
        storage: Reaches them.
        places: Paths or URLs of image files, or of folders that hold some.
        folder: What relative paths are relative to.

    Raises:
        EvaluationError: One is not there, or there are more than MOST_PICTURES.
    """
    urls: list[str] = []
    for place in places:
        url = Given(place).url(folder).rstrip("/")
        if storage.exists(url):
            urls.append(url)
            continue
        names = [name for name in storage.list_names(url) if suffix(name) in IMAGE_SUFFIXES]
        if not names:
            rule = "must be image files, or folders that hold some"
            raise EvaluationError("PICTURES", rule, place, "check the path; `convmae shard` lists the formats")
        urls += [Listed(name).url(url) for name in names]
    if len(urls) > MOST_PICTURES:
        remedy = "give some of them"
        raise EvaluationError("PICTURES", f"must be at most {MOST_PICTURES} for one image", len(urls), remedy)
    return urls


def reconstructed(
    storage: Storage, urls: Sequence[str], model: ConvMAE, statistics: ChannelStatistics, *, seed: int
) -> Image.Image:
    """One image with all of them, COLUMNS beside each other.

    Args:
        storage: Reaches the pictures.
        urls: Of image files of any format that `convmae shard` reads, those with the model's bands and 16 bits too.
        model: In evaluation mode.
        statistics: By which its images were normalised.
        seed: Chooses the masks, each by the seed and the place of its picture.

    Raises:
        EvaluationError: One does not decode.
    """
    config = model.config
    images = torch.from_numpy(np.stack(_alike([_cropped(storage, url, config) for url in urls])))
    noise = mask_noise(seed, 0, torch.arange(len(urls), device="cpu"), config.mask_patches, "cpu")
    grids = []
    for start in range(0, len(urls), COLUMNS):
        part = slice(start, start + COLUMNS)
        panels = reconstruct_panels(model, statistics, images[part], noise[part])
        rows = [
            ("original", panels.original),
            (f"what the model sees: {config.mask_ratio:.0%} is hidden", panels.masked),
            ("reconstruction", panels.reconstruction),
        ]
        grids.append(draw_grid([(caption, _filled(row, min(len(urls), COLUMNS))) for caption, row in rows]))
    return _stacked(grids)


def png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


def _cropped(storage: Storage, url: str, config: ConvMAEConfig) -> Pixels:
    data = storage.read(url)
    try:
        return center_crop(decode(data, config.in_channels, file_bits(data, config.in_channels)), config.image_shape)
    except ValueError as error:
        rule = f"must be images that decode ({clipped(str(error))})"
        raise EvaluationError("PICTURES", rule, url, "leave it out, or save it again") from None


def _alike(images: Sequence[Pixels]) -> list[Pixels]:
    """All with as many bits: 257 times a value of 8 bits is the same share of the largest of 16."""
    if len({image.dtype for image in images}) == 1:
        return list(images)
    return [image if image.dtype == np.uint16 else image.astype(np.uint16) * np.uint16(257) for image in images]


def _filled(images: Tensor, count: int) -> Tensor:
    """Images with white ones behind them, so that the last row has columns as wide as the others."""
    white = images.new_full((count - len(images), *images.shape[1:]), _WHITE)
    return torch.cat([images, white])


def _stacked(grids: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(grid.width for grid in grids), sum(grid.height for grid in grids)), "white")
    for grid, top in zip(grids, _tops(grids), strict=True):
        whole.paste(grid, (0, top))
    return whole


def _tops(grids: Sequence[Image.Image]) -> Iterator[int]:
    top = 0
    for grid in grids:
        yield top
        top += grid.height
