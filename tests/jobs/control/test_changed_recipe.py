"""Fields of a live run that a person changes: which, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from monitored_runs import Start, begin, last_event, record, scraped

from jobs.control.changed_recipe import changed_live
from jobs.errors import RecipeError, RunError
from jobs.monitor.settings import Settings
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

TINY = named_recipe("tiny")


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    run.claim(TINY)
    return run


def test_what_is_changed_stays_in_the_recipe(begun: RunDirectory) -> None:
    found = changed_live(begun, ["loader_threads=3", f"max_workers={TINY.max_workers}"], "first")

    assert found == {"loader_threads": (TINY.loader_threads, 3)}
    assert begun.read_recipe() == TINY.amended({"loader_threads": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loader_thread=3", "did you mean loader_threads"),
        ("loader_threads=0", "greater than 0"),
        ("min_workers=5", "must be at most max_workers"),
    ],
)
def test_what_no_recipe_can_have_is_refused(begun: RunDirectory, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed_live(begun, [change], "first")
    assert begun.read_recipe() == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=3", "seed: must stay as it is for the life of a run, since it decides what is computed, got 3"),
        ("cpus_per_worker=2", "`convmae stop first`, then `convmae resume first cpus_per_worker=2`: no step is lost"),
        ("metrics_port=9000", "must stay as it is while the run's driver lives"),
        ("model.mask_ratio=0.5", "model.mask_ratio: must stay as it is for the life of a run"),
    ],
)
def test_what_a_live_run_cannot_have_is_refused_with_the_way_to_it(
    begun: RunDirectory, change: str, message: str
) -> None:
    with pytest.raises(RunError) as caught:
        changed_live(begun, [change], "first")
    assert message in str(caught.value)
    assert begun.read_recipe() == TINY


def test_a_micro_batch_is_not_looked_for_again(begun: RunDirectory) -> None:
    with pytest.raises(RunError, match="micro_batch_size: must be a number in a run that has begun, got 'auto'"):
        changed_live(begun, ["micro_batch_size=auto"], "first")


def test_a_micro_batch_that_makes_other_grains_is_refused(begun: RunDirectory) -> None:
    with pytest.raises(RunError, match=r"would change what the run computes \(grain_size"):
        changed_live(begun, ["micro_batch_size=1"], "first")
    assert begun.read_recipe() == TINY


def test_two_who_change_a_recipe_at_once_lose_nothing(begun: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    replace: Callable[..., bool] = Storage.replace
    others = iter([True])

    def beaten(storage: Storage, url: str, data: bytes, expected: bytes) -> bool:
        if next(others, False):
            begun.claim(TINY.amended({"keep_checkpoints": 9}))
        return replace(storage, url, data, expected)

    monkeypatch.setattr(Storage, "replace", beaten)

    changed_live(begun, ["loader_threads=3"], "first")

    assert begun.read_recipe() == TINY.amended({"loader_threads": 3, "keep_checkpoints": 9})


def test_requests_add_up_until_they_are_taken(begun: RunDirectory) -> None:
    begun.write_set_request({"loader_threads": (2, 3)})
    begun.write_set_request({"keep_checkpoints": (3, 4), "loader_threads": (3, 5)})

    assert begun.is_set_requested()
    assert begun.take_set_request() == {"keep_checkpoints": [3, 4], "loader_threads": [3, 5]}
    assert not begun.is_set_requested()
    assert begun.take_set_request() == {}


def test_the_next_attempt_is_for_what_was_changed(start: Start, run: RunDirectory) -> None:
    run.claim(TINY)
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 11))
    assert monitor.settings() == Settings()
    changes = changed_live(run, ["max_workers=4", "checkpoint_every_steps=7", "resize_seconds=3"], "first")

    monitor.change_settings(changes)

    assert monitor.settings() == Settings(TINY.min_workers, 4, 3.0, version=1)
    monitor.flush()
    said = "checkpoint_every_steps {} -> 7, max_workers {} -> 4, resize_seconds {} -> 3.0".format(
        *(json.dumps(TINY.to_json()[name]) for name in ("checkpoint_every_steps", "max_workers", "resize_seconds"))
    )
    event = last_event(run)
    assert (event["kind"], event["step"], event["reason"]) == ("set", 10, said)
    assert scraped(monitor)["convmae_target_world_size_ranks"] == 4
    assert scraped(monitor)["convmae_checkpoint_interval_steps"] == 7

    begin(monitor, resume_step=10)

    event = last_event(run)
    assert (event["kind"], event["steps_redone"]) == ("resize", 0)
    assert event["reason"] == f"{said} (set; workers 2 -> 2)"
    assert monitor.settings().max_workers == 4


def test_an_interval_of_time_takes_the_place_of_one_of_steps(start: Start, run: RunDirectory) -> None:
    run.claim(TINY)
    monitor = start()
    begin(monitor)

    changed = changed_live(run, ["checkpoint_interval=seconds", "checkpoint_every_seconds=30"], "first")
    monitor.change_settings(changed)

    assert scraped(monitor)["convmae_checkpoint_interval_seconds"] == 30
    assert monitor.status()["checkpoint_every_steps"] is None


def test_more_failures_are_survived(start: Start, run: RunDirectory) -> None:
    run.claim(TINY)
    monitor = start(max_restarts=0)
    begin(monitor)
    monitor.change_settings(changed_live(run, ["max_restarts_without_progress=1"], "first"))

    assert monitor.worker_failed("rank 0: lost", remedy="restart") == ""
    assert "2 failures" in monitor.worker_failed("rank 0: lost", remedy="restart")
