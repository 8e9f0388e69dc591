"""Sides of the loader benchmark: each is a stream of batches of uint8 images from the same JPEGs.

The others run as their documentation shows it, in as many worker processes as there are cores, with the MAE recipe in
PIL. PIL gets the crop as a box of `resize`, which spares it a copy; `draft` is not used, since torchvision's recipe
does not use it either. No side normalises, and all give uint8. Side `bare` reads nothing: it decodes, crops and
resizes what lies in memory, in plain threads, each with a share of its own. Sides that are `marked` read the dataset
whose JPEGs have restart markers, and decode of each image what its crop needs.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pipeline.access.s3_options import OBSTORE
from pipeline.image.augment import Crop, crop_draws, random_crop, resized
from pipeline.image.decode import Pixels, decode
from pipeline.image.decode_crop import decode_crop
from pipeline.load.dataset import Dataset as OurDataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage

BATCH = 64
SIDE = 224
SEED = 0
LANES, BLOCK_SAMPLES, WINDOW_BLOCKS = 8, 32, 4
SHUFFLED = 1000
"""Samples among which webdataset shuffles; ours has as many open."""


@dataclass(frozen=True)
class Place:
    """The images of a side, and how much of the machine it may use."""

    paths: tuple[str, ...]
    """Of single files."""
    shards: str
    """Our dataset, on disk or on S3."""
    marked: str
    """The same with restart markers, on disk."""
    tars: tuple[str, ...]
    """Its tars, as webdataset opens them."""
    streaming: str
    litdata: str
    storage: Storage
    threads: int
    """Threads of ours; worker processes of the others."""
    scratch: str
    """An empty folder for caches."""


# ---- ours ----------------------------------------------------------------------------------------------------------


def open_ours(place: Place) -> tuple[Loader, Order]:
    """From nothing to a loader that can be asked for any step."""
    dataset = OurDataset.open(place.storage, place.shards)
    order = Order(dataset.samples, BATCH, LANES, SEED, BLOCK_SAMPLES, WINDOW_BLOCKS)
    shape = (SIDE, SIDE)
    loader = Loader(dataset, order, image_shape=shape, rank=0, world_size=1, seed=SEED, threads=place.threads)
    return loader, order


def ours(place: Place) -> Iterator[int]:
    """Two epochs, since the first batch leaves gaps in the blocks of the first; nothing is cached."""
    loader, order = open_ours(place)
    for batch in loader.batches(0, 2 * order.steps_per_epoch):
        yield len(batch.images)


def ours_marked(place: Place) -> Iterator[int]:
    """As `ours`, of the dataset with restart markers."""
    yield from ours(replace(place, shards=place.marked))


def ours_by_obstore(place: Place) -> Iterator[int]:
    """As `ours`, with the bodies of S3 objects read by obstore."""
    options = replace(place.storage.s3, reader=OBSTORE)
    yield from ours(replace(place, storage=replace(place.storage, s3=options)))


def bare(place: Place) -> Iterator[int]:
    """Decode, crop, resize: what a loader cannot do without."""
    images = [Path(path).read_bytes() for path in place.paths]

    def shown(data: bytes, crop: Crop) -> Pixels:
        return crop.of(decode(data))

    yield from _bare_loop(place, images, shown)


def bare_marked(place: Place) -> Iterator[int]:
    """The same of JPEGs with restart markers, of which it decodes what the crop needs."""
    dataset = OurDataset.open(place.storage, place.marked)
    images = [sample.data for sample in dataset.read(np.arange(dataset.samples))]

    def shown(data: bytes, crop: Crop) -> Pixels:
        found = decode_crop(data, 3, lambda *_: crop, is_marked=True, least_shape=None)
        return crop.of(decode(data)) if found is None else found[0]

    yield from _bare_loop(place, images, shown)


def _bare_loop(place: Place, images: list[bytes], shown: Callable[[bytes, Crop], Pixels]) -> Iterator[int]:
    sizes = [decode(data).shape[:2] for data in images]
    draws = crop_draws(SEED, 0, np.arange(len(images)))
    crops = [random_crop(row, *size) for row, size in zip(draws, sizes, strict=True)]
    yield 0

    def work(first: int) -> None:
        out = np.empty((3, SIDE, SIDE), np.uint8)
        for number in range(first, len(images), place.threads):
            out[:] = resized(shown(images[number], crops[number]), crops[number], (SIDE, SIDE))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(place.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield len(images)


# ---- the MAE recipe in PIL -----------------------------------------------------------------------------------------


def mae_recipe(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8: RandomResizedCrop(scale=(0.2, 1), bicubic) and a flip, as torchvision draws them."""
    left, top, width, height = _random_box(*image.size)
    box = (left, top, left + width, top + height)
    cropped = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    if random.random() < 0.5:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)


def _random_box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _from_bytes(data: bytes) -> torch.Tensor:
    return mae_recipe(Image.open(io.BytesIO(data)).convert("RGB"))


# ---- theirs --------------------------------------------------------------------------------------------------------


def webdataset(place: Place, skip: int = 0) -> Iterator[int]:
    """Tars, a shuffle buffer, PIL, WebLoader; each worker skips `skip` samples before it decodes one."""
    import webdataset as wds

    dataset = (
        wds.WebDataset(list(place.tars), shardshuffle=len(place.tars), empty_check=False)
        .compose(lambda samples: itertools.islice(samples, skip, None))
        .shuffle(SHUFFLED)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(mae_recipe)
        .batched(BATCH, partial=True)
    )
    for (images,) in wds.WebLoader(dataset, batch_size=None, num_workers=place.threads):
        yield len(images)


class _Folder(Dataset[torch.Tensor]):
    """A folder read as by torchvision's ImageFolder."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Path(self._paths[number]).open("rb") as file:
            return mae_recipe(Image.open(file).convert("RGB"))


def torch_folder(place: Place) -> Iterator[int]:
    """Single files, torch's DataLoader, PIL."""
    folder = _Folder(place.paths)
    for images in DataLoader(folder, BATCH, sampler=RandomSampler(folder), num_workers=place.threads):
        yield len(images)


def streaming(place: Place) -> Iterator[int]:
    """MosaicML Streaming with bytes, PIL, torch's DataLoader."""
    from streaming.base import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return _from_bytes(super().__getitem__(at)["image"])

    where = {"local": place.streaming}
    if place.streaming.startswith("s3://"):
        where = {"remote": place.streaming, "local": f"{place.scratch}/streaming"}
    dataset = Images(**where, shuffle=True, batch_size=BATCH)
    for images in DataLoader(dataset, BATCH, num_workers=place.threads):
        yield len(images)


def litdata(place: Place) -> Iterator[int]:
    """LitData with bytes, PIL, its own DataLoader."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return _from_bytes(super().__getitem__(at))

    dataset = Images(place.litdata, shuffle=True)
    for images in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=place.threads):
        yield len(images)


SIDES: dict[str, Callable[[Place], Iterator[int]]] = {
    "ours": ours,
    "by obstore": ours_by_obstore,
    "bare": bare,
    "ours marked": ours_marked,
    "bare marked": bare_marked,
    "webdataset": webdataset,
    "torch": torch_folder,
    "streaming": streaming,
    "litdata": litdata,
}
