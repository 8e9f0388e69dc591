"""Pictures of a data set as arrays, and the error for data that cannot be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError

UNLABELLED = 255
"""Of a pixel without a class."""

Pixels = npt.NDArray[np.uint8]


class DataError(UserError):
    """A folder of pictures and annotations that cannot be trained on."""


def read_pixels(path: Path, mode: str | None = None) -> Pixels:
    """All pixels of a file, as they are stored: a turn in its metadata is not done, since annotations count these.

    Args:
        path: Of a picture.
        mode: To which PIL converts it, such as RGB; as it is where None.

    Raises:
        DataError: If the file is missing, cut off or no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image if mode is None else image.convert(mode))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _no_picture(path, error) from None


def read_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone.

    Raises:
        DataError: As `read_pixels`.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _no_picture(path, error) from None


def _no_picture(path: Path, error: Exception) -> DataError:
    return DataError(str(path), "must be a whole picture", f"{type(error).__name__}: {error}", "replace the file")
