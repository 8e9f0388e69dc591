"""Whether everything that a consolidation read of a checkpoint is what was saved.

PyTorch keeps the CRC-32 of every storage in the directory of its archive. Tasks read parts of storages, in any order;
their checksums are put together here, and the bytes that no task needed are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from jobs.torch_archive import Record, damaged
from jobs.weight_copy import Checked, CheckRange, ReadRange
from jobs.weight_files import PART_BYTES, WeightFile
from pipeline.crc_combine import CRC32, combined


class RecordCheck:
    """What was read of each record.

    Owns: one entry for each range that was read. Used by one thread.
    """

    def __init__(self, files: Sequence[WeightFile]) -> None:
        """Find out which records the files draw on; does no I/O."""
        vectors = {id(vector): vector for file in files for tensor in file.tensors for vector in tensor.vectors}
        self._read: dict[Record, list[Checked]] = {
            record: [] for vector in vectors.values() for record in vector.records if record.bytes
        }

    def add(self, checked: Iterable[Checked]) -> None:
        """Note what a task read."""
        for found in checked:
            self._read[found.record].append(found)

    def gaps(self) -> Iterator[CheckRange]:
        """What is still to be read so that every record is covered once; call when all tasks have ended."""
        for record, found in self._read.items():
            found.sort(key=lambda read: read.start)
            if any(read.start + read.bytes > after.start for read, after in itertools.pairwise(found)):
                found.clear()  # ranges that overlap cannot be put together; it is read through
            position = 0
            for start, end in [*((read.start, read.start + read.bytes) for read in found), (record.bytes, 0)]:
                for first in range(position, start, PART_BYTES):
                    yield CheckRange(ReadRange(record, first, min(PART_BYTES, start - first)))
                position = end

    def verify(self) -> None:
        """Compare every record with its archive's directory; call when the gaps were read.

        Raises:
            DamagedCheckpointError: One is not as it was written.
        """
        for record, found in self._read.items():
            crc32 = 0
            for read in sorted(found, key=lambda read: read.start):
                crc32 = combined(crc32, read.crc32, read.bytes, CRC32)
            if crc32 != record.crc32:
                raise damaged(record.url, f"{record.name} does not have the CRC-32 of the archive's directory")
