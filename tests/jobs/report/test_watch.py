from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from jobs.recipe.named_recipes import named_recipe
from jobs.report.watch import status_display, watch_run
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.of(Storage(), str(tmp_path), "first")
    directory.claim(named_recipe("tiny"))
    directory.write_events(1, [{"at_seconds": 0.0, "attempt": 1, "kind": "start", "step": 0, "reason": "new run"}])
    speak(directory, "running", 1)
    return directory


def speak(run: RunDirectory, state: str, step: int) -> None:
    beat = {"state": state, "step": step, "total_steps": 3, "loss": 1 / step, "updated_at_seconds": time.time()}
    run.write_heartbeat(beat)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def watched(run: RunDirectory, stream: io.StringIO, *, as_json: bool) -> str:
    """The output for a run that makes a step between two reads, and finishes at its third."""
    steps = iter([2, 3])

    def pause(seconds: float) -> None:
        step = next(steps)
        speak(run, "finished" if step == 3 else "running", step)

    with status_display(as_json=as_json, stream=stream) as show:
        watch_run(run, show, pause)
    return stream.getvalue()


def test_it_is_shown_until_it_ends(run: RunDirectory) -> None:
    lines = watched(run, io.StringIO(), as_json=False).splitlines()

    assert [line.partition(" · ")[0] for line in lines] == [
        "first 1/3 running",
        "first 2/3 running",
        "first 3/3 finished",
    ]


def test_json_is_one_object_a_line_with_the_events(run: RunDirectory) -> None:
    rows = [json.loads(line) for line in watched(run, io.StringIO(), as_json=True).splitlines()]

    assert [(row["step"], row["state"]) for row in rows] == [(1, "running"), (2, "running"), (3, "finished")]
    assert [event["kind"] for event in rows[0]["events"]] == ["start"]


def test_a_terminal_is_drawn_in_place(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    text = watched(run, Screen(), as_json=False)

    assert "\x1b[1A" in text  # the cursor goes up again
    assert "3 of 3" in text
    assert "new run" in text
