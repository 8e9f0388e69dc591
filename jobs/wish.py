"""What the monitor wishes the ranks to do after a step. It travels as a number with the step's sum."""

from __future__ import annotations

from typing import Literal

Wish = Literal["", "stop", "pause", "save"]
"""`stop`: save and end. `pause`: save and stand still, since the group is about to end. `save`: save and go on."""

WISHES: tuple[Wish, ...] = ("", "stop", "pause", "save")

PAUSE_SECONDS = 120.0
"""For saving before a resize, and for standing still thereafter; then training goes on."""
