"""What a tracker needs is asked for before a run starts; what is secret of it stays so."""

from __future__ import annotations

import sys

import pytest

from jobs.errors import RecipeError, TrackerError
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.trackers.event_log import MOST_CHARACTERS, EventLog
from jobs.trackers.tracker import Point
from jobs.trackers.trackers import TrackerSettings, check_trackers
from jobs.trackers.variables import without_secrets

ENVIRON = {"MLFLOW_TRACKING_URI": "http://m:5000", "WANDB_API_KEY": "k"}


def recipe(*names: str) -> Recipe:
    return named_recipe("tiny").amended({"tracker": list(names)})


def test_a_run_whose_trackers_have_all_they_need_may_start() -> None:
    check_trackers(recipe("tensorboard", "mlflow", "wandb"), ENVIRON, drives=True)
    check_trackers(recipe("wandb"), {"WANDB_MODE": "offline", "WANDB_DIR": "/scratch"}, drives=True)
    check_trackers(recipe("wandb"), {"WANDB_MODE": "disabled"}, drives=True)
    check_trackers(recipe("tensorboard"), {}, drives=True)


@pytest.mark.parametrize(
    ("name", "environ", "missing"),
    [
        ("mlflow", {"WANDB_API_KEY": "k"}, "MLFLOW_TRACKING_URI"),
        ("mlflow", {"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI"),
        ("wandb", {}, "WANDB_API_KEY"),
        ("wandb", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "WANDB_DIR"),
    ],
)
def test_a_variable_without_which_figures_would_be_lost_is_asked_for(
    name: str, environ: dict[str, str], missing: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^tracker: must know .* by {missing}, got '{name}'; export {missing}"):
        check_trackers(recipe(name), environ, drives=False)


def test_a_missing_library_is_refused_where_the_driver_is_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]  as if it were not installed

    with pytest.raises(TrackerError, match=r"'wandb'; pip install 'convmae-pretrain\[trackers\]'"):
        check_trackers(recipe("tensorboard", "wandb"), ENVIRON, drives=True)
    check_trackers(recipe("wandb"), ENVIRON, drives=False)


def test_settings_have_the_variables_of_trackers_alone_and_show_none() -> None:
    found = TrackerSettings.of(recipe("mlflow"), {**ENVIRON, "CONVMAE_NOTIFY_URL": "http://h/x", "HOME": "/"})

    assert ENVIRON.items() <= found.environ.items()
    assert {name.partition("_")[0] for name in found.environ} == {"MLFLOW", "WANDB"}
    assert "m:5000" not in repr(found)
    assert TrackerSettings.of(recipe(), ENVIRON).environ == {}


def test_texts_of_libraries_are_shown_without_keys_and_passwords() -> None:
    environ = {"WANDB_API_KEY": "k3y", "MLFLOW_TRACKING_PASSWORD": "p%40ss", "MLFLOW_TRACKING_URI": "http://u:v@h/"}

    said = "401 for https://u:v@h/api?x with k3y, p%40ss and p@ss"

    assert without_secrets(said, environ) == (
        "401 for https://(not shown)@h/api?x with (not shown), (not shown) and (not shown)"
    )


def test_figures_that_are_not_there_are_left_out() -> None:
    row = {"step": 3, "epoch": 0, "loss": None, "learning_rate": 0.1, "world_size": 2, "skipped": "the gradient"}

    point = Point.of_row(row, 5.0, 64, gradient_norm=float("inf"))

    assert point == Point(3, 5.0, {"epoch": 0.0, "learning_rate": 0.1, "world_size": 2.0})


def test_the_log_has_the_newest_events_first_in_whole_lines_that_a_note_holds() -> None:
    log = EventLog()
    for step in range(500):
        log.add({"at_seconds": step, "attempt": 1, "step": step, "kind": "skipped", "reason": "x" * 300 + "\n- forged"})

    lines = log.text().splitlines()

    assert len(log.text()) <= MOST_CHARACTERS and len(lines) > 10
    assert lines[0].startswith("- 1970-01-01 00:08:19 UTC, attempt 1, step 499: skipped: xxx")
    assert all(line.startswith("- 1970") for line in lines)
