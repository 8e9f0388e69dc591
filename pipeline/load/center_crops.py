"""Images as evaluation reads them: chosen samples, each cut to its centre, in groups that are read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pipeline.image.augment import center_crop
from pipeline.image.channels import RGB_CHANNELS, PixelKind
from pipeline.image.decode import Pixels, decode
from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.load.shard_reader import Sample

Int64s = npt.NDArray[np.int64]

_REMEDY = "evaluate another dataset: an accuracy without it would be of other samples"


def center_crops(
    dataset: Dataset,
    groups: Sequence[Int64s],
    image_shape: tuple[int, int],
    *,
    threads: int,
    channels: int = RGB_CHANNELS,
) -> Iterator[Pixels]:
    """Pixels of each group, (n, C, H, W) of 8 or 16 bits; the next group is read and decoded meanwhile.

    Args:
        dataset: Where the images are.
        groups: (n,) sample ids each.
        image_shape: H and W, in pixels.
        threads: That decode.
        channels: C, to which images are decoded.

    Raises:
        DatasetError: The images have no such channels. A sample is not as it was ingested, or does not decode; names
            shard, image and offset.
    """
    kind = dataset.pixel_kind(channels)
    with ThreadPoolExecutor(1, "convmae-read") as reader, ThreadPoolExecutor(threads, "convmae-decode") as decoders:

        def made(sample_ids: Int64s) -> Pixels:
            found = dataset.read_each(sample_ids)
            return np.stack(list(decoders.map(lambda sample: _cropped(sample, image_shape, kind), found)))

        if not groups:
            return
        ahead = reader.submit(made, groups[0])
        for following in [*groups[1:], None]:
            pixels = ahead.result()
            if following is not None:
                ahead = reader.submit(made, following)
            yield pixels


def _cropped(found: Sample | BadSample, image_shape: tuple[int, int], kind: PixelKind) -> Pixels:
    if isinstance(found, BadSample):
        raise found.error(_REMEDY)
    try:
        pixels = decode(found.data, kind.channels, kind.bits)
    except ValueError as error:
        name = f"{found.shard}/{found.member}"
        reason = f"{name} at offset {found.offset} does not decode ({error})"
        raise found.bad("undecodable", reason).error(_REMEDY) from None
    return center_crop(pixels, image_shape)
