"""A folder of pictures and of maps of their classes, laid out as ADEChallengeData2016.

images/training/*.jpg      annotations/training/*.png      a pixel's value is its class, 255 is unlabelled
images/validation/*.jpg    annotations/validation/*.png    a map has the name of its picture
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError

UNLABELLED = 255
_SUFFIXES = (".jpg", ".jpeg", ".png")

Pixels = npt.NDArray[np.uint8]


class DataError(UserError):
    """A folder of pictures and annotations that cannot be trained on."""


@dataclass(frozen=True)
class AdeFolder:
    """Pictures and class maps of one split, by name; made by `open_split`."""

    pictures: tuple[Path, ...]
    maps: tuple[Path, ...]
    classes: int
    zero_is_unlabelled: bool

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int) -> tuple[Pixels, Pixels]:
        """(H, W, 3) picture and (H, W) classes from 0, or `UNLABELLED`.

        Raises:
            DataError: If a file cannot be read, or a pixel has a class that the schedule does not count.
        """
        picture = np.asarray(_opened(self.pictures[index]).convert("RGB"))
        values = np.asarray(_opened(self.maps[index]))
        if values.ndim != 2 or values.dtype != np.uint8:
            raise DataError(
                str(self.maps[index]), "must have one byte a pixel", values.shape, "save it with mode L or P"
            )
        labels = np.where(values == 0, UNLABELLED, values - 1).astype(np.uint8) if self.zero_is_unlabelled else values
        found = labels[labels != UNLABELLED]
        if found.size and found.max() >= self.classes:
            most = self.classes - 1 + self.zero_is_unlabelled
            remedy = "correct the map, or give --set classes=N or --set zero_is_unlabelled=false"
            raise DataError(
                str(self.maps[index]),
                f"must have values up to {most}, or 255",
                int(values[labels != 255].max()),
                remedy,
            )
        return picture, labels


def open_split(root: Path, split: str, classes: int, zero_is_unlabelled: bool) -> AdeFolder:
    """Pair the pictures of a split with their maps, and compare their sizes.

    Raises:
        DataError: If a folder, a picture or a map is missing, or a map has another size than its picture.
    """
    pictures, maps = _by_stem(root / "images" / split), _by_stem(root / "annotations" / split)
    for stem in sorted(pictures.keys() ^ maps.keys()):
        has, lacks = ("a picture", "map") if stem in pictures else ("a map", "picture")
        raise DataError(f"{root} ({split})", f"needs a {lacks} for each", stem, f"add it, or remove {has} of that name")
    names = sorted(pictures)
    made = AdeFolder(tuple(pictures[n] for n in names), tuple(maps[n] for n in names), classes, zero_is_unlabelled)
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(_compare, made.pictures, made.maps):
            pass
    return made


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        remedy = "lay the data out as ADEChallengeData2016: images/SPLIT and annotations/SPLIT"
        raise DataError("--data", "must have this folder", str(folder), remedy)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        if path.stem in found:
            raise DataError(
                str(folder), "must have one file of a name", path.name, f"remove it or {found[path.stem].name}"
            )
        found[path.stem] = path
    if not found:
        raise DataError(str(folder), f"must have files ending in {', '.join(_SUFFIXES)}", "none", "fill the folder")
    return found


def _compare(picture: Path, labels: Path) -> None:
    with _opened(picture) as first, _opened(labels) as second:
        if first.size != second.size:
            rule = f"must have the size of its picture, {first.width}x{first.height}"
            raise DataError(
                str(labels), rule, f"{second.width}x{second.height}", "make the map anew, or remove both files"
            )


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(str(path), "must be a picture", type(error).__name__, "replace the file") from None
