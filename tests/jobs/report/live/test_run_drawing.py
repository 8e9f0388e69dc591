"""What only the page of a live run has."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.metrics.rank_figures import RankFigures
from jobs.recipe.named_recipes import named_recipe
from jobs.report.live.live_figures import LiveFigures
from jobs.report.live.live_page import RUN_PARTS, frame
from jobs.report.live.run_drawing import MOST_EVENTS, MOST_RANKS, RunDrawing
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

NOW = 1_700_000_000.0
HOSTILE = "<script>alert('x')</script>&"
BEAT: dict[str, Any] = {
    "state": "running",
    "step": 30,
    "total_steps": 100,
    "updated_at_seconds": NOW - 1,
    "world_size": 2,
    "target_world_size": 4,
    "eta_seconds": 3700.0,
    "images_per_second": 1234.56,
    "mfu_ratio": 0.415,
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.of(Storage(), str(tmp_path), "first")
    directory.claim(named_recipe("tiny"))
    directory.write_heartbeat(BEAT)
    return directory


def parts_of(run: RunDirectory, live: LiveFigures | None = None) -> dict[str, str]:
    found: dict[str, str] = {}
    for drawn in RunDrawing(run, lambda: live, lambda: NOW).draw():
        assert not drawn.fault
        found |= drawn.parts
    assert set(found) == set(RUN_PARTS)
    return found


def cells(html: str) -> list[list[str]]:
    rows = re.findall("<tr>(.*?)</tr>", html)
    return [[unescape(cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in rows if "<td>" in row]


def test_the_figures_of_the_moment_come_from_the_monitor_where_there_is_one(run: RunDirectory) -> None:
    table = np.array([RankFigures(step_seconds=0.5, block_cache_hits=3, block_cache_misses=1, memory_bytes=2e9)])

    parts = parts_of(run, LiveFigures({**BEAT, "step": 40}, table))

    assert "<dt>Step</dt><dd>40 / 100</dd>" in parts["facts"]
    assert "<dt>ETA</dt><dd>1h 01m</dd>" in parts["facts"]
    assert "<dt>Images/s</dt><dd>1,234.6</dd>" in parts["facts"]
    assert "<dt>MFU now</dt><dd>41.5%</dd>" in parts["facts"]
    assert "<dt>Workers now</dt><dd>2 of 4</dd>" in parts["facts"]
    assert cells(parts["ranks"]) == [["0", "0.500", "0.000", "0", "0 B", "75%", "2.00 GB", "-", "-"]]
    assert "<dt>Step</dt><dd>30 / 100</dd>" in parts_of(run)["facts"]


def test_of_many_ranks_the_slowest_are_listed(run: RunDirectory) -> None:
    figures = [RankFigures(step_seconds=0.5 + 0.001 * (rank % 500)) for rank in range(1000)]

    ranks = parts_of(run, LiveFigures(BEAT, np.array(figures)))["ranks"]

    assert f"The {MOST_RANKS} slowest of 1,000 ranks." in ranks
    slow = {*range(500 - MOST_RANKS // 2, 500), *range(1000 - MOST_RANKS // 2, 1000)}
    assert [int(row[0]) for row in cells(ranks)] == sorted(slow)


def test_a_memory_checkpoint_is_shown_while_the_run_lives(run: RunDirectory) -> None:
    held = {
        "memory_checkpoint_step": 1230,
        "memory_checkpoint_at_seconds": NOW,
        "memory_checkpoint_bytes": 3_200_000,
        "memory_checkpoint_stall_seconds": 0.0123,
    }
    run.write_heartbeat({**BEAT, **held})
    about = "step 1,230, of 2023-11-14 22:13:20 UTC, 3.20 MB, 0.01 s of paused training."
    assert about in parts_of(run)["checkpoints"]

    run.write_heartbeat({**BEAT, **held, "state": "finished"})
    assert "In the memory" not in parts_of(run)["checkpoints"]


def test_a_run_that_fell_silent_is_interrupted_on_its_page(run: RunDirectory) -> None:
    run.write_heartbeat({**BEAT, "updated_at_seconds": NOW - 3600})

    assert 'data-state="interrupted"' in parts_of(run)["header"]


def test_the_newest_events_come_first_and_whatever_comes_from_outside_is_escaped(run: RunDirectory) -> None:
    events: list[dict[str, Any]] = [
        {"at_seconds": NOW + number, "attempt": 1, "kind": f"kind{number}{HOSTILE}", "step": number, "reason": HOSTILE}
        for number in range(2 * MOST_EVENTS)
    ]
    run.write_events(1, [*events, {**events[-1], HOSTILE: HOSTILE}])
    run.write_heartbeat({**BEAT, "state": HOSTILE, "page_url": HOSTILE})

    parts = parts_of(run)

    found = cells(parts["events"])
    assert len(found) == MOST_EVENTS
    assert found[0][2:] == [
        f"kind{2 * MOST_EVENTS - 1}{HOSTILE}",
        f"{2 * MOST_EVENTS - 1}",
        f"{HOSTILE}, {HOSTILE} {HOSTILE}",
    ]
    assert not [name for name, html in parts.items() if "<script" in html]
    assert "<script>alert" not in frame(HOSTILE, ("header",))
