"""Samples of a tar made elsewhere, in WebDataset's terms: images by key, with the labels that lie beside them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.errors import clipped
from pipeline.image.photo import CorruptImage
from pipeline.shard.index import LARGEST_IMAGE_BYTES, Skipped
from pipeline.shard.tar_scan import RangedFile, TarFault, TarMember, scan_tar
from pipeline.store.json_text import parsed_json

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif"),
    *("jpe", "jif", "pjpeg", "pjp", "apng"),
)
"""In lower case. Where a sample of a tar has several images, the first of these is the one."""
TEXT_EXTENSIONS = frozenset(
    {"json", "jsonl", "txt", "text", "caption", "cls", "label", "id", "index", "csv", "tsv", "xml", "yaml", "yml"}
    | {"md", "html"}
)
"""Of members that describe an image; alone they are no image that was lost."""
LABEL_FIELDS = ("cls", "label", "class_id")
"""Of a sample's .json; the first that is an integer counts."""
LARGEST_LABEL_BYTES = 1 << 20
MOST_SKIPPED = 100_000
"""Of one tar's images; a tar with more is given up, before their list fills the memory."""

_UNREAD = re.compile("names with (.+) are not read as images", re.DOTALL)
_MOST_KINDS = 20
_NO_EXTENSION = "no extension"
_LABEL_DIGITS = 19  # of 2**63 - 1
_META = re.compile(r"__[^/]*__($|/)")  # webdataset skips these too


class Measured(NamedTuple):
    """Figures of an image's bytes that an index keeps."""

    crc: int
    height: int
    width: int


class TarImage(NamedTuple):
    """An image of a sample."""

    key: str
    extension: str
    """What follows the key and a dot in the member's name, as it is written there."""
    offset: int
    """Byte in the tar at which the image begins."""
    length: int
    label: int | None
    measured: Measured | None

    @property
    def member(self) -> str:
        """The member's name."""
        return f"{self.key}.{self.extension}"


@dataclass
class TarContents:
    """The contents of one tar, after one pass."""

    images: list[TarImage] = field(default_factory=list)
    """In the tar's order."""
    skipped: list[Skipped] = field(default_factory=list)
    """Images that cannot be used, and samples that have none that is read."""
    faults: list[TarFault] = field(default_factory=list)
    bad_labels: int = 0
    """Labels that are not integers from 0 up; their images have none."""


def read_samples(file: RangedFile, *, salvage: bool, measure: Callable[[bytes], Measured] | None = None) -> TarContents:
    """Find the samples of a tar in one pass, whatever the order of a sample's members.

    A sample's key is its members' name up to the first dot of the last part, as for webdataset. Its image is the member
    `<key>.jpg`, else `<key>.jpeg` and so on; where it has none of these, each `<key>.<more>.jpg` is a sample of its
    own. Its label is the integer in `<key>.cls`; where there is no such member, one in `<key>.json`. Other members
    are ignored; a sample that has some besides texts, and no image, is skipped and named.

    Args:
        file: The tar. Holding its rows takes about 500 bytes an image.
        salvage: Continue after a damaged place; else the contents end there.
        measure: Called with the bytes of every image; raises CorruptImage for what cannot be used. Without it, images
            are not read.
    """
    collector = _Collector(file, measure)
    for item in scan_tar(file, salvage=salvage):
        if isinstance(item, TarFault):
            collector.contents.faults.append(item)
        elif not _is_ignored(item.name):
            collector.take(item)
            if len(collector.contents.skipped) > MOST_SKIPPED:
                what = f"more than {MOST_SKIPPED} of its images cannot be used; the rest was not looked at"
                collector.contents.faults.append(TarFault(item.offset, what))
                break
    collector.contents.images = _labelled(_chosen(collector.images), collector.labels)
    collector.contents.skipped += collector.without_image()
    return collector.contents


def unread_kinds(skipped: Iterable[Skipped]) -> str:
    """A summary of what was skipped because no image has its extension: how many, and which; empty for none."""
    kinds = Counter(found[1] for item in skipped if (found := _UNREAD.fullmatch(item.reason)))
    if not kinds:
        return ""
    shown = [f"{kind} {count}" for kind, count in kinds.most_common(_MOST_KINDS)]
    more = [f"and {len(kinds) - _MOST_KINDS} more kinds"] if len(kinds) > _MOST_KINDS else []
    return f"{kinds.total()} samples have no image that is read ({', '.join(shown + more)})"


def _is_ignored(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or _META.match(name) is not None


def _is_label(extension: str, known: bool) -> bool:
    """A .cls outranks a .json, whichever comes first."""
    return extension == "cls" or (extension == "json" and not known)


class _Collector:
    """Images and labels of one tar, as they are met."""

    def __init__(self, file: RangedFile, measure: Callable[[bytes], Measured] | None) -> None:
        self.contents = TarContents()
        self.images: dict[str, TarImage] = {}
        """By the member's name."""
        self.labels: dict[str, int | None] = {}
        """By the member's name without its last extension; None where a .cls is no label."""
        self._seen: set[str] = set()
        """Keys of samples whose images cannot be used."""
        self._others: dict[str, tuple[str, int]] = {}
        """By key, the first member that is neither image nor text: what follows the key, where its content begins."""
        self._file = file
        self._measure = measure

    def take(self, member: TarMember) -> None:
        key = sample_key(member.name)
        stem, _, extension = member.name.rpartition(".") if member.name != key else (key, "", "")
        if extension.lower() in IMAGE_EXTENSIONS:
            self._take_image(member, key)
        elif extension.lower() not in TEXT_EXTENSIONS and len(self._others) <= MOST_SKIPPED:
            self._others.setdefault(key, (member.name[len(key) + 1 :], member.data_offset))
        elif not _is_label(extension, stem in self.labels):
            return
        elif not member.obstacle and member.size <= LARGEST_LABEL_BYTES:
            self._take_label(stem, extension, self._content(member))

    def _content(self, member: TarMember) -> bytes:
        self._file.seek(member.data_offset)
        return self._file.read(member.size)

    def without_image(self) -> list[Skipped]:
        """Samples of which nothing was read, though they hold more than texts."""
        found = self._seen | {image.key for image in self.images.values()}
        return [
            Skipped(
                f"{clipped(f'{key}.{extension}' if extension else key)} at byte {offset}",
                f"names with {f'.{clipped(extension)}' if extension else _NO_EXTENSION} are not read as images",
            )
            for key, (extension, offset) in self._others.items()
            if key not in found
        ]

    def _take_image(self, member: TarMember, key: str) -> None:
        try:
            if member.name in self.images:
                raise CorruptImage("its name was used before in this tar")
            if member.obstacle:
                raise CorruptImage(member.obstacle)
            if member.size > LARGEST_IMAGE_BYTES:
                raise CorruptImage(f"{member.size} bytes are more than {LARGEST_IMAGE_BYTES}")
            measured = self._measure(self._content(member)) if self._measure else None
        except CorruptImage as error:
            path = f"{clipped(member.name)} at byte {member.data_offset}"
            self.contents.skipped.append(Skipped(path, str(error)))
            self._seen.add(key)
            return
        extension = member.name[len(key) + 1 :]
        self.images[member.name] = TarImage(key, extension, member.data_offset, member.size, None, measured)

    def _take_label(self, stem: str, kind: str, data: bytes) -> None:
        try:
            value = cls_label(data) if kind == "cls" else _json_label(data)
        except ValueError:
            value = -1
        if value is not None and not 0 <= value < 2**63:
            self.contents.bad_labels += 1
            value = None
        if kind == "cls" or value is not None:
            self.labels[stem] = value


def cls_label(data: bytes) -> int:
    """The label in a .cls: decimal digits, with blanks around them or without.

    Raises:
        ValueError: It is anything else; also what Python alone takes for a number, like 1_0 or +5.
    """
    digits = data.strip()
    if not digits.isdigit() or len(digits) > _LABEL_DIGITS:
        raise ValueError("no label")
    return int(digits)


def _json_label(data: bytes) -> int | None:
    fields = parsed_json(data)
    values = [fields.get(name) for name in LABEL_FIELDS] if isinstance(fields, dict) else []
    integers = [value for value in values if type(value) is int]
    if not integers and any(isinstance(value, float) for value in values):
        raise ValueError("no label")  # as 1.0 in a .cls; text under these names is often none
    return next(iter(integers), None)


def _chosen(found: dict[str, TarImage]) -> list[TarImage]:
    """One image a sample where it has one of the plain extensions, else all that it has."""
    samples: defaultdict[str, list[TarImage]] = defaultdict(list)
    for image in found.values():
        samples[image.key].append(image)
    chosen = []
    for images in samples.values():
        plain = [image for image in images if image.extension.lower() in IMAGE_EXTENSIONS]
        chosen += [min(plain, key=_preference)] if plain else images
    return sorted(chosen, key=lambda image: image.offset)


def _preference(image: TarImage) -> int:
    return IMAGE_EXTENSIONS.index(image.extension.lower())


def _labelled(images: list[TarImage], labels: dict[str, int | None]) -> list[TarImage]:
    """`a.left.cls` is the label of `a.left.jpg`, `a.cls` that of all images of `a`."""
    found = ((image, labels.get(image.member.rpartition(".")[0], labels.get(image.key))) for image in images)
    return [image if label is None else image._replace(label=label) for image, label in found]


def sample_key(name: str) -> str:
    """A member's name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
