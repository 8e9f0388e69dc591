"""Steps whose loss or gradient is not finite: how ranks agree on them, and which steps are skipped for them.

`stop` ends the attempt before the update. `skip_batch` makes no update: weights, moments and AdamW's count stay, the
step counts as done, and the next batch follows at its own learning rate. `rollback` restarts from the newest
checkpoint and skips all steps from there to the bad one. Which steps are skipped is a ledger in the run directory, so
that every later attempt skips the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

FAULT_WORDS = 2


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient of a global batch is NaN or infinite on some rank; nothing was updated."""


class RolledBackError(RuntimeError):
    """A loss or gradient was not finite, and the steps since the newest checkpoint are skipped: restart from there."""


def write_faults(words: Tensor, losses: Tensor, rank: int) -> None:
    """Write (FAULT_WORDS,) of what this rank found in its losses, on their device, to be added up over ranks."""
    words[0] = ~losses.isfinite().all()
    words[1] = words[0] * rank


def fault_of(words: Sequence[float], *, gradients_are_finite: bool) -> str:
    """What the sums say is not finite, for people; empty where all is."""
    ranks, sum_of_ranks = (int(word) for word in words)
    if ranks == 1:
        return f"the loss of rank {sum_of_ranks}"
    if ranks:
        return f"the loss of {ranks} ranks"
    return "" if gradients_are_finite else "the gradient"


@dataclass(frozen=True)
class SkippedSteps:
    """Steps without an update after a rollback; both from 1, and both among them."""

    first_step: int
    last_step: int

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SkippedSteps:
        """Read a row of the ledger."""
        return cls(fields["first_step"], fields["last_step"])

    def to_json(self) -> dict[str, int]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


def rollbacks_in_a_row(ledger: Sequence[SkippedSteps], last: SkippedSteps) -> int:
    """How many rollbacks, `last` among them, follow each other without a step trained and kept between them."""
    count, first_step = 1, last.first_step
    for window in reversed(ledger):
        if window.last_step + 1 < first_step:
            break
        count, first_step = count + 1, min(first_step, window.first_step)
    return count


class Stretch(NamedTuple):
    """Consecutive steps, from 0 as the order counts them."""

    steps: range
    skipped: bool


def stretches(start: int, stop: int, ledger: Sequence[SkippedSteps]) -> Iterator[Stretch]:
    """Cut steps [start, stop) into those to train and those that are skipped.

    Args:
        start: Steps that are done.
        stop: Steps of the whole run.
        ledger: In any order; windows may overlap.
    """
    for window in sorted(ledger, key=lambda window: window.first_step):
        first, end = max(start, window.first_step - 1), min(stop, window.last_step)
        if first >= end:
            continue
        if start < first:
            yield Stretch(range(start, first), skipped=False)
        yield Stretch(range(first, end), skipped=True)
        start = end
    if start < stop:
        yield Stretch(range(start, stop), skipped=False)
