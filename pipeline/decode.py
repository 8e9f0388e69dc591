"""JPEG bytes to pixels, and pixels to the size that the model wants; the hot calls release the GIL."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

Pixels = npt.NDArray[np.uint8]

KEPT_COLOURSPACES = frozenset({"YCbCr", "Gray", "RGB"})
"""What libjpeg-turbo converts to RGB by itself; CMYK and YCCK need a colour conversion at ingest."""


def decode(data: bytes) -> Pixels:
    """(H, W, 3) RGB pixels of a JPEG.

    Raises:
        ValueError: The bytes are no JPEG, or a damaged one; nothing is patched up with grey.
    """
    pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return pixels


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """(3, height, width) bicubic, antialiased; within rounding of PIL's BICUBIC.

    Args:
        pixels: (H, W, 3); a view of a crop is fine.
        height: Of the result.
        width: Of the result.
    """
    # A channels-last view: torch has a uint8 kernel for it that resizes interleaved pixels in place.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    result: Pixels = resized[0].numpy()
    return result
