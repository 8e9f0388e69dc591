"""How much of what its devices could compute a run computes: FLOP/s of a device, and MFU.

MFU (model FLOPs utilization) is the operations that a step of the model needs, divided by those that the devices' peak
allows in the step's wall time. Activations that are computed again, the optimizer and validation are time and not
operations. What is needed and possible is in the event that begins an attempt, since both change with the group: rows
of runs that are older than that have no figures.

Source: PaLM, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GroupCompute:
    """What a worker group computes in a step, and could compute."""

    step_flops: float
    """Operations of the model for one global batch, forward and backward."""
    peak_flops_per_second: float | None
    """Of all devices together; None where that of one is not known."""
    devices: str
    """For people: how many of which, and whether their peak is measured."""

    @classmethod
    def of_attempts(cls, events: Iterable[Mapping[str, Any]]) -> dict[int, GroupCompute]:
        """That of each attempt that has recorded it, by its number."""
        return {
            event["attempt"]: cls(event["step_flops"], event.get("peak_flops_per_second"), event.get("devices", ""))
            for event in events
            if "step_flops" in event
        }

    def to_json(self) -> dict[str, Any]:
        """The fields that are known, as an event has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def figures(self, world_size: int, step_seconds: float) -> dict[str, float]:
        """FLOP/s of a device, and MFU where a peak is known; nothing of a step that took no time.

        Args:
            world_size: Devices.
            step_seconds: Wall time of a step.
        """
        if step_seconds <= 0 or world_size < 1:
            return {}
        reached = self.step_flops / step_seconds
        found = {"device_flops_per_second": reached / world_size}
        if self.peak_flops_per_second:
            found["mfu_ratio"] = reached / self.peak_flops_per_second
        return found if all(map(math.isfinite, found.values())) else {}


def with_utilization(
    rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows of a history, each with the figures of its step where its attempt has recorded what they need."""
    attempts = GroupCompute.of_attempts(events)
    for row in rows:
        compute = attempts.get(row["attempt"])
        yield {**row, **(compute.figures(row["world_size"], row.get("step_seconds", 0.0)) if compute else {})}


def mean_mfu(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """MFU over all steps of rows that `with_utilization` gives: by their time; None where no step has one."""
    timed = [(row["mfu_ratio"], row["step_seconds"]) for row in rows if "mfu_ratio" in row]
    seconds = sum(each for _, each in timed)
    return sum(ratio * each for ratio, each in timed) / seconds if seconds else None
