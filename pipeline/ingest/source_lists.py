"""Images listed in a text file: one path or URL a line, with or without a label after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from pipeline.access.places import Given
from pipeline.access.urls import is_web
from pipeline.errors import SourceError, StorageError, clipped
from pipeline.ingest.source import IMAGE_SUFFIXES, Source, Sources, address, parted, suffix
from pipeline.ingest.source_reader import HASTY_SECONDS
from pipeline.store.storage import Storage

ASKING_THREADS = 32
LARGEST_LABEL = 2**63 - 1

_SPACED_LABEL = re.compile(r"(.*[^ \t])[ \t]+([0-9]+)", re.DOTALL)
_BLANK = " \t"
"""What may stand around a path or a label. Other kinds of white space are part of names."""
_HEADINGS = re.compile(r"(?:image|img|file)?[_ ]?(?:path|name)s?|files?|images?|img|urls?", re.IGNORECASE)
"""What tools write above a column of paths; a file of that name is listed as ./NAME."""
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


class _Row(NamedTuple):
    number: int
    """Of the line, from 1."""
    path: str
    label: str | None


def listed_sources(storage: Storage, url: str) -> Sources:
    r"""Read a list of images.

    A line ends at ``\n`` or ``\r\n``, and is ``PATH``, ``PATH<TAB>LABEL`` or ``PATH LABEL``. The label after a tab is
    an integer or a class name, that after spaces an integer. Relative paths are relative to the list's folder. Empty
    lines and those that begin with ``#`` do not count. Where all labels are integers they are kept as they are; where
    all are names, a label is a name's place among the sorted names.

    Raises:
        SourceError: It is no text, is CSV or JSON, lists nothing, or has a line that cannot be meant; names the line.
    """
    rows = [_row(number, line) for number, line in _lines(storage, url) if line.strip(_BLANK) and line[0] != "#"]
    if not rows:
        remedy = "write one path or URL a line; a name that begins with # is written ./#NAME"
        raise SourceError("source", "must list at least one image", url, remedy)
    folder = parted(url)[0] or "/"
    _refuse_heading(rows[0])
    for row in rows:
        _refuse_odd_path(row, folder)
    classes, labels = _numbered(rows)
    images = tuple(Source(Given(row.path), None, label) for row, label in zip(rows, labels, strict=True))
    return Sources(folder, classes, images)


def sized(storage: Storage, sources: Sources) -> Sources:
    """Ask for the sizes that are not known; what is gone, or a web server does not report, has none."""
    hasty = replace(storage, retry_seconds=min(HASTY_SECONDS, storage.retry_seconds))

    def asked(source: Source) -> Source:
        if source.size_bytes is not None:
            return source
        url = source.path.url(sources.root)
        try:
            return replace(source, size_bytes=(hasty if is_web(url) else storage).size(url))
        except (OSError, StorageError) as error:
            if not is_web(url) and not isinstance(error, FileNotFoundError):
                raise
            return replace(source, size_bytes=0)  # whether it can be read shows when it is

    with ThreadPoolExecutor(ASKING_THREADS) as threads:
        return replace(sources, images=tuple(threads.map(asked, sources.images)))


def _lines(storage: Storage, url: str) -> Iterable[tuple[int, str]]:
    """The lines with their numbers; `str.splitlines` would also cut at what is part of names."""
    data = storage.read(url)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = data.count(b"\n", 0, error.start) + 1
        remedy = "give a folder, a .tar, or a list with one path or URL a line; `iconv` writes text of others as UTF-8"
        rule = f"must be a folder, a tar, or a text file in UTF-8 (line {place} is none)"
        raise SourceError("source", rule, url, remedy) from error
    if text.lstrip().startswith("<"):
        remedy = "web servers have no folders; name the tars with a pattern like 00{000..123}.tar, or give a list"
        raise SourceError("source", "must be a list, not a web page", url, remedy)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            remedy = r"rewrite it with \n, as `tr '\r' '\n'` does"
            raise SourceError(f"line {number}", r"must end in \n or \r\n, and hold no other \r", clipped(line), remedy)
        if "\0" in line:
            raise SourceError(f"line {number}", "must hold no NUL", clipped(line), "give a list in UTF-8")
    return enumerate(lines, 1)


def _row(number: int, line: str) -> _Row:
    if _is_tabular(line):
        remedy = "write one path or URL a line; a label goes behind it, after a tab"
        raise SourceError(f"line {number}", "must be a path or URL, not CSV or JSON", clipped(line), remedy)
    path, tab, label = line.partition("\t")
    if "\t" in label.strip(_BLANK):
        remedy = "write PATH<TAB>LABEL"
        raise SourceError(f"line {number}", "must have a path and one label", clipped(line), remedy)
    if not path.strip(_BLANK):
        raise SourceError(f"line {number}", "must begin with a path or URL", clipped(line), "write PATH<TAB>LABEL")
    path, label = path.strip(_BLANK), label.strip(_BLANK)
    if tab and label:
        return _Row(number, path, label)
    spaced = _SPACED_LABEL.fullmatch(path)
    return _Row(number, spaced[1], spaced[2]) if spaced else _Row(number, path, None)


def _is_tabular(line: str) -> bool:
    """Whether it is a row of CSV or JSON, which would otherwise be taken for the name of a file that is not there."""
    first = line.lstrip(_BLANK)
    if first.startswith(('{"', '["')) or re.match(r'"[^"]*"[ \t]*([,;\t]|$)', first):
        return True
    path, comma, rest = (part.strip().strip('"') for part in line.partition(","))
    if not comma or suffix(address(path)) not in IMAGE_SUFFIXES or suffix(address(rest)) in IMAGE_SUFFIXES:
        return False
    return "://" not in path or rest.isdecimal()  # some image servers take their options behind a comma


def _refuse_heading(row: _Row) -> None:
    if _HEADINGS.fullmatch(row.path):
        remedy = f"remove the line, or write ./{row.path} if a file has that name"
        raise SourceError(f"line {row.number}", "must be of an image, and not name the columns", row.path, remedy)


def _refuse_odd_path(row: _Row, folder: str) -> None:
    """Refuse paths that no file can have, and those that lead from a store to this machine."""
    where = f"line {row.number}"
    if row.path.endswith("/"):
        raise SourceError(where, "must name a file, not a folder", clipped(row.path), "list the images in it")
    if _WINDOWS.match(row.path):
        remedy = "write it as this machine names it, like /mnt/c/photos/a.jpg"
        raise SourceError(where, "must be a path of Linux or a URL", clipped(row.path), remedy)
    try:
        Given(row.path).url(folder)
    except StorageError as error:
        raise SourceError(where, error.rule, clipped(str(error.value)), error.remedy) from None


def _numbered(rows: Sequence[_Row]) -> tuple[tuple[str, ...], list[int | None]]:
    """Classes and labels: integers as they are, or names by their places among the sorted names."""
    given = {row.label: row for row in reversed(rows) if row.label is not None}  # each with its first line
    integers = {label: row for label, row in given.items() if label.isascii() and label.isdigit()}
    names = [row for label, row in given.items() if label not in integers]
    for row in sorted(names):
        _refuse_number(row)
    if names and integers:
        name, integer = min(names), min(integers.values())
        rule = f"must be an integer as in line {integer.number}, or all labels must be names"
        remedy = "write only integers, or only names: integers among names would be sorted as text"
        raise SourceError(f"label in line {name.number}", rule, clipped(str(name.label)), remedy)
    if names:
        classes = tuple(sorted(given))
        places = {name: place for place, name in enumerate(classes)}
        return classes, [None if row.label is None else places[row.label] for row in rows]
    for label, row in integers.items():
        if _is_huge(label):
            rule = f"must be at most {LARGEST_LABEL}"
            raise SourceError(f"label in line {row.number}", rule, clipped(label), "number the classes from 0")
    return (), [None if row.label is None else int(row.label) for row in rows]


def _refuse_number(row: _Row) -> None:
    """Refuse a name that is a number, but no integer of at least 0: it was meant as a number."""
    label = row.label or ""
    try:
        float(label)
    except ValueError:
        return
    if any(character.isdigit() for character in label):
        rule, remedy = (
            "must be an integer of at least 0, or a name",
            "write 3, not +3 or 3.0; omit the label of what has none",
        )
        raise SourceError(f"label in line {row.number}", rule, clipped(label), remedy)


def _is_huge(digits: str) -> bool:
    """Whether no index holds that label; Python itself refuses to read more than 4,300 digits."""
    return len(digits) > len(str(LARGEST_LABEL)) or int(digits) > LARGEST_LABEL
