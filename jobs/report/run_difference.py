"""Difference of two runs, exactly: recipes, software, data, attempts, and the step at which their histories part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.metrics.utilization import GroupCompute
from jobs.recipe.differences import differing_fields, is_default, is_placement
from jobs.recipe.recipe import Recipe
from jobs.report.status import world_sizes_text
from jobs.run.directory import RunDirectory
from jobs.run.step_table import COLUMNS, StepTable
from jobs.run.stored_steps import StoredSteps
from jobs.terminal import figure
from pipeline.errors import UserError
from pipeline.shard.manifest import Manifest

COMPARED = {
    "samples": "set of samples",
    "learning_rate": "learning rate",
    "loss": "loss",
    "skipped": "reason to be skipped",
    "digest": "digest of all weights",
}
"""What of a step is compared, and its name for people."""
SPARSE = frozenset({"samples", "digest"})
"""Not in every row: compared where both have it."""
_COLUMNS = ("step", *COMPARED)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DiffedRun:
    """One of the two."""

    name: str
    url: str
    recipe: Recipe
    heartbeat: Row
    """Empty before the run first started."""
    attempts: Sequence[Row]
    """Events that began one."""
    history: StoredSteps
    """By step; of a step that was done again, the last time."""
    commit: Commit | None
    """The newest."""

    @classmethod
    def read(cls, run: RunDirectory) -> DiffedRun:
        """Read its directory.

        Raises:
            UserError: There is no such run, or it is damaged.
        """
        return cls(
            name=run.name,
            url=run.url,
            recipe=run.read_recipe(),
            heartbeat=run.read_heartbeat(),
            attempts=[event for event in run.read_events() if "steps_redone" in event],
            history=run.read_latest_steps(_COLUMNS),
            commit=checkpoint.latest_commit(run),
        )

    def final_state(self) -> dict[str, Any]:
        """How far it came, and in how many attempts."""
        last = self.history.where(slice(-1, None))
        return {
            "state": self.heartbeat.get("state", "not started"),
            "step": self.heartbeat.get("step", 0),
            "total_steps": self.heartbeat.get("total_steps", 0),
            "loss": next((row["loss"] for row in last.rows()), None),
            "checkpoint_step": self.commit.step if self.commit else None,
            "attempts": len(self.attempts),
            "workers": [event["world_size"] for event in self.attempts],
            "restarts": sum(event["kind"] == "restart" for event in self.attempts),
            "resizes": sum(event["kind"] == "resize" for event in self.attempts),
            "steps_redone": sum(event["steps_redone"] for event in self.attempts),
            "devices": [compute.devices for compute in GroupCompute.of_attempts(self.attempts).values()],
        }


@dataclass(frozen=True)
class Parting:
    """The first step at which something differs."""

    what: str
    """One of COMPARED."""
    step: int
    values: tuple[Any, Any]


@dataclass(frozen=True)
class HistoryDifference:
    """Two histories, step by step."""

    common_steps: int
    """Steps that both have."""
    digests: int
    """Of these, steps of which both have a digest of all weights and moments."""
    partings: tuple[Parting, ...]
    """By COMPARED; empty where the histories agree."""

    @classmethod
    def of(cls, one: StoredSteps, other: StoredSteps) -> HistoryDifference:
        """Compare two runs exactly, given one row a step, by step."""
        if not np.array_equal(one.steps, other.steps):
            _, *places = np.intersect1d(one.steps, other.steps, assume_unique=True, return_indices=True)
            one, other = (side.where(place) for side, place in zip((one, other), places, strict=True))
        digests, partings = 0, dict[str, Parting]()
        for both in zip(one.blocks(), other.blocks(), strict=True):
            digests += int(np.sum((both[0].texts("digest") != b"") & (both[1].texts("digest") != b"")))
            for what in COMPARED.keys() - partings:
                if (parting := _parting(what, *both)) is not None:
                    partings[what] = parting
        return cls(len(one), digests, tuple(partings[what] for what in COMPARED if what in partings))

    @property
    def first_step(self) -> int | None:
        """The first step that differs in anything."""
        return min((parting.step for parting in self.partings), default=None)

    def lines(self) -> Iterator[str]:
        """For people."""
        if not self.common_steps:
            yield "history: no step that both have"
            return
        if not self.partings:
            steps, digests = f"{self.common_steps:,}", f"{self.digests:,}"
            yield f"history: the same in all {steps} steps that both have; digests of all weights compared: {digests}"
        for parting in sorted(self.partings, key=lambda parting: parting.step):
            one, other = (_text(value) for value in parting.values)
            what = COMPARED[parting.what]
            yield f"history: step {parting.step:,} is the first with another {what}: {one} and {other}"


def _parting(what: str, one: StepTable, other: StepTable) -> Parting | None:
    """The first of some common steps at which a column, by its name, differs."""
    is_text = COLUMNS[what] is str
    columns = [side.texts(what) if is_text else side.numbers(what) for side in (one, other)]
    missing = [column == b"" if is_text else np.isnan(column) for column in columns]
    differs = (columns[0] != columns[1]) & ~(missing[0] | missing[1])
    if what not in SPARSE:
        differs |= missing[0] ^ missing[1]
    if not differs.any():
        return None
    first = int(differs.argmax())
    values = [None if none[first] else column[first].item() for column, none in zip(columns, missing, strict=True)]
    texts = [value.decode() if isinstance(value, bytes) else value for value in values]
    return Parting(what, int(one.steps[first]), (texts[0], texts[1]))


@dataclass(frozen=True)
class RunDifference:
    """All in which two runs differ."""

    runs: tuple[DiffedRun, DiffedRun]
    fields: Mapping[str, Sequence[Any]]
    """Of their recipes."""
    versions: Mapping[str, tuple[str | None, str | None]]
    """Of the software that made their newest checkpoints; None where it is not known."""
    data: Mapping[str, tuple[Any, Any]]
    """What differs of their datasets."""
    history: HistoryDifference

    @classmethod
    def between(cls, one: RunDirectory, other: RunDirectory) -> RunDifference:
        """Read both, and compare.

        Raises:
            UserError: As `DiffedRun.read`.
        """
        runs = (DiffedRun.read(one), DiffedRun.read(other))
        made_with = [dict(run.commit.versions) if run.commit else {} for run in runs]
        return cls(
            runs=runs,
            fields=differing_fields([run.recipe for run in runs]),
            versions=_apart(*made_with),
            data=_data_apart((one, other), runs),
            history=HistoryDifference.of(runs[0].history, runs[1].history),
        )

    def names(self) -> list[str]:
        """Of the two; URLs where they have the same."""
        one, other = self.runs
        return [one.url, other.url] if one.name == other.name else [one.name, other.name]

    def field_rows(self) -> list[tuple[str, str, str, str]]:
        """Field, both values, and what it decides."""
        return [
            (field, _marked(field, one), _marked(field, other), "placement" if is_placement(field) else "trajectory")
            for field, (one, other) in self.fields.items()
        ]

    def origin_rows(self) -> list[tuple[str, str, str]]:
        """What differs of software and data."""
        found = {**self.versions, **{f"dataset {name}": values for name, values in self.data.items()}}
        return [(name, _text(one), _text(other)) for name, (one, other) in found.items()]

    def origin_note(self) -> str:
        """Why there is no row of them; empty where there is one."""
        if self.versions or self.data:
            return ""
        known = all(run.commit for run in self.runs)
        return f"software and data: {'the same' if known else 'not known without a checkpoint of both'}"

    def state_rows(self) -> list[tuple[str, str, str]]:
        """How far both came."""
        one, other = (_state_texts(run.final_state()) for run in self.runs)
        return [(name, one[name], other[name]) for name in one]

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "recipe": [
                {
                    "field": field,
                    "values": list(values),
                    "defaults": [is_default(field, value) for value in values],
                    "placement": is_placement(field),
                }
                for field, values in self.fields.items()
            ],
            "versions": {name: list(values) for name, values in self.versions.items()},
            "dataset": {name: list(values) for name, values in self.data.items()},
            "history": {**asdict(self.history), "first_step": self.history.first_step},
            "runs": [{"run": run.name, "url": run.url, **run.final_state()} for run in self.runs],
        }


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs of two mappings; None where one lacks it."""
    names = dict.fromkeys([*one, *other])
    return {name: pair for name in names if (pair := (one.get(name), other.get(name)))[0] != pair[1]}


def _data_apart(
    directories: tuple[RunDirectory, RunDirectory], runs: tuple[DiffedRun, DiffedRun]
) -> dict[str, tuple[Any, Any]]:
    digests = {run.commit.dataset_digest if run.commit else None for run in runs}
    if len(digests) == 1 and None not in digests:
        return {}  # wherever it lies, and without asking there
    return _apart(*(_dataset(directory, run) for directory, run in zip(directories, runs, strict=True)))


def _dataset(directory: RunDirectory, run: DiffedRun) -> dict[str, Any]:
    """The dataset that a run trains on; sizes where its manifest is still that of the run."""
    found: dict[str, Any] = {"digest": run.commit.dataset_digest if run.commit else None}
    if not run.recipe.data:
        return found
    with contextlib.suppress(UserError, OSError):  # it may be gone, or out of reach from here
        manifest = Manifest.load(directory.storage, run.recipe.data)
        if found["digest"] in (None, manifest.digest):
            found = {"digest": manifest.digest, "samples": manifest.samples, "shards": len(manifest.shards)}
    return found


def _marked(field: str, value: Any) -> str:
    return _text(value) + (" (default)" if is_default(field, value) else "")


def _text(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)


def _state_texts(state: Mapping[str, Any]) -> dict[str, str]:
    return {
        "state": str(state["state"]),
        "step": f"{state['step']:,} of {state['total_steps']:,}",
        "last loss": figure(state["loss"], ".6f"),
        "newest checkpoint": _text(state["checkpoint_step"]),
        "attempts": f"{state['attempts']:,}: {state['restarts']:,} restarts, {state['resizes']:,} resizes",
        "workers": world_sizes_text(state["workers"]) or "-",
        "steps redone": f"{state['steps_redone']:,}",
        "devices": " → ".join(dict.fromkeys(state["devices"])) or "-",
    }
