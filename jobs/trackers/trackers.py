"""The trackers of a run: which there are, what they need, and their feeds."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.errors import RecipeError, TrackerError
from jobs.recipe.carried import MLFLOW_PREFIX, WANDB_PREFIX, carried_variables
from jobs.recipe.recipe import Recipe, TrackerName
from jobs.run.directory import RunDirectory
from jobs.trackers.feed import MOST_WAITING, SEND_SECONDS, FedRun, Report, TrackerFeed
from jobs.trackers.tracker import TrackedRun, Tracker, TrackerKind

END_SECONDS = 30.0
"""How long the end of a run waits for its trackers, all together."""
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own is 120 s and 7 retries for one request. A feed repeats it, and reports meanwhile that it has to."""


def _open_tensorboard(run: TrackedRun) -> Tracker:
    from jobs.trackers.tensorboard_files import TensorBoardFiles

    return TensorBoardFiles(run)


def _open_mlflow(run: TrackedRun) -> Tracker:
    from jobs.trackers.mlflow_run import MlflowRun

    return MlflowRun(run)


def _open_wandb(run: TrackedRun) -> Tracker:
    from jobs.trackers.wandb_run import WandbRun

    return WandbRun(run)


KINDS: Mapping[TrackerName, TrackerKind] = {
    "tensorboard": TrackerKind(_open_tensorboard, forgets=True),
    "mlflow": TrackerKind(_open_mlflow, forgets=False),
    "wandb": TrackerKind(_open_wandb, forgets=False),
}


@dataclass(frozen=True)
class TrackerSettings:
    """What the monitor of a run needs to know of its trackers."""

    names: tuple[TrackerName, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Flat: `model.<field>`."""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Their variables; may hold secrets."""
    send_seconds: float = SEND_SECONDS
    most_waiting: int = MOST_WAITING
    end_seconds: float = END_SECONDS

    @classmethod
    def of(cls, recipe: Recipe, environ: Mapping[str, str]) -> TrackerSettings:
        """Those of a recipe, with the variables of the shell that began the run."""
        prefixes = (MLFLOW_PREFIX, WANDB_PREFIX)
        variables = {name: value for name, value in carried_variables(environ).items() if name.startswith(prefixes)}
        return cls(recipe.tracker, _flat(recipe.to_json()), {**_PATIENCE, **variables} if recipe.tracker else {})


def check_trackers(recipe: Recipe, environ: Mapping[str, str], *, drives: bool) -> None:
    """Refuse a tracker that cannot work, before anything starts.

    Args:
        recipe: Names them.
        environ: Of the session.
        drives: Whether the monitor will work with this process's packages.

    Raises:
        RecipeError: A variable is missing without which what is sent would be lost.
        TrackerError: A library is missing.
    """
    if drives and (missing := [name for name in recipe.tracker if importlib.util.find_spec(name) is None]):
        remedy = "pip install 'convmae-pretrain[trackers]' where the driver runs, or leave it out"
        raise TrackerError("tracker", "needs a package that is not installed", missing[0], remedy)
    given = carried_variables(environ)
    if "mlflow" in recipe.tracker and "MLFLOW_TRACKING_URI" not in given:
        remedy = "export MLFLOW_TRACKING_URI=http://HOST:5000, or leave it out of tracker"
        raise RecipeError("tracker", "must know its server by MLFLOW_TRACKING_URI", "mlflow", remedy)
    if "wandb" in recipe.tracker:
        is_offline = given.get("WANDB_MODE") in ("offline", "dryrun")
        needed = "WANDB_DIR" if is_offline else "WANDB_API_KEY"
        if needed not in given and given.get("WANDB_MODE") != "disabled":
            why = "its folder for offline runs" if is_offline else "its key"
            remedy = f"export {needed}, or WANDB_MODE=offline WANDB_DIR=/folder of the driver's node"
            raise RecipeError("tracker", f"must know {why} by {needed}", "wandb", remedy)


class Trackers:
    """The feeds of a run's trackers. Concurrency and failure: as `TrackerFeed`."""

    def __init__(
        self,
        settings: TrackerSettings,
        directory: RunDirectory,
        global_batch_size: int,
        events: Iterable[Mapping[str, Any]],
        report: Report,
    ) -> None:
        """Start them.

        Args:
            settings: Which, and how they are reached.
            directory: Of the run.
            global_batch_size: Images in a step.
            events: All of the run's events so far.
            report: Takes what becomes of them, as events.
        """
        os.environ.update(settings.environ)  # where their libraries look; the monitor has its process for itself
        self._end_seconds = settings.end_seconds
        run = FedRun(
            directory,
            settings.recipe,
            settings.environ,
            global_batch_size,
            settings.send_seconds,
            settings.most_waiting,
        )
        known = list(events)
        self._feeds = [TrackerFeed(name, KINDS[name], run, known, report) for name in settings.names]

    def see_row(self, row: Mapping[str, Any], gradient_norm: float | None) -> None:
        """Take the history row of a step, and the norm of its gradient."""
        for feed in self._feeds:
            feed.see_row(row, gradient_norm)

    def see_event(self, event: Mapping[str, Any]) -> None:
        """Take an event."""
        for feed in self._feeds:
            feed.see_event(event)

    def end(self, outcome: str) -> None:
        """Send what is left, and how the run ended; returns within the settings' `end_seconds`."""
        for feed in self._feeds:
            feed.end(outcome)
        deadline = time.monotonic() + self._end_seconds
        for feed in self._feeds:
            feed.leave(max(0.0, deadline - time.monotonic()))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
