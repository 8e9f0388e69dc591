"""The parts of a run's page: those of its report, and what only a live run has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jobs.metrics.rank_figures import RankFigures
from jobs.recipe.differences import recipe_fields
from jobs.report import report
from jobs.report.live.followed_run import FollowedRun
from jobs.report.live.live_figures import LiveFigures
from jobs.report.live.live_parts import Drawn, fault_text
from jobs.report.page import facts_html, pairs, paragraph, section, table
from jobs.report.reported_run import ReportedRun
from jobs.report.status import current_state
from jobs.run.directory import FINAL_STATES, RunDirectory
from jobs.terminal import bytes_text, duration_text, figure
from pipeline.errors import UserError

MOST_RANKS = 64
"""Ranks that are listed; of more, the slowest."""
MOST_EVENTS = 30
"""Newest events that are listed."""


class RunDrawing:
    """Makes the parts of one run's page from its directory, which it follows.

    Concurrency: none; charts of one process are drawn in turn, since matplotlib's settings are of the process.
    """

    def __init__(
        self, run: RunDirectory, figures: Callable[[], LiveFigures | None], wall: Callable[[], float] = time.time
    ) -> None:
        """Read nothing yet.

        Args:
            run: The directory.
            figures: Of this moment; None where they are only known from the directory.
            wall: Unix seconds.
        """
        self._followed, self._figures, self._wall = FollowedRun(run), figures, wall
        self._seen: ReportedRun | None = None
        self._read_at_seconds = 0.0
        self._drawn_of: tuple[object, ...] = ()

    def draw(self) -> Iterator[Drawn]:
        """All parts; charts come last, and only where they changed.

        Raises:
            UserError: Nothing was read yet, and nothing can be.
            OSError: The same.
        """
        live, fault = self._figures(), ""
        try:
            self._seen = self._followed.read(live.heartbeat if live else None)
            self._read_at_seconds = self._wall()
        except (OSError, UserError) as error:
            if self._seen is None:
                raise
            fault = fault_text(error)
            if live:
                self._seen = replace(self._seen, heartbeat=live.heartbeat)
        state = current_state(self._seen.heartbeat, self._read_at_seconds)
        run = replace(self._seen, heartbeat={**self._seen.heartbeat, "state": state} if self._seen.heartbeat else {})
        yield Drawn(quick_parts(run, live), self._read_at_seconds, fault)
        if (drawn_of := _drawn_of(run)) != self._drawn_of:
            yield Drawn(charts(run), self._read_at_seconds, fault)
            self._drawn_of = drawn_of

    def close(self) -> None:
        """Nothing is held open."""


def quick_parts(run: ReportedRun, live: LiveFigures | None) -> dict[str, str]:
    """All parts but the charts. All outside text is escaped."""
    heartbeat = run.heartbeat
    is_live = bool(heartbeat) and run.state not in FINAL_STATES
    held = paragraph(memory_text(heartbeat)) if is_live and heartbeat.get("memory_checkpoint_step") else ""
    return {
        "header": report.header(run),
        "facts": facts_html([*(live_facts(heartbeat) if is_live else ()), *report.facts(run)]),
        "ranks": section("Ranks", rank_rows(run, live)) if is_live else "",
        "attempts": section("Attempts", report.attempt_bars(run) + report.attempt_rows(run)),
        "checkpoints": section("Checkpoints", held + report.checkpoints(run)),
        "events": section("Newest events", event_rows(run)),
        "faults": section("Data faults", report.data_faults(run)),
        "reconstructions": section("Reconstructions", report.reconstructions(run)),
        "recipe": section("Recipe", pairs(recipe_fields(run.recipe))),
    }


def charts(run: ReportedRun) -> dict[str, str]:
    """The parts that take long."""
    return {
        "training": section("Training", report.training(run)),
        "accuracy": section("Accuracy", report.accuracy(run)),
    }


def _drawn_of(run: ReportedRun) -> tuple[object, ...]:
    """What the charts show: equal ones need not be drawn again."""
    newest = run.history.last_step if len(run.history) else None
    failed = sum(event["kind"] == "probe-failed" for event in run.events)
    return len(run.history), newest, len(run.attempts), run.accuracies, failed, run.heartbeat.get("steps_per_epoch")


def live_facts(heartbeat: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of this moment, by name; text."""
    workers, most = heartbeat.get("world_size"), heartbeat.get("target_world_size")
    yield "ETA", duration_text(heartbeat.get("eta_seconds"))
    yield "Images/s", figure(heartbeat.get("images_per_second"), ",.1f")
    yield "Learning rate", figure(heartbeat.get("learning_rate"), ".3e")
    yield "Workers now", f"{figure(workers, '.0f')} of {figure(most, '.0f')}"
    yield "MFU now", figure(heartbeat.get("mfu_ratio"), ".1%")
    yield "Data wait", figure(heartbeat.get("data_wait_ratio"), ".1%")


def memory_text(heartbeat: Mapping[str, Any]) -> str:
    """The newest memory checkpoint of a heartbeat that has one."""
    parts = [f"In the memory of nodes: step {heartbeat['memory_checkpoint_step']:,}"]
    if (at := heartbeat.get("memory_checkpoint_at_seconds")) is not None:
        parts.append(f"of {report.time_text(at)} UTC")
    if (size := heartbeat.get("memory_checkpoint_bytes")) is not None:
        parts.append(bytes_text(size))
    if (stall := heartbeat.get("memory_checkpoint_stall_seconds")) is not None:
        parts.append(f"{stall:.2f} s of paused training")
    return f"{', '.join(parts)}."


def rank_rows(run: ReportedRun, live: LiveFigures | None) -> str:
    """How each rank fares in the newest step; the slowest ones of many."""
    if live is None:
        where = run.heartbeat.get("page_url")
        return paragraph("Figures of single ranks are on the run's own page" + (f": {where}" if where else "."))
    if not len(live.ranks):
        return paragraph("No rank trains now.")
    ranks = [(rank, RankFigures(*row)) for rank, row in enumerate(live.ranks.tolist())]
    slowest = sorted(ranks, key=lambda each: -each[1].step_seconds)[:MOST_RANKS]
    head = (
        "rank",
        "step (s)",
        "data wait (s)",
        "requests",
        "read",
        "from the cache",
        "memory",
        "GPU memory",
        "disk free",
    )
    rows = [
        (
            rank,
            f"{each.step_seconds:.3f}",
            f"{each.data_wait_seconds:.3f}",
            f"{each.storage_requests:,.0f}",
            bytes_text(each.storage_read_bytes),
            _hits_text(each),
            bytes_text(each.memory_bytes),
            bytes_text(each.device_memory_bytes) if each.device_memory_bytes else "-",
            f"{each.disk_free_ratio:.0%}" if each.disk_free_ratio else "-",
        )
        for rank, each in sorted(slowest)
    ]
    note = f"The {MOST_RANKS} slowest of {len(ranks):,} ranks." if len(ranks) > MOST_RANKS else ""
    return (paragraph(note) if note else "") + table(head, rows)


def _hits_text(rank: RankFigures) -> str:
    asked = rank.block_cache_hits + rank.block_cache_misses
    return f"{rank.block_cache_hits / asked:.0%}" if asked else "-"


def event_rows(run: ReportedRun) -> str:
    """The newest events, the last one first."""
    shown = ("at_seconds", "attempt", "kind", "step", "reason")
    rows = [
        (
            report.time_text(event["at_seconds"]),
            event["attempt"],
            event["kind"],
            f"{event['step']:,}",
            ", ".join(_field_texts({name: value for name, value in event.items() if name not in shown}, event)),
        )
        for event in reversed(run.events[-MOST_EVENTS:])
    ]
    return table(("time (UTC)", "attempt", "what", "at step", "about it"), rows) if rows else paragraph("None yet.")


def _field_texts(others: Mapping[str, Any], event: Mapping[str, Any]) -> Iterator[str]:
    if event.get("reason"):
        yield str(event["reason"])
    for name, value in others.items():
        if value not in (None, ""):
            yield f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
