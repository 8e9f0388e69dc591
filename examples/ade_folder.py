"""A folder of pictures and of maps of their classes, laid out as ADEChallengeData2016.

images/training/*.jpg      annotations/training/*.png      a pixel's value is its class, 255 is unlabelled
images/validation/*.jpg    annotations/validation/*.png    a map has the name of its picture
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pictures import UNLABELLED, DataError, Pixels, read_pixels, read_size

_SUFFIXES = (".jpg", ".jpeg", ".png")


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
        path = self.maps[index]
        picture, values = read_pixels(self.pictures[index], "RGB"), read_pixels(path)
        if values.ndim != 2 or values.dtype != np.uint8:
            raise DataError(str(path), "must have one byte a pixel", values.shape, "save it with mode L or P")
        # Zero less one is 255 in eight bits, but 255 itself must stay.
        labels = np.where(values == UNLABELLED, values, values - 1) if self.zero_is_unlabelled else values
        found = labels[labels != UNLABELLED]
        if found.size and found.max() >= self.classes:
            rule = f"must have values up to {self.classes - 1 + self.zero_is_unlabelled}, or 255 for unlabelled"
            remedy = "correct the map, or give --set classes=N or --set zero_is_unlabelled=false"
            raise DataError(str(path), rule, int(found.max()) + self.zero_is_unlabelled, remedy)
        return picture, labels


def open_split(root: Path, split: str, classes: int, zero_is_unlabelled: bool) -> AdeFolder:
    """Pair the pictures of a split with their maps, and compare their sizes.

    Raises:
        DataError: If a folder, a picture or a map is missing, or a map has another size than its picture.
    """
    pictures, maps = _by_stem(root / "images" / split), _by_stem(root / "annotations" / split)
    for stem in sorted(pictures.keys() ^ maps.keys()):
        has, lacks = ("picture", "map") if stem in pictures else ("map", "picture")
        rule, remedy = f"must have a {lacks} for each {has}", f"add it, or remove the {has}"
        raise DataError(f"{root} ({split})", rule, stem, remedy)
    names = sorted(pictures)
    made = AdeFolder(tuple(pictures[n] for n in names), tuple(maps[n] for n in names), classes, zero_is_unlabelled)
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(_compare, made.pictures, made.maps):
            pass
    return made


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        remedy = "lay the data out as ADEChallengeData2016, or name its parts by --train-split and --val-split"
        raise DataError("--data", "must have this folder", str(folder), remedy)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        if path.stem in found:
            raise DataError(str(folder), "must have one file of a name", path.name, f"remove {found[path.stem].name}")
        found[path.stem] = path
    if not found:
        raise DataError(str(folder), f"must have files ending in {', '.join(_SUFFIXES)}", "none", "fill the folder")
    return found


def _compare(picture: Path, labels: Path) -> None:
    (width, height), size = read_size(picture), read_size(labels)
    if size != (width, height):
        rule = f"must have the size of its picture, {width}x{height}"
        raise DataError(str(labels), rule, f"{size[0]}x{size[1]}", "make the map anew, or remove both files")
