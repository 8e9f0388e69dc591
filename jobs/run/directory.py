"""The run directory: everything that a run leaves behind, at any fsspec URL.

    <run_root>/<run>/
        recipe.json                 the resolved recipe; its presence makes the run exist
        events/attempt-0001.jsonl   events, one JSON line each: start, restart, checkpoint, finish ...
        history/0001-00000001.jsonl one JSON line per step, in parts: attempt, then first step
        history/compacted-*.npz     what many parts were compacted to, as history/compacted.json says;
                                    events/ and quarantine/ have such files, too (jobs.run.parts)
        quarantine/attempt-0001.jsonl  samples first found unusable in this attempt, one JSON line each
        left-out.json               steps that rollbacks skipped, if there were any
        heartbeat.json              the latest status of the live run
        trackers/mlflow.json        what this tracker calls the run, and how much of it it has
        tensorboard/                event files of TensorBoard
        notices.json                up to which event people were notified
        page-token.json             what the run's live page asks for, on a cluster
        stop-request.json           there until the run obeys `convmae stop`
        profile-request.json        there until the run takes what `convmae profile` asks for
        profiles/step-00000050-rank-0001/  what it asked for: trace, operators, flame graph
        set-request.json            there until the run obeys `convmae set`
        claims/claim-000001.json    which driver has it
        checkpoints/step-00000050/  native ZeRO files, a folder for each attempt of each driver
        commits/step-00000050.json  written last: without it the checkpoint does not exist
        consolidated/               weights as safetensors
        exports/                    weights in other formats
        report.html, reconstructions.png

Object stores cannot append, so events and history are written as small parts that one attempt owns and rewrites.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.errors import RunError
from jobs.run.parts import Parts, RowCodec
from jobs.run.profile_request import ProfileRequest
from jobs.run.rows import Row, checked, json_lines, parsed
from pipeline.access.places import normal
from pipeline.store.storage import Storage

if TYPE_CHECKING:  # commands that only look at a status should wait for neither
    from jobs.recipe.recipe import Recipe
    from jobs.run.stored_steps import StepFile, StoredSteps

REPORT_NAME = "report.html"
RECONSTRUCTIONS_NAME = "reconstructions.png"
STOP_REQUEST_NAME = "stop-request.json"
PROFILE_REQUEST_NAME = "profile-request.json"
SET_REQUEST_NAME = "set-request.json"
PAGE_TOKEN_NAME = "page-token.json"
HISTORY_PART_STEPS = 1000
"""Steps in one part of the history, which is the most that one flush rewrites."""

LOOKS_AT_ONCE = 16
"""Directories that are looked for side by side."""

FINAL_STATES = frozenset({"finished", "stopped", "failed"})
"""States of a heartbeat after which no driver works on the run."""

_ATTEMPT_NAME = re.compile(r"attempt-\d{4,9}\.jsonl")
"""Names of files of one attempt; other files in these folders are not this program's."""
_PART_NAME = re.compile(r"\d{4,9}-\d{8,12}\.jsonl")
RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class RunDirectory:
    """Names and formats of what is in a run directory. Holds no state; every method reads or writes storage."""

    storage: Storage
    url: str

    @classmethod
    def of(cls, storage: Storage, run_root: str, run: str) -> RunDirectory:
        """The directory of `run` under `run_root`; nothing is read.

        Raises:
            RunError: If `run` is not a usable name.
        """
        if not RUN_NAME.fullmatch(run):
            rule = "must be 1 to 63 lower-case letters, digits, '.', '_' or '-', and start with a letter or digit"
            raise RunError("run", rule, run, "choose another --run name")
        return cls(storage, storage.join(run_root, run))

    @classmethod
    def at(cls, storage: Storage, place: str) -> RunDirectory:
        """The run directory at a path or URL, as a person writes it; nothing is read.

        Raises:
            RunError: Its name cannot be that of a run.
            StorageError: It is not a URL.
        """
        root, _, name = normal(place).rpartition("/")
        return cls.of(storage, root or "/", name)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.url.rpartition("/")[2]

    @property
    def root(self) -> str:
        """The run root under which it lies."""
        return self.url.rpartition("/")[0] or "/"

    def path(self, *parts: str) -> str:
        """URL of something in the directory."""
        return self.storage.join(self.url, *parts)

    def exists(self) -> bool:
        """Whether the run was ever begun."""
        return self.storage.exists(self.path("recipe.json"))

    def read_recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            RunError: If there is no such run, or its recipe is damaged.
        """
        from jobs.recipe.recipe import Recipe

        fields = self.read_recipe_fields()
        recipe = Recipe.from_json(fields)
        return recipe if "reproducible" in fields else recipe.as_begun_before()

    def read_recipe_fields(self) -> dict[str, Any]:
        """The resolved recipe as it was written, for processes that must not import torch.

        Raises:
            RunError: If there is no such run, or its recipe is not a JSON object with a model.
        """
        url = self.path("recipe.json")
        try:
            fields = parsed(self.storage.read(url), url)
        except FileNotFoundError:
            remedy = "`convmae list` shows the runs that exist"
            raise RunError("run", "must exist", self.url, remedy) from None
        if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
            raise RunError("run directory", "must hold a recipe as a JSON object", url, "restore the file")
        return fields

    def check_recipe(self, recipe: Recipe) -> bool:
        """Whether the run exists, with this recipe. Reads only.

        Fields that only say where and how a run executes may differ from attempt to attempt.

        Raises:
            RunError: If the run exists with a recipe that computes something else.
        """
        from jobs.recipe.recipe import difference

        if not self.exists():
            return False
        if differences := difference(self.begun_recipe(recipe).trajectory(), recipe.trajectory()):
            rule = f"has another recipe under this name ({'; '.join(differences)})"
            raise RunError("run", rule, self.name, "use the same recipe to resume it, or another --run name")
        return True

    def begun_recipe(self, recipe: Recipe) -> Recipe:
        """The run's recipe; as long as its micro-batch is yet to be found, with that of another one."""
        begun = self.read_recipe()
        return begun if begun.micro_batch_size else begun.amended({"micro_batch_size": recipe.micro_batch_size})

    def claim(self, recipe: Recipe) -> bool:
        """Record `recipe` as this run's; True if the run is new.

        Raises:
            RunError: As `check_recipe`.
        """
        exists = self.check_recipe(recipe)
        self.storage.write(self.path("recipe.json"), _json_bytes(recipe.to_json()))
        return not exists

    def read_events(self) -> list[dict[str, Any]]:
        """Every event, oldest first."""
        return _flat(self.row_parts("events").read())

    def read_newest_events(self, count: int) -> list[dict[str, Any]]:
        """The `count` newest events, oldest first, of as few files as have them."""
        return _flat(self.row_parts("events").newest(count))[-count:]

    def write_events(self, attempt: int, events: Iterable[dict[str, Any]]) -> None:
        """Replace the events of one attempt."""
        self._write_lines("events", f"attempt-{attempt:04d}.jsonl", events)

    def read_steps(self, columns: Collection[str] | None = None) -> StoredSteps:
        """The history, as it was written, also steps that were redone: by attempt, then by step.

        Every reader of the history is served by this.

        Args:
            columns: Those that are needed; None: all.

        Raises:
            RunError: A part is damaged; names it.
        """
        from jobs.run.stored_steps import StoredSteps

        return StoredSteps.of(self.step_parts(columns).read(), columns)

    def step_parts(self, columns: Collection[str] | None = None) -> Parts[StepFile]:
        """The files of the history; parts as tables with some columns, None: all."""
        from jobs.run.stored_steps import StepCodec

        codec = StepCodec(None if columns is None else {"step", *columns})
        return Parts(self.storage, self.path("history"), _PART_NAME, codec)

    def read_latest_steps(self, columns: Collection[str] | None = None) -> StoredSteps:
        """One row per step, by step; for a step that was redone after a restart, that of the last attempt."""
        return self.read_steps(columns).latest()

    def read_history(self, after: int = 0) -> list[dict[str, Any]]:
        """The rows of `read_latest_steps`, as they were written; a kilobyte of memory each.

        Args:
            after: Only of steps after this one.
        """
        steps = self.read_latest_steps()
        return list((steps.where(steps.steps > after) if after else steps).rows())

    def write_history(self, attempt: int, first_step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Replace one part of the history."""
        self._write_lines("history", f"{attempt:04d}-{first_step:08d}.jsonl", rows)

    def compact(self, attempt: int, first_step: int, is_ours: Callable[[], bool]) -> bool:
        """Compact what is settled, once; returns whether there was enough. May be killed anywhere (jobs.run.parts).

        Args:
            attempt: Files of earlier attempts will never be written again.
            first_step: Nor will parts of the history of this attempt that begin before this step.
            is_ours: Whether the run is still that of the caller's driver.

        Raises:
            RunError: A part is damaged.
        """
        done = [self.step_parts().compact((attempt, first_step), is_ours)]
        return any(done + [self.row_parts(kind).compact((attempt,), is_ours) for kind in ("events", "quarantine")])

    def read_quarantine(self) -> list[dict[str, Any]]:
        """Every sample that was found unusable, once, in the order of discovery."""
        return _flat(self.row_parts("quarantine").read())

    def write_quarantine(self, attempt: int, rows: Iterable[dict[str, Any]]) -> None:
        """Replace the samples first found unusable in one attempt."""
        self._write_lines("quarantine", f"attempt-{attempt:04d}.jsonl", rows)

    def read_left_out(self) -> list[dict[str, Any]]:
        """Windows of steps that rollbacks skipped, in the order of the rollbacks."""
        url = self.path("left-out.json")
        try:
            rows = parsed(self.storage.read(url), url)
        except FileNotFoundError:
            return []
        return [checked("left-out", row, url) for row in (rows if isinstance(rows, list) else [rows])]

    def write_left_out(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the windows of steps that rollbacks skipped."""
        self.storage.write(self.path("left-out.json"), json.dumps(list(rows), indent=1).encode() + b"\n")

    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 if there was none."""
        return next(iter(self.row_parts("events").last_key()), 0)

    def write_heartbeat(self, status: dict[str, Any]) -> None:
        """Replace the status of the live run."""
        self.storage.write(self.path("heartbeat.json"), _json_bytes(status))

    def read_heartbeat(self) -> dict[str, Any]:
        """The latest status of the live run; empty before its first."""
        return self._read_object("heartbeat", self.path("heartbeat.json"))

    def read_tracked(self, tracker: str) -> dict[str, Any]:
        """What a tracker calls the run, and how much of it it has; empty before it was first opened."""
        return self._read_object("tracked", self.path("trackers", f"{tracker}.json"))

    def write_tracked(self, tracker: str, state: dict[str, Any]) -> None:
        """Replace what is known of a tracker."""
        self.storage.write(self.path("trackers", f"{tracker}.json"), _json_bytes(state))

    def read_notified(self) -> dict[str, Any]:
        """Up to which event people were notified; empty before the first notice could be sent."""
        return self._read_object("notified", self.path("notices.json"))

    def write_notified(self, state: dict[str, Any]) -> None:
        """Replace what is known of the notices."""
        self.storage.write(self.path("notices.json"), _json_bytes(state))

    def write_stop_request(self) -> None:
        """Ask the run, wherever its driver is, to save a checkpoint and end."""
        self.storage.write(self.path(STOP_REQUEST_NAME), _json_bytes({}))

    def take_stop_request(self) -> bool:
        """Whether the run was asked to stop; removes the request."""
        if not self.storage.exists(self.path(STOP_REQUEST_NAME)):
            return False
        self.storage.delete(self.path(STOP_REQUEST_NAME))
        return True

    def write_profile_request(self, request: ProfileRequest) -> None:
        """Ask the run, wherever its driver is, to profile one of its ranks."""
        self.storage.write(self.path(PROFILE_REQUEST_NAME), _json_bytes(request.to_json()))

    def take_profile_request(self) -> ProfileRequest | None:
        """The profile that the run was asked for, if it was; removes the request.

        Raises:
            RunError: It is damaged, or foreign; it is removed as well.
        """
        url = self.path(PROFILE_REQUEST_NAME)
        if not self.storage.exists(url):
            return None
        data = self.storage.read(url)
        self.storage.delete(url)
        return ProfileRequest.from_json(checked("profile-request", parsed(data, url), url))

    def change_recipe(self, change: Callable[[Recipe], Recipe]) -> tuple[Recipe, Recipe]:
        """Replace the recipe by what `change` makes of it; returns both. Nothing that others write is lost.

        Raises:
            RunError: As `read_recipe`.
            Exception: What `change` raises; nothing was written.
        """
        url = self.path("recipe.json")
        while True:
            before = self.read_recipe()
            data = self.storage.read(url)
            after = change(before)
            if self.storage.replace(url, _json_bytes(after.to_json()), data):
                return before, after

    def write_set_request(self, changes: Mapping[str, Sequence[Any]]) -> None:
        """Ask the run, wherever its driver is, to train on by its changed recipe.

        Args:
            changes: The value before and after, by field; added to those that it has not obeyed yet.
        """
        url = self.path(SET_REQUEST_NAME)
        self.storage.write(url, _json_bytes({**self._read_set_request(), **changes}))

    def take_set_request(self) -> dict[str, Sequence[Any]]:
        """Fields that were changed, with the values before and after; removes the request. Empty: none."""
        changes = self._read_set_request()
        if changes:
            self.storage.delete(self.path(SET_REQUEST_NAME))
        return changes

    def is_set_requested(self) -> bool:
        """Whether a request has not been obeyed yet."""
        return self.storage.exists(self.path(SET_REQUEST_NAME))

    def _read_set_request(self) -> dict[str, Sequence[Any]]:
        url = self.path(SET_REQUEST_NAME)
        try:
            found = parsed(self.storage.read(url), url)
        except FileNotFoundError:
            return {}
        return found if isinstance(found, dict) else {}

    def _read_object(self, kind: str, url: str) -> dict[str, Any]:
        try:
            return checked(kind, parsed(self.storage.read(url), url), url)
        except FileNotFoundError:
            return {}

    def row_parts(self, kind: str) -> Parts[list[Row]]:
        """The parts of events or of a quarantine."""
        return Parts(self.storage, self.path(kind), _ATTEMPT_NAME, RowCodec(kind))

    def read_page_token(self) -> str:
        """What the live page asks for where others than this machine reach it; empty if there is none.

        Raises:
            RunError: It is damaged.
        """
        url = self.path(PAGE_TOKEN_NAME)
        try:
            row = checked("page-token", parsed(self.storage.read(url), url), url)
        except FileNotFoundError:
            return ""
        return str(row["token"])

    def write_page_token(self, token: str) -> None:
        """Replace it."""
        self.storage.write(self.path(PAGE_TOKEN_NAME), _json_bytes({"token": token}))

    def _write_lines(self, folder: str, name: str, rows: Iterable[dict[str, Any]]) -> None:
        self.storage.write(self.path(folder, name), json_lines(rows))


def list_runs(storage: Storage, run_root: str) -> list[RunDirectory]:
    """Every run under `run_root`, by name."""
    names = filter(RUN_NAME.fullmatch, storage.list_names(run_root))
    directories = [RunDirectory(storage, storage.join(run_root, name)) for name in names]
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as threads:
        exist = list(threads.map(RunDirectory.exists, directories))
    return [directory for directory, exists in zip(directories, exist, strict=True) if exists]


def unknown_run(directory: RunDirectory, known: Sequence[str]) -> RunError:
    """The error for a run that does not exist, with the nearest name that does."""
    nearest = difflib.get_close_matches(directory.name, known, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"runs there: {', '.join(known) or 'none'}"
    return RunError("run", "must exist", directory.url, remedy)


def _flat(parts: Iterable[list[Row]]) -> list[Row]:
    return [row for part in parts for row in part]


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
