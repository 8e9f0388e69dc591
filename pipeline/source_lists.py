"""Images listed in a text file: one path or URL a line, with a label behind it or without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.errors import SourceError, StorageError, clipped
from pipeline.source import IMAGE_SUFFIXES, Source, Sources, parted, suffix, within
from pipeline.source_reader import HASTY_SECONDS
from pipeline.storage import Storage, is_web

ASKING_THREADS = 32
LARGEST_LABEL = 2**63 - 1

_SPACED_LABEL = re.compile(r"(.*\S)\s+([0-9]+)")


def listed_sources(storage: Storage, url: str) -> Sources:
    r"""Read a list of images.

    A line is ``PATH``, ``PATH<TAB>LABEL`` or ``PATH LABEL``. The label behind a tab is an integer or a class name, that
    behind spaces an integer. Relative paths are relative to the list's folder. Empty lines and those that begin with
    ``#`` do not count. Where every label is an integer they are kept as they are; else they are class names, and a
    label is a name's place among the sorted names.

    Raises:
        SourceError: It is no text, is CSV or JSON, lists nothing, or has a label that is too large.
    """
    try:
        lines = storage.read(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        remedy = "give a folder, a .tar, or a list with one path or URL a line"
        raise SourceError("source", "must be a folder, a tar, or a text file", url, remedy) from error
    if lines and lines[0].lstrip().startswith("<"):
        remedy = "web servers have no folders; name the tars with a pattern like 00{000..123}.tar, or give a list"
        raise SourceError("source", "must be a list, not a web page", url, remedy)
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if foreign := next(filter(_is_tabular, lines), None):
        remedy = "write one path or URL a line; a label goes behind it, after a tab"
        raise SourceError("source", "must be a list of lines, not CSV or JSON", foreign[:80], remedy)
    rows = [_row(line) for line in lines]
    if not rows:
        raise SourceError("source", "must list at least one image", url, "write one path or URL a line")
    classes, labels = _numbered([label for _, label in rows])
    images = tuple(Source(path, None, label) for (path, _), label in zip(rows, labels, strict=True))
    return Sources(parted(url)[0], classes, images)


def sized(storage: Storage, sources: Sources) -> Sources:
    """Ask for the sizes that are not known; what is gone, or a web server does not tell, has none."""
    hasty = replace(storage, retry_seconds=min(HASTY_SECONDS, storage.retry_seconds))

    def asked(source: Source) -> Source:
        if source.size_bytes is not None:
            return source
        url = within(sources.root, source.path)
        try:
            return replace(source, size_bytes=(hasty if is_web(url) else storage).size(url))
        except (OSError, StorageError) as error:
            if not is_web(url) and not isinstance(error, FileNotFoundError):
                raise
            return replace(source, size_bytes=0)  # whether it can be read shows when it is

    with ThreadPoolExecutor(ASKING_THREADS) as threads:
        return replace(sources, images=tuple(threads.map(asked, sources.images)))


def _is_tabular(line: str) -> bool:
    """Whether it is a row of CSV or JSON, which would otherwise be taken for the name of a file that is not there."""
    if line.lstrip().startswith(('{"', '["')):
        return True
    path, comma, rest = (part.strip().strip('"') for part in line.partition(","))
    if not comma or suffix(path) not in IMAGE_SUFFIXES or suffix(rest) in IMAGE_SUFFIXES:
        return False
    return "://" not in path or rest.isdecimal()  # some image servers take their options behind a comma


def _row(line: str) -> tuple[str, str | None]:
    path, tab, label = line.rstrip("\r\n").partition("\t")
    if tab and label.strip():
        return path.strip(), label.strip()
    spaced = _SPACED_LABEL.fullmatch(path.strip())
    return (spaced[1], spaced[2]) if spaced else (path.strip(), None)


def _numbered(labels: Sequence[str | None]) -> tuple[tuple[str, ...], list[int | None]]:
    given = {label for label in labels if label is not None}
    if all(label.isascii() and label.isdigit() for label in given):
        if huge := [label for label in given if _is_huge(label)]:
            value = clipped(min(huge))
            raise SourceError("label", f"must be at most {LARGEST_LABEL}", value, "number the classes from 0")
        return (), [None if label is None else int(label) for label in labels]
    classes = tuple(sorted(given))
    places = {name: place for place, name in enumerate(classes)}
    return classes, [None if label is None else places[label] for label in labels]


def _is_huge(digits: str) -> bool:
    """Whether no index holds that label; Python itself refuses to read more than 4,300 digits."""
    return len(digits) > len(str(LARGEST_LABEL)) or int(digits) > LARGEST_LABEL
