"""Contents of a report: what is known of a run, read from its directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.metrics.utilization import GroupCompute, mean_mfu, mfu_ratios
from jobs.recipe.recipe import Recipe
from jobs.report.curves import CHARTED, History, accuracy_curve
from jobs.run.accuracy_rows import AccuracyCurve
from jobs.run.directory import RECONSTRUCTIONS_NAME, RunDirectory
from jobs.run.validation_rows import VALIDATION_COLUMNS
from pipeline.shard.manifest import SKIPPED_NAME
from pipeline.store.json_text import parsed_object


@dataclass(frozen=True)
class ReportedRun:
    """A run as its report shows it."""

    name: str
    url: str
    recipe: Recipe
    heartbeat: Mapping[str, Any]
    """Empty before the run first started."""
    events: Sequence[Mapping[str, Any]]
    history: History
    mfu_ratio: float | None
    """Over all steps that have one, by their time."""
    kept_steps: frozenset[int]
    """Checkpoints that exist now."""
    commit: Commit | None
    """The newest of them."""
    faults: Sequence[Mapping[str, Any]]
    """Samples that the run found unusable, in the order of discovery."""
    skipped: Sequence[Mapping[str, str]] | None
    """Images that the data set skipped; None if its list is gone."""
    picture: bytes | None
    """A PNG of reconstructions."""
    accuracies: AccuracyCurve
    """Over the steps: of the encoder by probes, or of a fine-tuning on its validation samples."""

    @classmethod
    def read(cls, run: RunDirectory) -> ReportedRun:
        """Read everything from storage.

        Raises:
            RunError: If there is no such run.
        """
        recipe = run.read_recipe()
        events = run.read_events()
        steps = run.read_latest_steps({*CHARTED, *VALIDATION_COLUMNS, "attempt"})
        ratios = mfu_ratios(steps, events)
        skipped = _read_or_none(run, run.storage.join(recipe.data, SKIPPED_NAME)) if recipe.data else None
        return cls(
            name=run.name,
            url=run.url,
            recipe=recipe,
            heartbeat=run.read_heartbeat(),
            events=events,
            history=History.of(steps, ratios),
            mfu_ratio=mean_mfu(ratios, steps.numbers("step_seconds")),
            accuracies=accuracy_curve(recipe, events, steps),
            kept_steps=frozenset(checkpoint.committed_steps(run)),
            commit=checkpoint.latest_commit(run),
            faults=run.read_quarantine(),
            skipped=None if skipped is None else list(_skipped_rows(skipped)),
            picture=_read_or_none(run, run.path(RECONSTRUCTIONS_NAME)),
        )

    @property
    def state(self) -> str:
        """The latest state of the run."""
        return str(self.heartbeat.get("state", "not started"))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.heartbeat.get("step", 0))

    @property
    def devices(self) -> list[str]:
        """What its attempts trained on, in order, each once."""
        return list(dict.fromkeys(compute.devices for compute in GroupCompute.of_attempts(self.events).values()))

    @property
    def ending(self) -> str:
        """Why the run ended early; empty if it did not."""
        if self.state not in ("stopped", "failed"):
            return ""
        return next((str(event["reason"]) for event in reversed(self.events) if event["kind"] == self.state), "")

    @property
    def heard_at(self) -> float:
        """When the run was last heard of, as Unix time; 0 if never."""
        said = self.events[-1]["at_seconds"] if self.events else 0.0
        return float(self.heartbeat.get("updated_at_seconds", said))

    @property
    def attempts(self) -> list[Mapping[str, Any]]:
        """The events that began an attempt."""
        return [event for event in self.events if "steps_redone" in event]


def _skipped_rows(data: bytes) -> Iterator[Mapping[str, str]]:
    """Rows of a data set's list of skipped images; invalid ones are ignored, since this is a report of the run."""
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            row = parsed_object(line)
            if isinstance(row.get("path"), str) and isinstance(row.get("reason"), str):
                yield row


def _read_or_none(run: RunDirectory, url: str) -> bytes | None:
    try:
        return run.storage.read(url)
    except FileNotFoundError:
        return None
