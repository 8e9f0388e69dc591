"""Commands on several runs, on a machine without stack and cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Typed, assert_refused
from probe_events import probe_events

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.run.evaluations import key_of, url_of
from pipeline.store.storage import Storage

REPORT = {
    "weights": {"name": "second, step 4", "step": 4},
    "train": {"url": "s3://b/train", "samples": 80},
    "test": {"url": "s3://b/test", "samples": 20},
    "results": [{"method": "knn", "settings": {"k": 20}, "top1": {"accuracy": 0.35, "samples": 20}}],
}


@pytest.fixture
def two(root: str) -> str:
    """A run root with a second run, of a wider kernel and half the steps, which was evaluated."""
    run = RunDirectory.of(Storage(), root, "second")
    run.claim(named_recipe("tiny").amended({"model.kernel_size": 7, "epochs": 20}))
    row = {"epoch": 0, "learning_rate": 1e-3, "world_size": 2, "attempt": 1, "step_seconds": 900.0}
    run.write_history(1, 1, [{"step": step, "loss": 1 / step, **row} for step in range(1, 5)])
    beat = {"state": "stopped", "step": 4, "total_steps": 9, "updated_at_seconds": 1.7e9, "steps_per_epoch": 2}
    run.write_heartbeat(beat | {"worker_seconds_total": 9000.0})
    Storage().write(url_of(run.url, key_of({"of": "it"})), json.dumps(REPORT).encode())
    return root


def test_runs_are_compared_by_recipe_loss_cost_and_accuracy(typed: Typed, two: str, tmp_path: Path) -> None:
    page = tmp_path / "out" / "both.html"

    ended = typed("compare", "first", "second", "--run-root", two, "--page", str(page))
    found = json.loads(typed("compare", "first", "second", "--run-root", two, "--json").output)

    assert (ended.code, ended.error) == (0, "")
    assert found["differences"] == {"model.kernel_size": [5, 7], "epochs": [40, 20]}
    second = found["runs"][1]
    assert second["curve"] == {"epochs": [0.5, 1.0, 1.5, 2.0], "losses": [1.0, 0.5, pytest.approx(1 / 3), 0.25]}
    assert second["cost"] == {"unit": "core-hours", "productive": 2.0, "whole": 2.5}  # 2 workers, 4 steps of 900 s
    assert second["accuracies"][0]["top1"] == {"kNN, k = 20": 35.0}
    assert "35.0 %" in ended.output
    html = page.read_text()
    assert html.count('<svg class="wide"') == 1
    assert "<td>model.kernel_size</td><td>5</td><td>7</td>" in html


def test_accuracies_measured_while_runs_trained_are_compared(typed: Typed, two: str, tmp_path: Path) -> None:
    probed, tuned = (RunDirectory.of(Storage(), two, name) for name in ("second", "tuned"))
    probed.write_events(1, probe_events({0: 0.25, 4: 0.5, 2: 0.375}))
    tuned.claim(named_recipe("tiny_finetune").amended({"finetune.classes": ["cat", "dog"]}))
    row = {"loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1, "validation_samples": 80}
    tuned.write_history(
        1, 1, [{"step": step, "epoch": step // 2 - 1, **row, "validation_top1": step / 8} for step in (2, 4)]
    )
    page = tmp_path / "both.html"

    ended = typed("compare", "second", "tuned", "--run-root", two, "--page", str(page))
    found = json.loads(typed("compare", "second", "tuned", "--run-root", two, "--json").output)

    assert (ended.code, ended.error) == (0, "")
    assert [run["measured"].get("knn_20") for run in found["runs"]] == [[0.25, 0.375, 0.5], None]
    assert found["runs"][0]["measured"]["epochs"] == [0.0, 1.0, 2.0]
    assert found["runs"][1]["measured"] == {"epochs": [2.0, 4.0], "steps": [2, 4], "validation_top1": [0.25, 0.5]}
    assert found["differences"]["finetune.classes"] == [None, ["cat", "dog"]]
    rows = [" ".join(line.split()) for line in ended.output.splitlines()]
    assert "second 4 kNN, k = 20 50.0 % 200 samples, while it trained" in rows
    assert "tuned 4 top-1 50.0 % 80 samples, while it trained" in rows
    html = page.read_text()
    drawn = ("accuracy, kNN, k = 10 of 1 runs", "accuracy, linear probe of 1 runs", "accuracy, top-1 of 1 runs")
    assert all(html.count(f'aria-label="{text}"') == 2 for text in drawn)


def test_one_run_or_none_or_an_unknown_one_is_refused(typed: Typed, two: str) -> None:
    assert_refused(typed("compare", "first", "--run-root", two), "must be at least two")
    assert_refused(typed("compare", "first", "secnd", "--run-root", two), "did you mean second?")


def test_two_runs_differ_from_a_step_on_or_not_at_all(typed: Typed, two: str) -> None:
    ended = typed("diff", "first", "second", "--run-root", two)
    found = typed("diff", "first", "second", "--run-root", two, "--json")

    assert (ended.code, ended.error) == (1, "failed: step 1 is the first that differs\n")
    rows = [" ".join(line.split()) for line in ended.output.splitlines()]
    assert "model.kernel_size 5 (default) 7 trajectory" in rows
    assert "state finished stopped" in rows
    assert "history: step 1 is the first with another loss: 0.5 and 1.0" in rows
    differences = json.loads(found.output)
    assert found.code == 1
    assert differences["history"]["partings"] == [{"what": "loss", "step": 1, "values": [0.5, 1.0]}]
    assert {each["field"] for each in differences["recipe"]} == {"model.kernel_size", "epochs"}
    assert [run["run"] for run in differences["runs"]] == ["first", "second"]

    same = typed("diff", "first", "first", "--run-root", two)
    assert (same.code, same.error) == (0, "")
    assert "history: the same in all 5 steps that both have; digests of all weights compared: 0" in same.output
    assert_refused(typed("diff", "first", "secnd", "--run-root", two), "did you mean second?")


def test_a_plan_needs_neither_cluster_nor_data(typed: Typed) -> None:
    ended = typed("ablate", "epochs", "--plan")
    rows = json.loads(typed("ablate", "epochs", "--plan", "--json").output)

    assert ended.code == 0
    assert "12 runs" in ended.output
    assert [row["steps"] for row in rows[::3]] == [62_400, 124_800, 249_600, 499_200]  # 312 in an epoch of ImageNet


def test_what_an_ablation_lacks_is_told_before_it_begins(typed: Typed, two: str) -> None:
    assert_refused(typed("ablate", "kernel", f"run_root={two}"), "data: must be the URL of a dataset")
    assert_refused(typed("ablate", "kernal"), "did you mean kernel?")
    assert_refused(typed("ablate", "kernel", "evaluation.kind=finetune"), "convmae finetune")
