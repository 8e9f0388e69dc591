"""Some samples of a dataset, read as if they were all there are: a fine-tuning's, whose labels are known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.load.bad_sample import BadSample
from pipeline.load.dataset import Dataset
from pipeline.load.shard_reader import Sample
from pipeline.store.storage import Storage

DENSE_RATIO = 0.5
"""Share of a block's span that has to be chosen for the disk cache to keep the span."""

Int64s = npt.NDArray[np.int64]


class ChosenSamples(Dataset):
    """A dataset whose sample ids are places in a list of some ids of another.

    Owns, concurrency and blocking: as that one, with which it shares counters, cache and indexes.
    """

    def __init__(self, dataset: Dataset, sample_ids: Int64s) -> None:
        """Do no I/O.

        Args:
            dataset: Where they lie; not used by anybody else.
            sample_ids: (n,) ascending, so that neighbours in a shard share a request.
        """
        self.__dict__.update(dataset.__dict__)
        self._ids = sample_ids

    def opener(self) -> Callable[[Storage], Dataset]:
        """As of a whole dataset."""
        return functools.partial(_chosen, super().opener(), self._ids)

    @property
    def samples(self) -> int:
        """n; ids run from 0 to n - 1."""
        return len(self._ids)

    @property
    def mean_sample_bytes(self) -> float:
        """Bytes of tar per sample of the whole dataset."""
        return self.manifest.tar_bytes / max(1, self.manifest.samples)

    def read_each(
        self, sample_ids: Sequence[int] | Int64s, block: range | None = None, *, whole_block: bool = True
    ) -> list[Sample | BadSample]:
        """Read samples by their places in the list, which they are also called by; else as of a whole dataset."""
        places = np.asarray(sample_ids, np.int64)
        span = None if block is None else self._span(block)
        found = super().read_each(self._ids[places], span, whole_block=whole_block)
        return [replace(sample, id=place) for sample, place in zip(found, places.tolist(), strict=True)]

    def keep(self, block: range) -> None:
        """Fetch a block of the list into the disk cache, where little lies between its samples."""
        if (span := self._span(block)) is not None:
            super().keep(span)

    def _span(self, block: range) -> range | None:
        """Ids from the first to the last of a block; None where most of them are not chosen."""
        first, last = self._ids[block.start], self._ids[block.stop - 1]
        span = range(int(first), int(last) + 1)
        return span if len(block) >= DENSE_RATIO * len(span) else None


def _chosen(opener: Callable[[Storage], Dataset], sample_ids: Int64s, storage: Storage) -> ChosenSamples:
    return ChosenSamples(opener(storage), sample_ids)
