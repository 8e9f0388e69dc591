"""What is known of a live run beside its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.metrics.rank_figures import FigureTable


@dataclass(frozen=True)
class LiveFigures:
    """What the monitor of a run knows of this moment."""

    heartbeat: Mapping[str, Any]
    ranks: FigureTable
    """Of the newest step; none while no group trains."""
