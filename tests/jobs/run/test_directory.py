from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.errors import RunError
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.placement import PLACEMENT_FIELDS
from jobs.run.directory import RunDirectory, list_runs, unknown_run
from jobs.run.profile_request import ProfileRequest
from pipeline.store.storage import Storage

STORAGE = Storage()
TINY = named_recipe("tiny")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(STORAGE, str(tmp_path / "runs"), "first")


def rows(attempt: int, steps: range) -> list[dict[str, Any]]:
    row = {"epoch": 0, "learning_rate": 1e-3, "world_size": 2, "attempt": attempt}
    return [{"step": step, "loss": 1 / step, **row} for step in steps]


def test_a_new_name_is_claimed_once(run: RunDirectory) -> None:
    assert not run.exists()

    assert run.claim(TINY) is True
    assert run.claim(TINY) is False

    assert run.exists()
    assert run.read_recipe() == TINY


def test_a_micro_batch_that_was_found_is_kept(run: RunDirectory) -> None:
    open_ended = TINY.amended({"micro_batch_size": "auto"})
    assert run.claim(open_ended) is True
    found = TINY.amended({"micro_batch_size": 8})

    assert run.claim(found) is False

    assert run.read_recipe() == found
    with pytest.raises(RunError, match="grain_size: 8 -> 4"):
        run.claim(TINY.amended({"micro_batch_size": 4}))


def test_a_name_is_refused_to_another_recipe_and_the_differences_are_listed(run: RunDirectory) -> None:
    run.claim(TINY)

    with pytest.raises(RunError) as caught:
        run.claim(TINY.amended({"seed": 1, "model.mask_ratio": 0.5, "max_steps": 3}))

    assert "seed: 0 -> 1" in caught.value.rule
    assert "model.mask_ratio: 0.75 -> 0.5" in caught.value.rule
    assert "max_steps" not in caught.value.rule
    assert "--run" in caught.value.remedy
    assert run.read_recipe() == TINY


def test_a_change_of_placement_is_accepted_and_written(run: RunDirectory) -> None:
    run.claim(TINY)
    moved = TINY.amended({"max_steps": 3, "max_workers": 4, "metrics_port": 9000})
    assert {"max_steps", "max_workers", "metrics_port"} <= PLACEMENT_FIELDS

    assert run.claim(moved) is False

    assert run.read_recipe() == moved


def test_the_recipe_of_a_run_that_does_not_exist_is_an_error(run: RunDirectory) -> None:
    with pytest.raises(RunError, match="must exist"):
        run.read_recipe()


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a" * 63])
def test_usable_names_are_taken(name: str) -> None:
    assert RunDirectory.of(STORAGE, "memory://runs", name).name == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "A", "a b", "a/b", "../a", "a\n", "ä", "a" * 64])
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(RunError, match="run: must be 1 to 63") as caught:
        RunDirectory.of(STORAGE, "memory://runs", name)
    assert len(str(caught.value).splitlines()) == 1


def test_history_has_one_row_a_step_that_of_the_last_attempt(run: RunDirectory) -> None:
    run.write_history(1, 1, rows(1, range(1, 8)))
    run.write_history(2, 5, rows(2, range(5, 10)))
    run.write_history(10, 8, rows(10, range(8, 12)))

    history = run.read_history()

    assert [(row["step"], row["attempt"]) for row in history] == (
        [(step, 1) for step in range(1, 5)]
        + [(step, 2) for step in range(5, 8)]
        + [(step, 10) for step in range(8, 12)]
    )


def test_history_is_empty_before_the_first_step(run: RunDirectory) -> None:
    assert run.read_history() == []


def event(attempt: int, step: int) -> dict[str, Any]:
    return {"at_seconds": 1.5, "attempt": attempt, "kind": "milestone", "step": step}


def test_events_are_in_order_of_attempts(run: RunDirectory) -> None:
    assert run.last_attempt() == 0
    for attempt in (10, 2, 1):
        run.write_events(attempt, [event(attempt, number) for number in range(2)])
    run.write_events(2, [event(2, number) for number in range(3)])

    events = [(event["attempt"], event["step"]) for event in run.read_events()]

    assert events == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (10, 0), (10, 1)]
    assert run.last_attempt() == 10


def test_a_part_that_is_listed_but_gone_is_skipped(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_history(1, 1, rows(1, range(1, 4)))
    listed = Storage.list_names
    monkeypatch.setattr(Storage, "list_names", lambda self, url: [*listed(self, url), "0001-00000099.jsonl"])

    assert run.read_history() == rows(1, range(1, 4))


def test_the_heartbeat_is_the_latest_status(run: RunDirectory) -> None:
    assert run.read_heartbeat() == {}

    said = {"state": "running", "step": 3, "total_steps": 4, "updated_at_seconds": 1.5}

    run.write_heartbeat(said)
    run.write_heartbeat(said | {"state": "finished", "step": 4})

    assert run.read_heartbeat() == said | {"state": "finished", "step": 4}


def test_a_stop_request_is_taken_once(run: RunDirectory) -> None:
    assert not run.take_stop_request()

    run.write_stop_request()

    assert run.take_stop_request()
    assert not run.take_stop_request()


def test_a_request_for_a_profile_is_taken_once(run: RunDirectory) -> None:
    assert run.take_profile_request() is None
    request = ProfileRequest(rank=3, steps=5, key="k")

    run.write_profile_request(request)

    assert run.take_profile_request() == request
    assert run.take_profile_request() is None


def test_runs_are_listed_by_name_and_other_folders_are_not(run: RunDirectory, tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    assert list_runs(STORAGE, root) == []
    for name in ("b", "a"):
        RunDirectory.of(STORAGE, root, name).claim(TINY)
    (tmp_path / "runs" / "not-a-run").mkdir()

    assert [found.name for found in list_runs(STORAGE, root)] == ["a", "b"]


def test_an_unknown_run_is_answered_with_the_nearest(run: RunDirectory) -> None:
    assert "did you mean firsts?" in unknown_run(run, ["other", "firsts"]).remedy
    assert "runs there: other" in unknown_run(run, ["other"]).remedy
    assert "none" in unknown_run(run, []).remedy


def test_what_cannot_be_a_run_is_not_listed(tmp_path: Path) -> None:
    storage = Storage()
    for name in ("one", "Two", "new\nline", "one_$folder$"):
        storage.write(f"{tmp_path}/{name}/recipe.json", b"{}")

    assert [run.name for run in list_runs(storage, str(tmp_path))] == ["one"]


def test_of_a_history_the_later_steps_are_given(run: RunDirectory) -> None:
    for attempt, first, last in [(1, 1, 1000), (1, 1001, 1500), (2, 1201, 2200), (2, 2201, 2300)]:
        run.write_history(attempt, first, rows(attempt, range(first, last + 1)))
    whole = run.read_history()

    for after in (0, 999, 1000, 1001, 1300, 2199, 2200, 2299, 2300, 9999):
        assert run.read_history(after) == [row for row in whole if row["step"] > after], after
