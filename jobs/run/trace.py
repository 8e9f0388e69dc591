"""The trace: what every rank consumed at every step, so that two runs can be compared sample by sample.

    <trace URL>/
        trace.json                                     which run it belongs to
        0001-00000001-00000050-rank-00000.jsonl        attempt, first and last step, rank; one JSON line per step

Object stores cannot append, so a rank writes parts that never change: one every PART_STEPS steps, and one with the
rest at every checkpoint, be it in the store or in memory. So the trace up to a checkpoint is in storage before the
checkpoint counts. Steps after it are redone after a restart; `begin_trace` first removes them from the trace.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from jobs.errors import TraceError
from pipeline.host.daemon_threads import DaemonThreads
from pipeline.load.batch import Batch
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

TRACE_VERSION = 1
PART_STEPS = 100
"""Most steps that a rank keeps in memory."""

_PART = re.compile(r"(\d{4,})-(\d{8,})-(\d{8,})-rank-(\d{5,})\.jsonl")
_HEAD = "trace.json"


class TraceWriter:
    """One rank's part of a trace.

    Owns: the rows that are not in storage yet, and the thread that writes them.
    Concurrency: called by the training thread alone.
    Failure: a part that cannot be written after Storage's retries raises at the next flush, or look whether it is.
    Blocking: `flush` waits for storage; the other methods do not.
    """

    def __init__(self, storage: Storage, url: str, *, rank: int, world_size: int, attempt: int) -> None:
        self._storage, self._url = storage, url
        self._place = {"rank": rank, "world_size": world_size, "attempt": attempt}
        self._thread = DaemonThreads(1, "convmae-trace")
        self._rows: list[dict[str, Any]] = []
        self._masks: list[str] = []
        self._writing: list[Future[None]] = []

    def note_masks(self, mask: Tensor) -> None:
        """Note the masks of the step's next micro-batch.

        Args:
            mask: (n, patches): 1 where masked, as the model used it.
        """
        self._masks += mask_digests(mask)

    def add(self, batch: Batch, learning_rate: float, skipped: str = "") -> None:
        """Note that the step of `batch` was done, with the masks noted since the last, or skipped, and why."""
        masks, self._masks = self._masks, []
        row = {
            "step": batch.step + 1,
            "epoch": batch.epoch,
            **self._place,
            "learning_rate": learning_rate,
            "samples": batch.sample_ids.tolist(),
            "crops": batch.crops[:, :4].tolist(),
            "flips": batch.crops[:, 4].tolist(),
            "masks": masks,
        }
        if batch.substitutions:
            row["substitutes"] = {str(item.bad.id): item.substitute for item in batch.substitutions}
        if skipped:
            row["skipped"] = skipped
        self._rows.append(row)
        if len(self._rows) >= PART_STEPS:
            self.write()

    def write(self) -> None:
        """Begin to write the rest."""
        rows, self._rows = self._rows, []
        if rows:
            place = self._place
            part = _TracePart(place["attempt"], rows[0]["step"], rows[-1]["step"], place["rank"])
            self._writing.append(self._thread.submit(_write_rows, self._storage, self._url, part, rows))

    @property
    def is_writing(self) -> bool:
        """Whether storage lacks some of what was given to `write`.

        Raises:
            StorageError: A part could not be written.
        """
        while self._writing and self._writing[0].done():
            self._writing.pop(0).result()
        return bool(self._writing)

    def flush(self) -> None:
        """Write the rest, and return when storage has all of it."""
        self.write()
        writing, self._writing = self._writing, []
        for part in writing:
            part.result()

    def close(self) -> None:
        """Flush, and end the thread."""
        self.flush()
        self._thread.shutdown()


class _TracePart(NamedTuple):
    """The fields of a part's name."""

    attempt: int
    first: int
    last: int
    rank: int

    @property
    def name(self) -> str:
        return f"{self.attempt:04d}-{self.first:08d}-{self.last:08d}-rank-{self.rank:05d}.jsonl"


def mask_digests(mask: Tensor) -> list[str]:
    """BLAKE2b of 8 bytes, in hexadecimal, of each mask's bits, eight per byte, the first patch in the highest bit.

    Args:
        mask: (n, patches): 1 where masked.
    """
    packed = np.packbits(mask.detach().cpu().numpy() > 0, axis=1)
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in packed]


def check_trace(storage: Storage, url: str, run_url: str) -> None:
    """Refuse a URL that holds another run's trace, or that cannot be written.

    Raises:
        TraceError: It is another run's.
        StorageError: It cannot be used.
    """
    storage.check(url, write=True)
    owner = _owner(storage, url)
    if owner not in (None, run_url):
        raise TraceError("trace", f"must be empty or this run's ({run_url})", f"{url} of {owner}", "give another URL")


def begin_trace(storage: Storage, url: str, run_url: str, resume_step: int) -> None:
    """Make the trace this run's, and remove the steps that will be redone. One rank calls it, before any rank writes.

    Args:
        storage: Reaches `url`.
        url: Where the trace lies.
        run_url: The run's directory.
        resume_step: Steps that are not redone.
    """
    head = {"format_version": TRACE_VERSION, "run": run_url}
    storage.write(storage.join(url, _HEAD), json.dumps(head, indent=1).encode() + b"\n")
    for part in _parts(storage, url):
        if part.last <= resume_step:
            continue
        rows = [row for row in _read_rows(storage, url, part) if row["step"] <= resume_step]
        if rows:
            _write_rows(storage, url, part._replace(last=rows[-1]["step"]), rows)
        storage.delete(storage.join(url, part.name))


def read_trace(storage: Storage, url: str) -> Iterator[dict[str, Any]]:
    """Every row, by step and rank; for a step that is there more than once, those of the newest attempt.

    Raises:
        TraceError: There is no trace.
    """
    if _owner(storage, url) is None:
        raise TraceError("trace", "must exist", url, "write one with `convmae pretrain ... --trace URL`")
    pending: dict[int, list[dict[str, Any]]] = {}
    for part in sorted(_parts(storage, url), key=lambda part: part.first):
        yield from _newest(pending, below=part.first)
        for row in _read_rows(storage, url, part):
            pending.setdefault(row["step"], []).append(row)
    yield from _newest(pending, below=None)


def _newest(pending: dict[int, list[dict[str, Any]]], below: int | None) -> Iterator[dict[str, Any]]:
    """Take the steps before `below` out of `pending`; no later part has rows of them."""
    for step in sorted(step for step in pending if below is None or step < below):
        rows = pending.pop(step)
        attempt = max(row["attempt"] for row in rows)
        ranks = {row["rank"]: row for row in rows if row["attempt"] == attempt}
        yield from (ranks[rank] for rank in sorted(ranks))


@dataclass
class TracedStep:
    """A step over all ranks; nothing in it depends on their number."""

    step: int
    learning_rate: float
    skipped: bool
    samples: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """Sample id to crop, flip, mask and substitute; ids that were consumed twice are in `twice`."""
    twice: list[int] = field(default_factory=list)


def traced_steps(rows: Iterator[dict[str, Any]]) -> Iterator[TracedStep]:
    """Merge the rows of all ranks of each step.

    Args:
        rows: As `read_trace` gives them.
    """
    found: TracedStep | None = None
    for row in rows:
        if found is None or found.step != row["step"]:
            if found:
                yield found
            found = TracedStep(row["step"], row["learning_rate"], "skipped" in row)
        substitutes = row.get("substitutes", {})
        columns = (row["samples"], row["crops"], row["flips"], row["masks"])
        for sample, crop, flip, mask in zip(*columns, strict=True):
            if sample in found.samples:
                found.twice.append(sample)
            found.samples[sample] = (tuple(crop), flip, mask, substitutes.get(str(sample)))
    if found:
        yield found


def differences(first: Iterator[dict[str, Any]], second: Iterator[dict[str, Any]]) -> Iterator[str]:
    """One line for each step in which two traces differ, whatever their world sizes."""
    for one, other in zip_longest(traced_steps(first), traced_steps(second)):
        if one is None or other is None or one.step != other.step:
            steps = [str(found.step) if found else "no step" for found in (one, other)]
            yield f"steps differ from here: {steps[0]} and {steps[1]}"
            return
        if text := _difference(one, other):
            yield f"step {one.step}: {text}"


def _difference(one: TracedStep, other: TracedStep) -> str:
    if one.learning_rate != other.learning_rate:
        return f"learning rates {one.learning_rate!r} and {other.learning_rate!r}"
    if one.skipped != other.skipped:
        return f"the {'first' if one.skipped else 'second'} trace alone made no update"
    for name, found in (("first", one), ("second", other)):
        if found.twice:
            return f"the {name} trace has sample {found.twice[0]} twice"
    if alone := sorted(one.samples.keys() ^ other.samples.keys()):
        owner = "first" if alone[0] in one.samples else "second"
        return f"{len(alone)} samples are in one trace alone; sample {alone[0]} is in the {owner}"
    for sample in sorted(one.samples):
        for name, left, right in zip(_FIELDS, one.samples[sample], other.samples[sample], strict=True):
            if left != right:
                return f"{name} of sample {sample} are {left!r} and {right!r}"
    return ""


_FIELDS = ("crops", "flips", "masks", "substitutes")


def _owner(storage: Storage, url: str) -> str | None:
    """URL of the run whose trace lies at `url`; None if there is no trace."""
    place = storage.join(url, _HEAD)
    try:
        head = _parsed(storage.read(place), place)
    except FileNotFoundError:
        return None
    if head.get("format_version") != TRACE_VERSION:
        remedy = "read it with the version of convmae-pretrain that wrote it"
        raise TraceError("format_version", f"must be {TRACE_VERSION}", head.get("format_version"), remedy)
    return str(head.get("run"))


def _parts(storage: Storage, url: str) -> list[_TracePart]:
    names = storage.list_names(url)
    return [_TracePart(*map(int, match.groups())) for name in names if (match := _PART.fullmatch(name))]


def _read_rows(storage: Storage, url: str, part: _TracePart) -> list[dict[str, Any]]:
    place = storage.join(url, part.name)
    try:
        data = storage.read(place)
    except FileNotFoundError:  # object stores list deleted names for a while
        return []
    return [_parsed(line, place) for line in data.splitlines()]


def _parsed(data: bytes, url: str) -> dict[str, Any]:
    try:
        return parsed_object(data)
    except ValueError as error:
        raise TraceError("trace", f"must hold JSON objects ({error})", url, "restore the file") from None


def _write_rows(storage: Storage, url: str, part: _TracePart, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    storage.write(storage.join(url, part.name), data.encode())
