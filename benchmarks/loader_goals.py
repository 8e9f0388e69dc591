"""Goals of the loader, and whether they are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OWN_SIDES = ("ours", "bare", "ours marked", "bare marked")
SETTLED_EPOCHS = 4
"""Before that pools and caches fill."""


Speeds = Mapping[tuple[str, str, int], float]
"""By side, place and threads."""


@dataclass(frozen=True)
class Medians:
    """Over rounds."""

    wall: Speeds
    """Images a second."""
    cpu: Speeds
    """Images for a second of one core, a local server's seconds counted in; other work alters it less."""
    seconds: Mapping[str, float]
    """To a first batch, by name."""
    cores: int


@dataclass(frozen=True)
class Goal:
    """One goal and what was found."""

    name: str
    bound: float
    found: float
    by_cpu: float | None = None
    """The same by CPU time, where it is a ratio of speeds."""
    at_least: bool = True

    @property
    def wanted(self) -> str:
        """The bound as text."""
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"

    @property
    def reached(self) -> bool:
        """Whether the figure is on the right side of the bound."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound


def goals(medians: Medians, megabytes: Sequence[float], pixel_difference: float) -> list[Goal]:
    """Every goal, in the order of the table.

    Args:
        medians: Speeds and times.
        megabytes: Resident memory at the end of each epoch.
        pixel_difference: From PIL, mean, in 1/255.
    """
    seconds, cores = medians.seconds, medians.cores
    first, middle = seconds["ours, first batch at step 0"], seconds["ours, first batch at the middle"]
    skipping = seconds["webdataset, batches up to the middle"]
    speeds = [
        Goal(name, bound, found, by_cpu)
        for (name, bound, found), (_, _, by_cpu) in zip(
            _ratios(medians.wall, cores), _ratios(medians.cpu, cores), strict=True
        )
    ]
    return [
        *speeds,
        # By CPU time threads cost nothing but what they take from each other.
        Goal(
            f"thread scaling, 1 to {cores}",
            0.9,
            medians.wall["ours", "disk", cores] / medians.wall["ours", "disk", 1] / cores,
            medians.cpu["ours", "disk", cores] / medians.cpu["ours", "disk", 1],
        ),
        Goal("first batch, middle of an epoch over step 0", 1.5, middle / first, at_least=False),
        Goal("first batch at the middle, webdataset over ours", 10.0, skipping / middle),
        Goal("growth of memory, MB an epoch", 1.0, growth(megabytes), at_least=False),
        Goal("mean difference from PIL, 1/255", 0.1, pixel_difference, at_least=False),
    ]


def _ratios(speeds: Speeds, cores: int) -> list[tuple[str, float, float]]:
    """Name, bound and figure of the goals that are ratios of two speeds on all cores."""
    ours, s3, bare = speeds["ours", "disk", cores], speeds["ours", "s3", cores], speeds["bare", "memory", cores]
    found = [
        ("speed over webdataset, local disk", 3.0, ours / speeds["webdataset", "disk", cores]),
        ("speed over webdataset, local S3", 3.0, s3 / speeds["webdataset", "s3", cores]),
        ("speed over the best peer, local disk", 2.5, ours / _best_peer(speeds, "disk")),
        ("speed over the best peer, local S3", 2.5, s3 / _best_peer(speeds, "s3")),
        ("share of the bare loop's speed", 0.92, ours / bare),
        ("local S3's share of local disk's speed", 0.8, s3 / ours),
    ]
    if marked := speeds.get(("ours marked", "disk", cores)):
        found.append(("with restart markers, over the bare loop", 1.0, marked / bare))
    return found


def _best_peer(speeds: Speeds, where: str) -> float:
    return max(speed for (side, place, _), speed in speeds.items() if place == where and side not in OWN_SIDES)


def growth(megabytes: Sequence[float]) -> float:
    """Least-squares slope, in MB an epoch, once it has settled."""
    settled = np.asarray(megabytes[SETTLED_EPOCHS:])
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
