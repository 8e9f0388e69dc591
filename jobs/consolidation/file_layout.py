"""Layout of consolidated weights in safetensors files, known before any weight is read.

A file is eight bytes with the header's length, the header (JSON), and the tensors without gaps. All follows from names,
shapes and types alone, so a file can be cut into parts that are made independently. Tensors keep the order in which
they lie in the checkpoint, wider types first so that all are aligned: a part then reads few byte ranges.

Source: https://huggingface.co/docs/safetensors/index#format; for several files, the index of Hugging Face's models.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jobs.checkpoint.tensor_ranges import ITEM_BYTES, ByteRange, SourceTensor
from jobs.errors import CheckpointError
from pipeline.store.parted_write import MOST_PARTS

PART_BYTES = 8 << 20
MOST_PART_BYTES = 32 << 20
"""A task holds about four times this."""
INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"
_ALIGNMENT = 8

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Types that can be requested for floating-point tensors, and their names in safetensors."""


@dataclass(frozen=True)
class TensorPiece:
    """Some values of one tensor: where they lie in the checkpoint, and where they belong in a part."""

    source: ByteRange
    offset: int
    """Within the part, where they are `dtype`."""
    tensor: str
    source_dtype: str
    dtype: str

    def cut(self, most_bytes: int) -> Iterator[TensorPiece]:
        """The same values in pieces of at most `most_bytes` in the checkpoint, a multiple of every type's size."""
        url, start, length = self.source
        for done in range(0, length, most_bytes):
            offset = self.offset + done // ITEM_BYTES[self.source_dtype] * ITEM_BYTES[self.dtype]
            source = ByteRange(url, start + done, min(most_bytes, length - done))
            yield replace(self, source=source, offset=offset)


@dataclass(frozen=True)
class WeightPart:
    """A byte range of one file that is to be made: literal bytes, then pieces of tensors."""

    url: str
    number: int
    """From 1."""
    offset: int
    literal: bytes
    pieces: tuple[TensorPiece, ...]
    bytes: int


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file that is to be made."""

    url: str
    tensors: tuple[SourceTensor, ...]
    metadata: Mapping[str, str]
    dtype: str
    """Of floating-point tensors, as in safetensors."""
    least_part_bytes: int = PART_BYTES

    def dtype_of(self, tensor: SourceTensor) -> str:
        """The type as which `tensor` is stored; what is not floating-point keeps its type."""
        return self.dtype if tensor.is_floating_point else tensor.dtype

    def bytes_of(self, tensor: SourceTensor) -> int:
        """Size of `tensor` in the file."""
        return tensor.elements * ITEM_BYTES[self.dtype_of(tensor)]

    @cached_property
    def ordered(self) -> tuple[SourceTensor, ...]:
        """The tensors in the order of their bytes."""
        return tuple(sorted(self.tensors, key=lambda tensor: -ITEM_BYTES[self.dtype_of(tensor)]))

    @cached_property
    def header(self) -> bytes:
        """The file up to its first tensor; a multiple of eight bytes."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)}
        for tensor, start, end in zip(self.ordered, self._starts, self._starts[1:], strict=False):
            entries[tensor.name] = {
                "dtype": self.dtype_of(tensor),
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def _starts(self) -> list[int]:
        """Where each tensor's bytes begin after the header, and where the last one's end."""
        starts = [0]
        for tensor in self.ordered:
            starts.append(starts[-1] + self.bytes_of(tensor))
        return starts

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self._starts[-1]

    @property
    def part_bytes(self) -> int:
        """Size of all parts but the last; a multiple of eight, so that no value is cut."""
        needed = -(-self.bytes // MOST_PARTS)
        return max(self.least_part_bytes, needed + (-needed % _ALIGNMENT))

    @property
    def part_count(self) -> int:
        """Number of its parts."""
        return -(-self.bytes // self.part_bytes)

    def parts(self) -> Iterator[WeightPart]:
        """Its parts, in order."""
        for index in range(self.part_count):
            offset = index * self.part_bytes
            end = min(offset + self.part_bytes, self.bytes)
            literal = self.header[offset:end]
            begin = max(offset, len(self.header)) - len(self.header)
            pieces = tuple(self._pieces(begin, max(begin, end - len(self.header)), len(literal)))
            yield WeightPart(self.url, index + 1, offset, literal, pieces, end - offset)

    def _pieces(self, start: int, stop: int, offset: int) -> Iterator[TensorPiece]:
        """The values at bytes [start, stop) after the header, which belong at `offset` of a part."""
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        while start < stop:
            tensor, begin = self.ordered[index], self._starts[index]
            end = min(stop, self._starts[index + 1])
            dtype = self.dtype_of(tensor)
            first, last = ((edge - begin) // ITEM_BYTES[dtype] for edge in (start, end))
            for source in tensor.byte_ranges(first, last):
                yield TensorPiece(source, offset, tensor.name, tensor.dtype, dtype)
                offset += source.length // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[dtype]
            start, index = end, index + 1


def one_file(url: str, tensors: Sequence[SourceTensor], metadata: Mapping[str, str], dtype: str) -> WeightFile:
    """All tensors in one file.

    Raises:
        CheckpointError: They are too large for one.
    """
    file = WeightFile(url, tuple(tensors), metadata, dtype)
    if file.part_bytes > MOST_PART_BYTES:
        most = MOST_PARTS * MOST_PART_BYTES
        remedy = "make several with --shard-bytes 50GB"
        raise CheckpointError("checkpoint", f"must fit one file of at most {most} bytes", file.bytes, remedy)
    return file


def several_files(
    folder: str, tensors: Sequence[SourceTensor], metadata: Mapping[str, str], dtype: str, most_bytes: int
) -> list[WeightFile]:
    """The tensors in as many files as needed for none to exceed `most_bytes`; a single file keeps the plain name.

    Raises:
        CheckpointError: One tensor alone is larger, or a file of that size cannot be made.
    """
    empty = WeightFile(f"{folder}/{FILE_NAME}", (), metadata, dtype)
    least = empty.bytes + _ALIGNMENT
    bins: list[list[SourceTensor]] = [[]]
    room = most_bytes - least
    for tensor in sorted(tensors, key=lambda tensor: -ITEM_BYTES[empty.dtype_of(tensor)]):
        needed = empty.bytes_of(tensor) + _entry_bytes(tensor)
        if needed > most_bytes - least:
            rule, remedy = f"must hold the largest tensor, {tensor.name}", f"give {needed + least} or more"
            raise CheckpointError("--shard-bytes", rule, most_bytes, remedy)
        if needed > room:
            bins.append([])
            room = most_bytes - least
        bins[-1].append(tensor)
        room -= needed
    names = [f"model-{number:05d}-of-{len(bins):05d}.safetensors" for number in range(1, len(bins) + 1)]
    if len(bins) == 1:
        names = [FILE_NAME]
    return [one_file(f"{folder}/{name}", held, metadata, dtype) for name, held in zip(names, bins, strict=True)]


def _entry_bytes(tensor: SourceTensor) -> int:
    """Most bytes that a tensor takes in a header."""
    entry = {tensor.name: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [1 << 60, 1 << 60]}}
    return len(json.dumps(entry, ensure_ascii=False).encode())


def index_of(files: Sequence[WeightFile]) -> bytes:
    """The index of several files, as Transformers reads it."""
    total = sum(file.bytes_of(tensor) for file in files for tensor in file.tensors)
    names = {tensor.name: file.url.rpartition("/")[2] for file in files for tensor in file.tensors}
    index = {"metadata": {**files[0].metadata, "total_size": total}, "weight_map": names}
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
