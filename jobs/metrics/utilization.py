"""How much of what its devices could compute a run computes: FLOP/s of a device, and MFU.

MFU (model FLOPs utilization) is the operations that a step of the model needs, divided by those that the devices' peak
allows in the step's wall time. Activations that are computed again, the optimizer and validation are time and not
operations. What is needed and possible is in the event that begins an attempt, since both change with the group: rows
of runs that are older than that have no figures.

Source: PaLM, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.run.step_table import StepTable
from jobs.run.stored_steps import StoredSteps

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupCompute:
    """What a worker group computes in a step, and could compute."""

    step_flops: float
    """Operations of the model for one global batch, forward and backward."""
    peak_flops_per_second: float | None
    """Of all devices together; None where that of one is not known."""
    devices: str
    """For people: how many of which, and whether their peak is measured."""
    step_flops_from: tuple[tuple[int, float], ...] = ()
    """Where images change their size: the first step, from 1, and the operations of each step from there on, in order.
    Empty: those of all steps are `step_flops`, else those of the last size."""

    @classmethod
    def of_attempts(cls, events: Iterable[Mapping[str, Any]]) -> dict[int, GroupCompute]:
        """That of each attempt that has recorded it, by its number."""
        return {
            event["attempt"]: cls(
                event["step_flops"],
                event.get("peak_flops_per_second"),
                event.get("devices", ""),
                tuple((first, flops) for first, flops in event.get("step_flops_from", ())),
            )
            for event in events
            if "step_flops" in event
        }

    def to_json(self) -> dict[str, Any]:
        """The fields that are known, as an event has them."""
        return {name: value for name, value in asdict(self).items() if value is not None and value != ()}

    def flops_of(self, steps: npt.NDArray[np.int64]) -> Floats:
        """Operations of each of some steps, from 1, (n,)."""
        firsts, flops = zip(*(self.step_flops_from or ((0, self.step_flops),)), strict=True)
        places = np.searchsorted(firsts, steps, side="right") - 1
        found: Floats = np.array(flops, np.float64)[places.clip(0)]
        return found

    def flops_of_step(self, step: int) -> float:
        """Operations of one step, from 1."""
        return float(self.flops_of(np.array([step]))[0])

    def steps_like(self, step: int, total_steps: int) -> float:
        """How many steps like `step` have as many operations as all that follow it.

        Args:
            step: From 1.
            total_steps: Of the run.
        """
        changes = [first for first, _ in self.step_flops_from if step + 1 < first <= total_steps]
        spans = itertools.pairwise([step + 1, *changes, total_steps + 1])
        return sum((stop - first) * self.flops_of_step(first) for first, stop in spans) / self.flops_of_step(step)

    def figures(self, world_size: int, step_seconds: float, step: int) -> dict[str, float]:
        """FLOP/s of a device, and MFU where a peak is known; nothing of a step that took no time.

        Args:
            world_size: Devices.
            step_seconds: Wall time of a step.
            step: Which one, from 1.
        """
        if step_seconds <= 0 or world_size < 1:
            return {}
        reached = self.flops_of_step(step) / step_seconds
        found = {"device_flops_per_second": reached / world_size}
        if self.peak_flops_per_second:
            found["mfu_ratio"] = reached / self.peak_flops_per_second
        return found if all(map(math.isfinite, found.values())) else {}


@dataclass(frozen=True, eq=False)
class Utilization:
    """The figures of steps, each (n,); NaN where the attempt has not recorded what they need."""

    device_flops_per_second: Floats
    mfu_ratios: Floats

    @classmethod
    def of(cls, steps: StepTable, events: Iterable[Mapping[str, Any]]) -> Utilization:
        """Of steps of a history, by the run's events; with columns `step`, `attempt`, `world_size`, `step_seconds`."""
        known, places = np.unique(steps.numbers("attempt"), return_inverse=True)
        of_attempts = GroupCompute.of_attempts(events)
        computes = [of_attempts.get(int(attempt)) for attempt in known]
        flops = np.full(len(steps), np.nan)
        for place, compute in enumerate(computes):
            if compute:
                of_attempt = places == place
                flops[of_attempt] = compute.flops_of(steps.steps[of_attempt])
        peaks = np.array([(compute and compute.peak_flops_per_second) or np.nan for compute in computes], np.float64)
        seconds, world_sizes = steps.numbers("step_seconds"), steps.numbers("world_size")
        with np.errstate(all="ignore"):
            reached = flops / seconds
            reached[~((seconds > 0) & (world_sizes >= 1))] = np.nan
            ratios = reached / peaks[places]
            devices = np.divide(reached, world_sizes, out=reached)
        is_finite = np.isfinite(devices) & ~np.isinf(ratios)
        devices[~is_finite] = ratios[~is_finite] = np.nan
        return cls(devices, ratios)

    def rows(self, steps: StepTable) -> Iterator[dict[str, Any]]:
        """The rows of the same steps, each with its figures where there are any."""
        columns = (self.device_flops_per_second, self.mfu_ratios)
        for row, flops, ratio in zip(steps.rows(), *map(np.ndarray.tolist, columns), strict=True):
            if not math.isnan(flops):
                row["device_flops_per_second"] = flops
            if not math.isnan(ratio):
                row["mfu_ratio"] = ratio
            yield row


def mfu_ratios(steps: StoredSteps, events: Sequence[Mapping[str, Any]]) -> Floats:
    """MFU of each step of a history, (n,), as `Utilization` has it."""
    found, first = np.empty(len(steps)), 0
    for block in steps.only(("step", "attempt", "world_size", "step_seconds")).blocks():
        found[first : first + len(block)] = Utilization.of(block, events).mfu_ratios
        first += len(block)
    return found


def mean_mfu(ratios: Floats, seconds: Floats) -> float | None:
    """MFU over all steps that have one, by their time; None where none has. Both are (n,)."""
    if not (is_known := np.isfinite(ratios)).all():
        ratios, seconds = ratios[is_known], seconds[is_known]
    whole = float(seconds.sum())
    return float((ratios * seconds).sum()) / whole if whole else None
