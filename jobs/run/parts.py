"""Parts of a run's records: small files that one attempt writes, and larger ones that compaction made of them.

Object stores cannot append, so an attempt rewrites small parts; a run of months leaves thousands of them. Parts that
nobody writes any more are compacted in the background (`Parts.compact`): many become one file, and `compacted.json`,
which is replaced under a condition, says which files count and up to which part they reach. Parts up to there are
never read again, whether they are deleted by then or not. So every row is read once, wherever a compaction was killed,
and of two that work at the same time one has no effect.

Readers list the folder first and read `compacted.json` after it. What they then find gone was compacted meanwhile,
which a changed `compacted.json` says: they begin again.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import google_crc32c

from jobs.errors import RunError
from jobs.run.rows import RESTORE, Row, checked, json_lines, parsed, row_lines
from pipeline.store.storage import Storage

logger = logging.getLogger(__name__)

INDEX_NAME = "compacted.json"
FORMAT_VERSION = 1
READS_AHEAD = 4
"""Files that are fetched before they are parsed, which bounds the memory for them."""
COMPACTED_PARTS = 16
"""Settled parts that are worth a compaction: readers find fewer of them, and those that are being written."""
FILE_ROWS = 1 << 16
"""Rows from which on a compacted file is left as it is; until then the next compaction adds to it."""

Key = tuple[int, ...]
"""Order of parts: attempt, and in the history the first step."""
T = TypeVar("T", bound=Sized)


class Codec(Protocol[T]):
    """How the rows of one kind of part are held in memory, and in a compacted file."""

    @property
    def suffix(self) -> str:
        """Of compacted files."""

    def of_lines(self, data: bytes, url: str) -> T:
        """The rows of a part.

        Raises:
            RunError: It is damaged; names `url`.
        """

    def of_compacted(self, data: bytes, rows: int, url: str) -> T:
        """The rows of a compacted file, whose number is given; raises as `of_lines`."""

    def compacted(self, parts: Sequence[T]) -> bytes:
        """A compacted file with the rows of all."""


@dataclass(frozen=True)
class RowCodec:
    """Parts of events, or of a quarantine, as lists of checked rows."""

    kind: str
    suffix: str = ".jsonl"

    def of_lines(self, data: bytes, url: str) -> list[Row]:
        """Of JSON lines."""
        return [checked(self.kind, row, url) for row in row_lines(data, url)]

    def of_compacted(self, data: bytes, rows: int, url: str) -> list[Row]:
        """The same."""
        found = self.of_lines(data, url)
        if len(found) != rows:
            raise RunError("run directory", f"must have the {rows:,} rows that {INDEX_NAME} gives", url, RESTORE)
        return found

    def compacted(self, parts: Sequence[list[Row]]) -> bytes:
        """As JSON lines."""
        return json_lines(row for part in parts for row in part)


@dataclass(frozen=True)
class CompactedFile:
    """One compacted file."""

    name: str
    last: Key
    """Its last part; its first is the one after the last of the file before."""
    rows: int
    bytes: int
    crc32c: int


Source = str | CompactedFile
"""A part, by its name, or a compacted file."""


def _name(source: Source) -> str:
    return source if isinstance(source, str) else source.name


@dataclass(frozen=True)
class Index:
    """What is compacted: the content of `compacted.json`."""

    version: int = 0
    """Rises with each compaction."""
    files: tuple[CompactedFile, ...] = ()

    @property
    def last(self) -> Key:
        """The last part that is compacted."""
        return self.files[-1].last if self.files else ()

    @classmethod
    def of(cls, data: bytes, url: str) -> Index:
        """Parse it.

        Raises:
            RunError: It is damaged, or of a newer release.
        """
        row = checked("compacted", parsed(data, url), url)
        if row["format_version"] != FORMAT_VERSION:
            remedy = "read it with the release that wrote it, or a newer one"
            raise RunError("format_version", f"must be {FORMAT_VERSION} in {url}", row["format_version"], remedy)
        files = (CompactedFile(**{**file, "last": tuple(file["last"])}) for file in row["files"])
        return cls(row["version"], tuple(files))

    def to_bytes(self) -> bytes:
        """As it is written."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Parts(Generic[T]):
    """The parts of one kind of record. Holds no state; every method reads or writes storage."""

    storage: Storage
    url: str
    """Of their folder."""
    pattern: re.Pattern[str]
    """Of their names; other files in the folder are not this program's."""
    codec: Codec[T]

    def read(self) -> list[T]:
        """The rows of all parts and compacted files, in order; each row once.

        Raises:
            RunError: One is damaged or missing; names it.
        """
        while True:
            names, data, index = self._look()
            found = list(self._read_all([*index.files, *self._loose(names, index)]))
            if all(part is not None for part in found) or self._is_index(data):
                self._refuse_missing(index, found)
                return [part for part in found if part is not None]

    def followed(self, known: Mapping[str, T]) -> dict[str, T]:
        """The rows of each file by its name, in order, for who reads again and again.

        Args:
            known: Of files that were read before and are final: all but the newest. They are not read again.

        Raises:
            RunError: As `read`.
        """
        while True:
            names, data, index = self._look()
            sources: list[Source] = [*index.files, *self._loose(names, index)]
            new = [source for source in sources if _name(source) not in known]
            read = dict(zip(map(_name, new), self._read_all(new), strict=True))
            found = {name: known[name] if name in known else read[name] for name in map(_name, sources)}
            if all(part is not None for part in found.values()) or self._is_index(data):
                self._refuse_missing(index, list(found.values()))
                return {name: part for name, part in found.items() if part is not None}

    def newest(self, rows: int) -> list[T]:
        """The newest files with at least that many rows, in order: as few as are needed.

        Raises:
            RunError: As `read`.
        """
        names, _, index = self._look()
        found: list[T] = []
        sources: list[Source] = [*index.files, *self._loose(names, index)]
        for source in reversed(sources):
            if (part := self._read(source)) is None:
                return self.read()
            found.insert(0, part)
            if sum(map(len, found)) >= rows:
                break
        return found

    def last_key(self) -> Key:
        """The newest part; empty where there is none."""
        names, _, index = self._look()
        return max([index.last, *map(self._key, names)])

    def compact(self, settled: Key, is_ours: Callable[[], bool]) -> bool:
        """Compact parts once, if there are enough; returns whether it did.

        May be killed anywhere, and run anywhere else at the same time: readers see each row once.

        Args:
            settled: Parts before this one will never be written again.
            is_ours: Whether the run is still that of the caller's driver; asked before anything takes effect.

        Raises:
            RunError: A part is damaged; nothing is compacted.
        """
        every = self.storage.list_names(self.url)
        names, data, index = self._look(every)
        self._delete(name for name in names if self._key(name) <= index.last)  # left by a compaction that was killed
        due = [name for name in self._loose(names, index) if self._key(name) < settled]
        if len(due) < COMPACTED_PARTS:
            return False
        base = [file for file in index.files[-1:] if file.rows < FILE_ROWS]
        parts, rows = [self._read(file) for file in base], sum(file.rows for file in base)
        taken: list[str] = []
        for name in due:
            parts.append(part := self._read(name))
            taken.append(name)
            if (rows := rows + len(part or ())) >= FILE_ROWS:
                break
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            return False  # another driver compacts, too; what it has made is seen next time
        version, content = index.version + 1, self.codec.compacted(whole)
        name = f"compacted-{version:06d}-{secrets.token_hex(4)}{self.codec.suffix}"
        made = CompactedFile(name, self._key(taken[-1]), rows, len(content), google_crc32c.value(content))
        self.storage.write(self._path(name), content)
        kept = index.files[: len(index.files) - len(base)]
        if not (is_ours() and self._replace_index(data, Index(version, (*kept, made)))):
            self._delete([name])
            return False
        # A file of another compaction may be there; it is of this index or an older one, and can take effect no more.
        others = {name for name in every if name.startswith("compacted-")} - {file.name for file in kept}
        self._delete([*taken, *(others | {file.name for file in base})])
        return True

    def _look(self, every: Sequence[str] | None = None) -> tuple[list[str], bytes | None, Index]:
        """Names of the parts in order, and what is compacted: as bytes too, None where nothing is."""
        listed = self.storage.list_names(self.url) if every is None else every
        names = sorted(filter(self.pattern.fullmatch, listed), key=self._key)
        data = self._index_data() if INDEX_NAME in listed else None
        return names, data, Index() if data is None else Index.of(data, self._path(INDEX_NAME))

    def _loose(self, names: Sequence[str], index: Index) -> list[str]:
        return [name for name in names if self._key(name) > index.last]

    def _read_all(self, sources: Sequence[Source]) -> Iterator[T | None]:
        """The rows of each in order, as `_read`; fetched some ahead, and parsed here: parsing takes one core anyway."""
        with ThreadPoolExecutor(READS_AHEAD) as threads:
            ahead: deque[Future[bytes | None]] = deque()
            for number, source in enumerate(sources):
                wanted = sources[number + len(ahead) : number + READS_AHEAD]
                ahead.extend([threads.submit(self._fetch, each) for each in wanted])
                yield self._parse(source, ahead.popleft().result())

    def _read(self, source: Source) -> T | None:
        """The rows of a part or a compacted file; None where it is gone."""
        return self._parse(source, self._fetch(source))

    def _fetch(self, source: Source) -> bytes | None:
        try:
            return self.storage.read(self._path(_name(source)))
        except FileNotFoundError:
            return None

    def _parse(self, source: Source, data: bytes | None) -> T | None:
        if data is None:
            return None
        url = self._path(_name(source))
        if isinstance(source, str):
            return self.codec.of_lines(data, url)
        if len(data) != source.bytes or google_crc32c.value(data) != source.crc32c:
            rule = f"must be of {source.bytes:,} bytes with the CRC32C that {INDEX_NAME} gives"
            raise RunError("run directory", rule, url, RESTORE)
        return self.codec.of_compacted(data, source.rows, url)

    def _refuse_missing(self, index: Index, found: Sequence[T | None]) -> None:
        """Refuse that a compacted file is gone. A part may be: object stores list deleted names for a while."""
        for file, rows in zip(index.files, found, strict=False):
            if rows is None:
                raise RunError(
                    "run directory", f"must exist, since {INDEX_NAME} names it", self._path(file.name), RESTORE
                )

    def _index_data(self) -> bytes | None:
        try:
            return self.storage.read(self._path(INDEX_NAME))
        except FileNotFoundError:
            return None

    def _is_index(self, data: bytes | None) -> bool:
        return self._index_data() == data

    def _replace_index(self, before: bytes | None, index: Index) -> bool:
        url = self._path(INDEX_NAME)
        if before is None:
            return self.storage.create(url, index.to_bytes())
        return self.storage.replace(url, index.to_bytes(), before)

    def _delete(self, names: Iterable[str]) -> None:
        self.storage.delete_all([self._path(name) for name in names])

    def _path(self, name: str) -> str:
        return self.storage.join(self.url, name)

    @staticmethod
    def _key(name: str) -> Key:
        return tuple(int(number) for number in re.findall(r"\d+", name))
