"""Photographs for a first run without a download: those that scikit-image and scikit-learn ship with themselves.

They are cut into tiles, enough for a demo to have epochs, classes and shards; far too few to learn from.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import SourceError
from pipeline.order import hashing

TILE_PIXELS = (160, 256)
"""Range of a tile's side as it is saved."""
LARGEST_ZOOM = 1.5
"""A tile shows up to this many times its own side of the photograph, scaled down."""
TILE_QUALITY = 92

_STREAM = 0x54494C45


@dataclass(frozen=True)
class Photograph:
    """A colour photograph inside an installed package."""

    name: str
    package: str
    path: str
    """Inside the package's folder."""
    licence: str
    credit: str


_NASA = "NASA, https://flic.kr/p/r9qvLn"
_SPACEX = "SpaceX, https://www.flickr.com/photos/spacexphotos/16511594820"
_CHINA = "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035"
_FLOWER = "vultilion, https://www.flickr.com/photos/vultilion/6056698931"

# Not included: textures, drawings and gray images; micrographs; and the motorcycle, whose licence is not stated.
PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "public domain", _NASA),
    Photograph("cat", "skimage", "data/chelsea.png", "CC0", "Stefan van der Walt"),
    Photograph("coffee", "skimage", "data/coffee.png", "CC0", "Rachel Michetti, Pikolo Espresso Bar"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "CC BY 2.0", _FLOWER),
    Photograph("galaxies", "skimage", "data/hubble_deep_field.jpg", "public domain", "NASA, HubbleSite 2012-37"),
    Photograph("rocket", "skimage", "data/rocket.jpg", "public domain", _SPACEX),
    Photograph("temple", "sklearn", "datasets/images/china.jpg", "CC BY 2.0", _CHINA),
)


def photograph_path(photograph: Photograph) -> Path:
    """Path of a photograph on this machine; imports nothing and needs no network.

    Raises:
        SourceError: Its package is not installed.
    """
    spec = importlib.util.find_spec(photograph.package)
    if spec is None or spec.origin is None:
        rule = "must be installed for the demo's photographs"
        raise SourceError("package", rule, photograph.package, "run `pip install 'convmae-pretrain[local]'`")
    return Path(spec.origin).parent / photograph.path


def cut_tiles(folder: Path, count: int, seed: int) -> list[Path]:
    """Cut the photographs into square JPEG tiles at random places and scales, in a folder for each photograph.

    Args:
        folder: Where to; made if missing. The same arguments write the same files.
        count: How many tiles over all photographs.
        seed: Of the places and scales.

    Returns:
        The files, sorted.

    Raises:
        SourceError: A package that ships the photographs is not installed.
    """
    written = []
    for number, photograph in enumerate(PHOTOGRAPHS):
        target = folder / photograph.name
        target.mkdir(parents=True, exist_ok=True)
        with Image.open(photograph_path(photograph), formats=("JPEG", "PNG")) as file:
            image = file.convert("RGB")
        tiles = np.arange(number, count, len(PHOTOGRAPHS))
        for tile, draws in zip(tiles.tolist(), hashing.uniforms(hashing.key(_STREAM, seed), tiles, 4), strict=True):
            path = target / f"{tile:05d}.jpg"
            _tile(image, *draws.tolist()).save(path, quality=TILE_QUALITY)
            written.append(path)
    return sorted(written)


def _tile(image: Image.Image, size: float, zoom: float, right: float, down: float) -> Image.Image:
    """One tile; every argument but the image is a draw from [0, 1)."""
    side = round(TILE_PIXELS[0] + size * (TILE_PIXELS[1] - TILE_PIXELS[0]))
    shown = min(image.width, image.height, round(side * (1 + zoom * (LARGEST_ZOOM - 1))))
    left, top = int(right * (image.width - shown + 1)), int(down * (image.height - shown + 1))
    return image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + shown, top + shown))
