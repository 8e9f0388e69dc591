"""Settings of a live run that a person changes with `convmae set`, and who follows them when."""

from __future__ import annotations

from typing import NamedTuple

from jobs.recipe.recipe import Recipe


class Settings(NamedTuple):
    """What the controller follows: picklable."""

    min_workers: int = 0
    """0: nothing was changed since the driver began."""
    max_workers: int = 0
    resize_seconds: float = 0.0
    version: int = 0
    """How often something was changed. A group that was started before the newest change should begin anew."""


class ChangedSettings:
    """What was changed. The monitor's, which locks."""

    def __init__(self) -> None:
        """Nothing, yet."""
        self._settings = Settings()
        self.reason = ""
        """Of the next attempt, where it begins for this."""

    def changed(self, recipe: Recipe, text: str) -> None:
        """Note the run's recipe, and in words what is new in it."""
        version = self._settings.version + 1
        self._settings = Settings(recipe.min_workers, recipe.max_workers, recipe.resize_seconds, version)
        self.reason = f"{self.reason}, {text}" if self.reason else text

    def begin_attempt(self) -> str:
        """Note that ranks read the recipe now; returns what they are the first to follow."""
        reason, self.reason = self.reason, ""
        return reason

    def now(self) -> Settings:
        """What is to be followed."""
        return self._settings
