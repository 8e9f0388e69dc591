"""Commands on runs, on a machine without stack and cluster."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from command_line import Typed, assert_refused

from jobs.cluster.session import Session
from jobs.control import workflow
from jobs.errors import RunFailedError
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

NOWHERE = "127.0.0.1:9"  # the discard port, on which nothing listens


def test_bad_recipes_are_refused(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("epochs = ")

    assert_refused(typed("inspect", "tinny"), "recipe", "'tinny'", "did you mean tiny?")
    assert_refused(typed("pretrain", "tinny"), "did you mean tiny?")
    assert_refused(typed("submit", "tiny", "epoch=3"), "epoch", "did you mean epochs?")
    assert_refused(typed("submit", "tiny", "epochs=many"), "epochs", "integer", "'many'")
    assert_refused(typed("inspect", "tiny", "model.depth=3"), "model.depth", "3 positive whole numbers")
    assert_refused(typed("inspect", "tiny", "lanes=7"), "lanes", "global_batch_size = 64", "lanes=8")
    assert_refused(typed("inspect", "tiny", "epochs"), "must be field=value")
    assert_refused(typed("inspect", str(tmp_path / "bad.toml")), "must be a readable TOML file")


def test_without_stack_a_run_root_is_required(typed: Typed, data: str) -> None:
    assert_refused(typed("pretrain", "tiny", f"data={data}"), "run_root", "convmae up")
    assert_refused(typed("list"), "run_root", "convmae up")
    assert_refused(typed("status", "first"), "run_root", "convmae up")


@pytest.mark.parametrize("command", ["pretrain", "submit"])
def test_without_cluster_no_run_starts(
    typed: Typed, root: str, data: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    arguments = (command, "tiny", f"data={data}", f"run_root={root}", "--run", "second")

    assert_refused(typed(*arguments), "RAY_ADDRESS", "convmae up")
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    assert_refused(typed(*arguments), "RAY_ADDRESS", "must answer", f"'{NOWHERE}'")

    assert [run.name for run in map(Path, Storage().list_files(root)) if run.parts[0] != "first"] == []


def test_weights_to_fine_tune_are_those_of_a_run_beside_the_new_one(typed: Typed, root: str, data: str) -> None:
    ended = typed("finetune", "tiny_finetune", f"data={data}", f"run_root={root}", "--from", "frist")

    assert_refused(ended, "run: must exist", f"'{root}/frist'", "did you mean first?")


def test_a_port_in_use_is_refused(typed: Typed, root: str, data: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = typed("pretrain", "tiny", f"data={data}", f"run_root={root}", f"metrics_port={port}")

    assert_refused(ended, "metrics_port", str(port), "0 for any free one")


def test_a_run_of_another_recipe_is_refused(
    typed: Typed, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "connect", lambda self: None)

    ended = typed("pretrain", "tiny", f"data={data}", f"run_root={root}", "seed=1", "--run", "first")

    assert_refused(ended, "'first'", "seed: 0 -> 1", "--run")


def test_an_unknown_run_is_answered_with_the_nearest(typed: Typed, root: str) -> None:
    for command in ("status", "history", "logs", "stop", "consolidate", "report"):
        assert_refused(typed(command, "frist", "--run-root", root), "'" + root + "/frist'", "did you mean first?")
    assert_refused(typed("status", f"file://{root}/frist"), "did you mean first?")
    assert_refused(typed("status", "No Name", "--run-root", root), "lower-case")


def test_requests_that_do_not_fit_the_run_are_refused(typed: Typed, root: str) -> None:
    assert_refused(typed("stop", "first", "--run-root", root), "first (finished)", "nothing to stop")
    ended = typed("set", "first", "loader_threads=3", "--run-root", root)
    assert_refused(ended, "first (finished)", "`convmae resume first loader_threads=3`")
    assert_refused(typed("consolidate", "first", "--run-root", root), "committed checkpoint", "first")
    assert_refused(typed("consolidate", "first", "--step", "3", "--run-root", root), "step", "none yet")
    assert_refused(typed("consolidate", "first", "--dtype", "fp8", "--run-root", root), "--dtype", "'fp8'")
    assert_refused(typed("consolidate", "first", "--shard-bytes", "some"), "--shard-bytes", "256MB")
    several = ("--shard-bytes", "1GB", "--out", "a.safetensors")
    assert_refused(typed("consolidate", "first", *several), "--out", "must be a folder")


def test_strict_refuses_to_skip_damaged_checkpoints_on_resume(
    typed: Typed, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(workflow, "train_here", lambda session, plan: asked.append(plan.recipe.on_damaged_checkpoint))
    monkeypatch.setattr(
        workflow, "train_as_job", lambda session, plan, follow, as_json: asked.append(plan.recipe.on_damaged_checkpoint)
    )
    for command in ("pretrain", "submit"):
        for strict in ([], ["--strict"]):
            assert typed(command, "tiny", f"data={data}", f"run_root={root}", *strict).code == 0

    assert asked == ["previous", "fail"] * 2


def test_resume_takes_the_runs_own_recipe_and_changes_only_where_it_executes(
    typed: Typed, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(workflow, "train_as_job", lambda session, plan, follow, as_json: asked.append((plan, follow)))
    run = RunDirectory.of(Storage(), root, "second")
    recipe = named_recipe("tiny").amended({"data": data, "epochs": 7, "run_root": root})
    run.claim(recipe)
    place = ("--run-root", root)

    assert typed("resume", "second", "max_workers=4", "--follow", *place).code == 0
    assert_refused(typed("resume", "second", "epochs=9", *place), "has another recipe under this name (epochs: 7 -> 9)")
    assert_refused(typed("resume", "secnod", *place), "did you mean second?")

    ((plan, follow),) = asked
    expected = recipe.amended({"max_workers": 4}).with_statistics(IMAGENET_MEAN, IMAGENET_STD)
    assert (plan.run.url, plan.recipe, follow) == (run.url, expected, True)


def test_a_failed_run_is_reported_in_one_line_with_exit_code_1(
    typed: Typed, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: object, plan: object) -> None:
        raise RunFailedError("rank 1: ValueError: boom")

    monkeypatch.setattr(workflow, "train_here", fail)

    ended = typed("pretrain", "tiny", f"data={data}", f"run_root={root}")

    assert (ended.code, ended.error) == (1, "failed: rank 1: ValueError: boom\n")


def test_inspect_shows_a_recipe_with_its_overrides(typed: Typed, data: str) -> None:
    ended = typed("inspect", "tiny", f"data={data}", "epochs=3", "model.mask_ratio=0.5")

    lines = [line.split() for line in ended.output.splitlines()]
    assert all(line in lines for line in (["epochs", "3"], ["model.mask_ratio", "0.5"], ["data", data]))


def test_list_shows_every_run(typed: Typed, root: str, tmp_path: Path) -> None:
    (row,) = json.loads(typed("list", "--run-root", root, "--json").output)
    assert (row["run"], row["state"], row["step"], row["loss"]) == ("first", "finished", 5, 0.5)

    table = typed("list", "--run-root", root).output
    assert all(word in table for word in ("first", "finished", "5/5", "0.5000"))

    assert "0 runs under" in typed("list", "--run-root", str(tmp_path / "none")).output
    assert json.loads(typed("list", "--run-root", str(tmp_path / "none"), "--json").output) == []


def test_status_shows_a_run_and_its_events(typed: Typed, root: str) -> None:
    status = json.loads(typed("status", "first", "--run-root", root, "--json").output)
    assert (status["state"], status["step"], status["committed_steps"]) == ("finished", 5, [])
    assert [event["kind"] for event in status["events"]] == ["start", "finished"]

    text = typed("status", f"file://{root}/first").output
    assert "5 of 5 (100.0%)" in text
    assert text.splitlines()[-1].endswith("attempt 1  finished: step 5")


def test_history_is_one_line_per_step(typed: Typed, root: str) -> None:
    rows = [json.loads(line) for line in typed("history", "first", "--run-root", root, "--json").output.splitlines()]
    assert rows == RunDirectory.of(Storage(), root, "first").read_history()

    lines = typed("history", "first", "--run-root", root).output.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [
        "step",
        "1",
        "epoch",
        "0",
        "loss",
        "0.500000",
        "lr",
        "1.000e-03",
        "world",
        "2",
        "attempt",
        "1",
    ]


def test_the_history_has_mfu_where_the_attempt_recorded_its_devices(typed: Typed, root: str) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    place = ("history", "first", "--run-root", root)
    assert "mfu" not in typed(*place).output

    begun, *later = run.read_events()
    compute = {"step_flops": 3e12, "peak_flops_per_second": 24e12, "devices": "2 x L4 (data sheet)"}
    run.write_events(1, [begun | compute, *later])
    rows = run.read_history()
    run.write_history(1, 1, [row | {"step_seconds": 0.25} if row["step"] > 1 else row for row in rows])

    lines = typed(*place).output.splitlines()
    found = [json.loads(line) for line in typed(*place, "--json").output.splitlines()]

    assert ["mfu 50.0%" in line for line in lines] == [False] + [True] * 4
    assert [row.get("mfu_ratio") for row in found] == [None] + [0.5] * 4
    assert found[1]["device_flops_per_second"] == 6e12


def test_ui_refuses_a_token_that_can_be_guessed_and_an_address_that_it_cannot_have(typed: Typed, root: str) -> None:
    for token in ("short", "with spaces and more", "x" * 15):
        ended = typed("ui", "--root", root, "--token", token)
        assert_refused(ended, "--token", "at least 16", "one is made up")
        assert token not in ended.error
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert_refused(typed("ui", "--root", root, "--port", port), "--port", port, "0 for any free one")
    assert_refused(typed("ui", "--root", root, "--host", "203.0.113.7"), "--host", "203.0.113.7")
    assert_refused(typed("ui", "nobody", "--root", root), "run", "must exist")
