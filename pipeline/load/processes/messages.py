"""Messages between a rank and its loader processes, pickled: both sides are ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.access.profile_keys import Keys
from pipeline.load.batch_plan import BatchPlan
from pipeline.load.dataset import Dataset
from pipeline.load.image_maker import Substitution
from pipeline.load.processes.ring import RingLayout
from pipeline.load.read_counters import ReadCounts
from pipeline.order.shares import Share
from pipeline.store.storage import Storage

# ---- to a process --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Assignment:
    """The first message: what the process is to make."""

    opener: Callable[[Storage], Dataset]
    storage: Storage
    """With keys as they were when the rank got them, and without a renewal."""
    asks_for_keys: bool
    """Whether the rank can ask for newer ones."""
    plan: BatchPlan
    share: Share
    first_step: int
    """Of the batches, which lies in slot 0 of the ring."""
    steps: range
    """Those of which it makes a part. They begin later than `first_step` if it replaces another process."""
    granted: int
    """As in Grant."""
    refused: Mapping[int, str]
    """Samples that ended processes before, and why they are not decoded any more."""
    ring_path: str
    layout: RingLayout
    log_level: int


@dataclass(frozen=True)
class Grant:
    """Steps before this one have a slot in the ring."""

    stop_step: int


@dataclass(frozen=True)
class NewKeys:
    """The answer to KeysWanted."""

    keys: Keys | None


@dataclass(frozen=True)
class End:
    """Finish what is being read, and end."""


# ---- from a process ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartDone:
    """All images of its part of a batch are in the ring."""

    step: int
    substitutions: list[tuple[int, Substitution]]
    """Each with its place in the batch."""
    read_seconds: float
    decode_seconds: float
    counts: ReadCounts
    """Since the last message of this kind."""
    evictions: int
    """Of the disk cache, since then."""
    is_cache_off: bool
    """Whether its disk failed."""


@dataclass(frozen=True, eq=False)
class PartFailed:
    """An image of a batch cannot be made."""

    step: int
    error: BaseException


@dataclass(frozen=True)
class KeysWanted:
    """The store refused the keys."""
