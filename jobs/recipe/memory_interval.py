"""The interval between memory checkpoints that is chosen where the recipe says `auto`."""

from __future__ import annotations

import math

SHARE_OF_TIME = 0.01
"""Of training that memory checkpoints may cost."""


def auto_interval_steps(cost_seconds: float, step_seconds: float) -> int:
    """Steps from one to the next, so that they cost SHARE_OF_TIME; at least one.

    Args:
        cost_seconds: Of one, for which training stands still.
        step_seconds: Of one step.
    """
    return max(1, math.ceil(cost_seconds / (SHARE_OF_TIME * step_seconds)))
