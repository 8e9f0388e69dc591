"""A run whose driver ends before its monitor speaks has failed, for all who look into its directory alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.control import lease
from jobs.control.unreported_end import end_noted, note_end
from jobs.errors import OvertakenError
from jobs.recipe.named_recipes import named_recipe
from jobs.report.status import event_line, run_status
from jobs.run.directory import RunDirectory
from pipeline.errors import DatasetError
from pipeline.store.storage import Storage

GONE = DatasetError("data set", "must hold a manifest.json", "/ds", "make it")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that was submitted, and of which nobody has told anything."""
    monkeypatch.setattr(lease, "FLUSH_INTERVAL_SECONDS", 0.4)
    directory = RunDirectory.of(Storage(), str(tmp_path), "first")
    directory.claim(named_recipe("tiny"))
    return directory


def tell(run: RunDirectory, updated_at_seconds: float) -> None:
    """Write what a monitor says of a run that trains."""
    said = {"state": "running", "step": 3, "total_steps": 9, "attempt": 1, "updated_at_seconds": updated_at_seconds}
    run.write_heartbeat(said)


@pytest.fixture
def other_driver(run: RunDirectory) -> Iterator[None]:
    """Another driver, whose heartbeat moves."""
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.05):
            beats += 1
            tell(run, float(beats))

    tell(run, 0.0)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


def ended_by(run: RunDirectory, error: Exception) -> None:
    with pytest.raises(type(error)), end_noted(run, {}):
        raise error


def test_what_ends_a_driver_early_is_the_end_of_the_run(run: RunDirectory) -> None:
    assert run_status(run)["state"] == "submitted"

    ended_by(run, GONE)

    status = run_status(run)
    assert (status["state"], status["step"], status["total_steps"]) == ("failed", 0, 0)
    (event,) = run.read_events()
    assert "failed: step 0, reason data set: must hold a manifest.json, got '/ds'; make it" in event_line(event)


def test_a_resumed_run_keeps_its_figures_and_its_events(run: RunDirectory) -> None:
    run.write_heartbeat({"state": "stopped", "step": 7, "total_steps": 9, "attempt": 2, "updated_at_seconds": 5.0})
    run.write_events(2, [{"at_seconds": 5.0, "attempt": 2, "kind": "stopped", "step": 7}])

    ended_by(run, GONE)

    heartbeat = run.read_heartbeat()
    assert (heartbeat["state"], heartbeat["step"], heartbeat["attempt"]) == ("failed", 7, 2)
    assert [(event["attempt"], event["kind"], event["step"]) for event in run.read_events()] == [
        (2, "stopped", 7),
        (2, "failed", 7),
    ]


def test_a_monitor_that_has_spoken_has_the_last_word(run: RunDirectory) -> None:
    with pytest.raises(DatasetError), end_noted(run, {}):
        tell(run, time.time())
        raise GONE

    assert run.read_heartbeat()["state"] == "running"
    assert run.read_events() == []


def test_the_run_of_a_living_driver_goes_on(run: RunDirectory, other_driver: None) -> None:
    note_end(run, time.time(), "another one", {})

    assert run.read_heartbeat()["state"] == "running"
    assert run.read_events() == []


def test_a_driver_that_was_overtaken_says_nothing(run: RunDirectory) -> None:
    ended_by(run, OvertakenError("run", "is another's", "first", "wait"))

    assert run.read_heartbeat() == {}


def test_a_directory_that_is_no_run_stays_empty(tmp_path: Path) -> None:
    note_end(RunDirectory.of(Storage(), str(tmp_path), "none"), 0.0, "it was never claimed", {})

    assert list(tmp_path.iterdir()) == []
