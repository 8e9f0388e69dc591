"""Several runs on one page: how each is doing, from the run directories alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from jobs.errors import RunError
from jobs.report.live.followed_run import SELDOM_SECONDS
from jobs.report.live.live_parts import Drawn
from jobs.report.page import Link, paragraph, table
from jobs.report.report import time_text
from jobs.report.status import current_state
from jobs.run.accuracy_text import accuracies_text
from jobs.run.directory import FINAL_STATES, RUN_NAME, RunDirectory
from jobs.run.probe_rows import MAIN_PROBE
from jobs.run.validation_rows import MAIN_VALIDATION
from jobs.terminal import duration_text, figure
from pipeline.store.storage import Storage

READERS = 8
"""Runs that are read at once."""
LIST_PARTS = ("title", "runs")
"""Parts of the page of several runs, in its order."""


class RunsUnder:
    """The runs under a root; that one exists is asked once. Concurrency: none. Blocking: waits for storage."""

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage, self.root = storage, root
        self._known: dict[str, RunDirectory] = {}

    def __call__(self) -> list[RunDirectory]:
        """Those that there are now."""
        names = [name for name in self._storage.list_names(self.root) if RUN_NAME.fullmatch(name)]
        new = [RunDirectory.of(self._storage, self.root, name) for name in names if name not in self._known]
        with ThreadPoolExecutor(READERS) as pool:
            found = {
                run.name: run for run, exists in zip(new, pool.map(RunDirectory.exists, new), strict=True) if exists
            }
        self._known = {name: self._known.get(name) or found[name] for name in names if name in {**self._known, **found}}
        return list(self._known.values())


class RunList:
    """Makes the page of several runs. Concurrency: `runs` may be read by any thread. Blocking: waits for storage."""

    def __init__(self, found: Callable[[], Sequence[RunDirectory]], where: str, wall: Callable[[], float] = time.time):
        """Read which runs there are.

        Args:
            found: Those that there are now.
            where: What they are, for people.
            wall: Unix seconds.

        Raises:
            StorageError: The store does not answer.
        """
        self._found, self._where, self._wall = found, where, wall
        self._ended: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self.runs = keyed(found())
        """By what stands for each in addresses."""

    def draw(self) -> Iterator[Drawn]:
        """How each run is doing now.

        Raises:
            StorageError: The store does not answer.
            OSError: It does not answer as it should.
        """
        now = self._wall()
        self.runs = keyed(self._found())
        with ThreadPoolExecutor(READERS) as pool:
            beats = list(pool.map(lambda run: self._heartbeat(run, now), self.runs.values()))
        rows = sorted(zip(self.runs.items(), beats, strict=True), key=lambda row: _rank(row[1], now))
        cells = [run_cells(key, run, beat, now) for (key, run), beat in rows]
        title = f"<h1>{len(rows):,} runs</h1>{paragraph(self._where)}"
        yield Drawn({"title": title, "runs": table(HEAD, cells)}, now)

    def close(self) -> None:
        """Nothing is held open."""

    def _heartbeat(self, run: RunDirectory, now: float) -> Mapping[str, Any]:
        """Of a run that has ended it is read seldom, since a run may be resumed."""
        read_at, known = self._ended.get(run.url, (0.0, {}))
        if now - read_at < SELDOM_SECONDS:
            return known
        try:
            found: Mapping[str, Any] = run.read_heartbeat()
        except RunError as error:
            return {"state": "unreadable", "error": str(error)}
        if found.get("state") in FINAL_STATES:
            self._ended[run.url] = now, found
        else:
            self._ended.pop(run.url, None)
        return found


HEAD = ("run", "state", "step", "loss", "accuracy", "ETA", "images/s", "workers", "last heard of (UTC)")


def run_cells(key: str, run: RunDirectory, heartbeat: Mapping[str, Any], now_seconds: float) -> tuple[object, ...]:
    """One run; text, and a link to its page."""
    total, heard = heartbeat.get("total_steps", 0), heartbeat.get("updated_at_seconds")
    state = current_state(heartbeat, now_seconds)
    is_over = state in (*FINAL_STATES, "interrupted", "unreadable")
    step = heartbeat.get("step", 0)
    return (
        Link(run.name, f"runs/{quote(key, safe='')}/"),
        state,
        f"{step:,} of {total:,} ({step / total:.0%})" if total else "-",
        figure(heartbeat.get("loss"), ".4f"),
        _accuracy(heartbeat),
        "-" if is_over else duration_text(heartbeat.get("eta_seconds")),
        "-" if is_over else figure(heartbeat.get("images_per_second"), ",.0f"),
        "-" if is_over else figure(heartbeat.get("world_size"), ".0f"),
        heartbeat.get("error") or (time_text(heard) if heard else "-"),
    )


def _accuracy(heartbeat: Mapping[str, Any]) -> str:
    newest = {MAIN_VALIDATION: heartbeat.get(MAIN_VALIDATION), **(heartbeat.get("probe_accuracies") or {})}
    shown = {name: newest[name] for name in (MAIN_VALIDATION, MAIN_PROBE) if newest.get(name) is not None}
    return accuracies_text(shown) or "-"


def _rank(heartbeat: Mapping[str, Any], now_seconds: float) -> tuple[bool, float]:
    """Live runs first, then those that were heard of last."""
    return current_state(heartbeat, now_seconds) in FINAL_STATES, -float(heartbeat.get("updated_at_seconds", 0.0))


def keyed(runs: Sequence[RunDirectory]) -> dict[str, RunDirectory]:
    """Runs by their names; where two have the same, with something of their URLs."""
    names = [run.name for run in runs]
    return {
        run.name
        if names.count(run.name) == 1
        else f"{run.name}~{hashlib.sha256(run.url.encode()).hexdigest()[:8]}": run
        for run in runs
    }
