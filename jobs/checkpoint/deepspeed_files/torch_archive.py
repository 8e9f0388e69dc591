"""Files of `torch.save`, read by ranges: what a file holds, and where the bytes of each tensor lie.

Such a file is a zip archive of stored (not compressed) records: `data.pkl` has the objects, `data/<key>` the bytes of
each storage. Nothing is executed: the pickle's tensors become `LazyTensor`s, plain containers themselves, and whatever
else it names, DeepSpeed's classes for example, an inert `Opaque`. That is stricter than `weights_only`, which refuses
such files. Neither torch nor DeepSpeed is imported: a process that only copies bytes needs a fifth of their memory.

The file is not trusted either: what its directory or its pickle asks for is compared with the file's size first, and
any error in a pickle is damage.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.checkpoint.tensor_ranges import ITEM_BYTES, ByteRange, damaged
from pipeline.errors import UserError, clipped

_BUFFER_BYTES = 1 << 16
_LOCAL_HEADER_BYTES = 30
LARGEST_PICKLE_BYTES = 8 << 20
"""Of the objects without the tensors' bytes: 48 KB for ConvMAE-Base. One byte can become an object of a hundred."""
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
"""Opcodes that name a place in the unpickler's memo."""

STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
"""torch's storage classes, and the dtypes by which safetensors knows their elements."""


class Files(Protocol):
    """Where archives lie: a `Storage`, or a wrapper that checks its bytes."""

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        """As `Storage.read_range`; may return fewer bytes before the file's end, though at least one."""


@dataclass(frozen=True)
class Record:
    """One storage's bytes in a file."""

    url: str
    name: str
    offset: int
    """Of the first byte in the file."""
    bytes: int


@dataclass(frozen=True)
class TensorPlace:
    """The place of a contiguous tensor in a file."""

    record: Record
    dtype: str
    """As in safetensors, for example `F32`."""
    shape: tuple[int, ...]
    first: int
    """Its first element within the record."""

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    @property
    def byte_range(self) -> ByteRange:
        """Its bytes in the file."""
        item = ITEM_BYTES[self.dtype]
        return ByteRange(self.record.url, self.record.offset + self.first * item, self.elements * item)


class Opaque:
    """Stand-in for an object of a class that is not needed; accepts whatever a pickle does to it, and does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None:
        """As a list's."""

    def extend(self, items: object) -> None:
        """As a list's."""

    def add(self, item: object) -> None:
        """As a set's."""

    def update(self, *items: object) -> None:
        """As a set's."""


def read_archive(files: Files, url: str, size: int) -> Any:
    """What `torch.load` would return, with `LazyTensor`s for tensors and `Opaque`s for all but plain objects.

    Args:
        files: Reads the file; also later, when places are looked up.
        url: Of the file.
        size: Its bytes, as they were when it was written.

    Raises:
        DamagedCheckpointError: It is missing or truncated, or its directory or pickle is not as it was written.
    """
    file: io.BufferedReader[Any] = io.BufferedReader(_RangedFile(files, url, size), _BUFFER_BYTES)
    try:
        with zipfile.ZipFile(file) as archive:
            check_directory(archive, size)
            reader = _Reader(url, archive, file, size)
            pickled = reader.pickled()
    except FileNotFoundError:
        raise damaged(url, "it is missing") from None
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, LookupError, EOFError, NotImplementedError) as e:
        raise damaged(url, f"its directory cannot be read: {clipped(str(e))}") from e
    try:
        return reader.contents(pickled)
    except Exception as e:  # a pickle can be made to raise anything, and only its bytes are read here
        raise damaged(url, f"its pickle cannot be read: {type(e).__name__}: {clipped(str(e))}") from e


def check_directory(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse what torch.save never writes before anything is unpacked, which could be a thousand times the file.

    Args:
        archive: Only its directory was read.
        size: Bytes of the file.

    Raises:
        zipfile.BadZipFile: A record is compressed, encrypted or too long, or all together are longer than the file.
    """
    for info in archive.infolist():
        is_plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not is_plain or info.flag_bits & 1:
            raise zipfile.BadZipFile(f"{clipped(info.filename)} is compressed or encrypted")
        if info.filename.casefold().endswith("data.pkl") and info.file_size > LARGEST_PICKLE_BYTES:
            what = f"has {info.file_size} bytes, more than {LARGEST_PICKLE_BYTES}"
            raise zipfile.BadZipFile(f"{clipped(info.filename)} {what}")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise zipfile.BadZipFile("its records overlap")


class _Reader:
    """One archive, while it is open."""

    def __init__(self, url: str, archive: zipfile.ZipFile, file: io.BufferedReader[Any], size: int) -> None:
        self._url, self._archive, self._file, self._size = url, archive, file, size
        names = archive.namelist()
        self._root = names[0].partition("/")[0] if names else ""
        self._records: dict[str, Record] = {}

    def pickled(self) -> bytes:
        if self._archive.read(f"{self._root}/byteorder") != b"little":
            raise damaged(self._url, "it was not written on a little-endian machine")
        return self._archive.read(f"{self._root}/data.pkl")  # checked against its CRC-32

    def contents(self, pickled: bytes) -> Any:
        # The unpickler allocates up to the highest place that a pickle names, which may be 32 GB for one object.
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _PUTS and int(argument or 0) >= len(pickled):
                raise pickle.UnpicklingError(f"place {argument} of at most {len(pickled)} objects")
        return _Unpickler(io.BytesIO(pickled), self._record).load()

    def _record(self, key: str) -> Record:
        if key not in self._records:
            try:
                info = self._archive.getinfo(f"{self._root}/data/{key}")
            except KeyError:
                raise damaged(self._url, f"it has no record data/{clipped(key)}") from None
            offset = self._data_offset(info) if info.file_size else info.header_offset
            if offset + info.file_size > self._size:
                raise damaged(self._url, f"{clipped(info.filename)} extends past its end")
            self._records[key] = Record(self._url, info.filename, offset, info.file_size)
        return self._records[key]

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """After the local header, whose padding is not in the directory."""
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER_BYTES)
        if header[:4] != b"PK\x03\x04":
            raise damaged(self._url, f"{info.filename} has no header where the directory says")
        name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        return info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


class _Sealed:
    """Refuses state from a pickle, which would replace fields that were checked."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a state for a tensor, which has none")


@dataclass(frozen=True)
class _StorageOnDemand(_Sealed):
    """A storage that the pickle names; its place is looked up when a tensor in it is needed."""

    dtype: str
    key: str


@dataclass(frozen=True)
class LazyTensor(_Sealed):
    """A tensor of the pickle. `place()` finds where it lies, which may need a read."""

    shape: tuple[int, ...]
    dtype: str
    find: Callable[[], Record]
    first: int
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    def place(self) -> TensorPlace:
        """Its place.

        Raises:
            DamagedCheckpointError: It is not contiguous, or its storage is shorter than it.
        """
        expected, wanted = 1, []
        for length in reversed(self.shape):
            wanted.append(expected)
            expected *= length
        strided = zip(self.shape, self.stride, reversed(wanted), strict=True)
        record = self.find()
        if self.elements and any(length > 1 and stride != want for length, stride, want in strided):
            raise damaged(record.url, f"{record.name} holds a tensor that is not contiguous")
        if self.dtype not in ITEM_BYTES:
            raise damaged(record.url, f"{record.name} holds elements of an unknown type, {self.dtype}")
        if (self.first + self.elements) * ITEM_BYTES[self.dtype] > record.bytes:
            raise damaged(record.url, f"{record.name} is shorter than a tensor in it")
        return TensorPlace(record, self.dtype, self.shape, self.first)


class _Unpickler(pickle.Unpickler):
    """Makes plain containers, tensors and opaque objects; names in the pickle are never imported or called."""

    def __init__(self, file: io.BytesIO, record: Callable[[str], Record]) -> None:
        super().__init__(file)
        self._record = record

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        return _PLAIN.get((module, name)) or {
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_parameter": _first,
            "_rebuild_parameter_with_state": _first,
            "_rebuild_from_type_v2": _from_type,
        }.get(name if module in ("torch._utils", "torch._tensor") else "", Opaque)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"an unknown kind of reference, {kind!r}")
        return _StorageOnDemand(dtype if isinstance(dtype, str) else "of a storage without type", str(key))

    def _tensor(
        self, stored: Any, first: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> LazyTensor:
        numbers = (first, *shape, *stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor whose place, shape and stride are not numbers")
        if not isinstance(stored, _StorageOnDemand):
            raise pickle.UnpicklingError("a tensor without a storage")
        return LazyTensor(tuple(shape), stored.dtype, lambda: self._record(stored.key), first, tuple(stride))


_PLAIN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
}


def _first(value: Any, *_: object) -> Any:
    return value


def _from_type(rebuild: Callable[..., Any], _: object, arguments: tuple[Any, ...], *__: object) -> Any:
    return rebuild(*arguments)


class _RangedFile(io.RawIOBase):
    """A file in storage, read by ranges; a buffer above it combines consecutive reads."""

    def __init__(self, files: Files, url: str, size: int) -> None:
        super().__init__()
        self._files, self._url, self._size, self._position = files, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("the file is shorter than a zip archive")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._files.read_range(self._url, self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
