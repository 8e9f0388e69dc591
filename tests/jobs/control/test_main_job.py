"""The main job as a user runs it: real S3, real Ray, real DeepSpeed on gloo, real photographs."""

from __future__ import annotations

import contextlib
import io
import json
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from patience import wait_until
from PIL import Image
from safetensors import safe_open
from testbed import TILES, Command, is_consolidated, losses, small_recipe

from jobs.checkpoint import checkpoint
from jobs.stack.record import Stack
from jobs.weights import consolidated
from model import ConvMAE

EPOCHS = 10
STEPS = EPOCHS * TILES // 12


@pytest.fixture(scope="module")
def finished(convmae: Command, data: str) -> str:
    """Name of a run that was submitted, watched while it ran, and finished."""
    name = "main"
    out, _ = convmae(
        "submit", *small_recipe(data, epochs=EPOCHS, checkpoint_every_steps=20, milestone_epochs=[5]), "--run", name
    )
    assert f"submitted {name}-a1 (a new run)" in out
    run = convmae.run(name)
    wait_until("the first step", lambda: bool(run.read_heartbeat().get("loss")), 300)
    metrics = urllib.request.urlopen(run.read_heartbeat()["metrics_url"], timeout=5).read().decode()
    for series in ("convmae_step", "convmae_loss", "convmae_images_total", "convmae_world_size_ranks"):
        assert f'{series}{{run="{name}"}}' in metrics
    wait_until("the end", lambda: run.read_heartbeat()["state"] == "finished", 300)
    wait_until("the report", lambda: run.storage.exists(run.path("report.html")), 120)
    return name


def test_history_has_every_step_once_and_the_loss_falls(convmae: Command, finished: str) -> None:
    rows = [json.loads(line) for line in convmae("history", finished, "--json")[0].splitlines()]

    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["world_size"] == 2 and row["attempt"] == 1 for row in rows)
    assert [row["epoch"] for row in rows] == [step * 12 // TILES for step in range(STEPS)]
    assert all(row["step_seconds"] >= row["data_wait_seconds"] >= 0 for row in rows)
    (begun,) = (event for event in convmae.run(finished).read_events() if event["kind"] == "start")
    assert begun["devices"].startswith("2 x CPU, ") and begun["devices"].endswith("(measured)")
    for row in rows:
        possible = begun["peak_flops_per_second"] * row["step_seconds"]
        assert row["mfu_ratio"] == pytest.approx(begun["step_flops"] / possible) and row["mfu_ratio"] > 0
    quarter = STEPS // 4
    assert sum(row["loss"] for row in rows[-quarter:]) < 0.95 * sum(row["loss"] for row in rows[:quarter])
    assert len(convmae("history", finished)[0].splitlines()) == STEPS


def test_consolidated_weights_load_into_the_model(convmae: Command, finished: str, tmp_path: Path) -> None:
    run = convmae.run(finished)
    _, err = convmae("consolidate", finished, code=2)  # the run did it by itself
    assert "target: must not exist" in err
    out, _ = convmae("consolidate", finished, "--step", str(STEPS), "--force")
    assert f"step {STEPS}" in out

    model = ConvMAE(run.read_recipe().model)
    model.load_state_dict(consolidated.of_run(run, STEPS).tensors, strict=True)

    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    run.storage.download(run.path("consolidated", f"step-{STEPS:08d}.safetensors"), tmp_path / "weights")
    with safe_open(tmp_path / "weights", "pt") as file:
        commit = checkpoint.read_commit(run, STEPS)
        assert file.metadata()["recipe_digest"] == commit.recipe_digest == run.read_recipe().digest()
        assert file.metadata()["dataset_digest"] == commit.dataset_digest


def test_run_directory_holds_what_a_run_leaves_behind(convmae: Command, finished: str) -> None:
    run = convmae.run(finished)

    kinds = [event["kind"] for event in run.read_events()]
    assert kinds[0] == "start"
    assert kinds[-1] == "finished"
    assert kinds.count("checkpoint") == STEPS // 20
    weights = [event["step"] for event in run.read_events() if event["kind"] == "consolidated"]
    assert weights == [STEPS // 2, STEPS]  # the milestone, while training went on, and the end
    assert all(is_consolidated(run, step) for step in weights)
    assert checkpoint.committed_steps(run) == [STEPS - 40, STEPS - 20, STEPS]
    assert rows_of_images(run.storage.read(run.path("reconstructions.png"))) == 2 + len(weights)
    assert b">images/s<" in run.storage.read(run.path("report.html"))
    run.storage.delete(run.path("report.html"))
    told = json.loads(convmae("report", finished, "--json")[0])
    assert told == {"run": finished, "report": run.path("report.html")}
    assert b"<html" in run.storage.read(told["report"])


def rows_of_images(png: bytes) -> int:
    """Rows in a picture: white lines from one side to the other set captions off from them, and from those above."""
    is_white = (np.asarray(Image.open(io.BytesIO(png)).convert("L")) == 255).all(axis=1)
    return int((np.diff(is_white.astype(int)) == -1).sum()) // 2


def test_status_and_list_tell_of_the_run(convmae: Command, finished: str) -> None:
    status = json.loads(convmae("status", finished, "--json")[0])
    listed = json.loads(convmae("list", "--json")[0])

    assert (status["state"], status["step"], status["total_steps"]) == ("finished", STEPS, STEPS)
    assert finished in [row["run"] for row in listed]
    assert f"{STEPS} of {STEPS}" in convmae("status", finished)[0]
    assert f"{finished} {STEPS}/{STEPS} finished" in convmae("logs", finished)[0]
    rows = [json.loads(line) for line in convmae("logs", finished, "--follow", "--json")[0].splitlines()]
    assert {row["job"] for row in rows} == {f"{finished}-a1"}
    assert any(row["line"].startswith(f"{finished} {STEPS}/{STEPS} finished") for row in rows)


def test_no_secret_is_in_anything_that_a_run_leaves_behind(convmae: Command, finished: str, local_stack: Stack) -> None:
    settings, run = local_stack.settings, convmae.run(finished)
    token = settings.token_path.read_text().strip()
    secrets = [secret.encode() for secret in (settings.secret_key, settings.internal_key, token)]
    assert all(len(secret) >= 16 for secret in secrets)

    left = {name: run.storage.read(run.path(name)) for name in run.storage.list_files(run.url)}
    folders = (settings.home / "logs", settings.home / "prometheus", settings.run_dir / "ray")
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        left[str(path)] = path.read_bytes()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            left[f"command line of {process.pid}"] = "\0".join(process.cmdline()).encode()
    for command in (("status", finished, "--json"), ("logs", finished), ("inspect", "tiny", "--json"), ("doctor",)):
        left[" ".join(command)] = convmae(*command)[0].encode()

    assert "report.html" in left
    assert any("ray/session" in name for name in left)
    assert [name for name, content in left.items() if any(secret in content for secret in secrets)] == []
    for path in (settings.token_path, settings.identities_path, settings.home / "stack.json"):
        assert path.stat().st_mode & 0o077 == 0


def test_the_doctor_examines_every_node_and_the_store(convmae: Command, finished: str) -> None:
    findings = json.loads(convmae("doctor", "--json")[0])

    by_check = {finding["check"]: finding for finding in findings}
    assert {"cluster", "versions", "clock", "disk", "store bandwidth", "all-reduce"} <= set(by_check)
    assert sum(finding["check"] == "store" for finding in findings) == 4
    assert all(finding["remedy"] for finding in findings if finding["level"] in ("warning", "failed"))
    assert not convmae.run("x").storage.list_names("s3://convmae/doctor")


def test_a_run_is_watched_to_its_end(convmae: Command, finished: str) -> None:
    out, _ = convmae("status", finished, "--watch", "--json")

    (line,) = out.splitlines()
    assert json.loads(line)["state"] == "finished"
    assert json.loads(line)["worker_hours"] > 0


@pytest.mark.slow
def test_a_finished_run_is_not_started_over(convmae: Command, data: str, finished: str) -> None:
    before = convmae.run(finished).read_history()

    for command in ("submit", "pretrain"):
        arguments = small_recipe(data, epochs=EPOCHS, checkpoint_every_steps=20, milestone_epochs=[5])
        assert f"{finished} is finished" in convmae(command, *arguments, "--run", finished)[0]
    told = json.loads(convmae("resume", finished, "--json")[0])
    assert told == {"run": finished, "url": convmae.run(finished).url, "job": "", "begins": "finished"}

    assert convmae.run(finished).read_history() == before


def test_another_recipe_under_the_same_name_is_refused_with_what_differs(
    convmae: Command, data: str, finished: str
) -> None:
    arguments = small_recipe(data, epochs=EPOCHS, checkpoint_every_steps=20, milestone_epochs=[5], seed=7)

    _, err = convmae("submit", *arguments, "model.mask_ratio=0.5", "--run", finished, code=2)

    assert len(err.splitlines()) == 1
    assert "model.mask_ratio: 0.75 -> 0.5; seed: 0 -> 7" in err


def test_sharding_again_keeps_what_is_there(convmae: Command, photographs: Path, data: str) -> None:
    out, _ = convmae("shard", str(photographs), data, "--samples-per-shard", "40")
    assert "0 written, 3 kept" in out
    listed = convmae.run("x").storage.read(f"{data}/skipped.jsonl").decode().splitlines()
    assert len(listed) == 1
    assert "broken.jpg" in listed[0]


@pytest.mark.slow
def test_stop_saves_and_the_same_command_goes_on(convmae: Command, data: str) -> None:
    endless = {"epochs": 100_000, "checkpoint_every_steps": 100_000}  # it must not end before it is stopped
    command = ("pretrain", *small_recipe(data, **endless), "--run", "stopped")
    process, run = convmae.start(*command), convmae.run("stopped")
    wait_until("ten steps", lambda: run.read_heartbeat().get("step", 0) >= 10, 300)

    told = json.loads(convmae("stop", "stopped", "--json")[0])

    assert process.wait(timeout=180) == 0
    (step,) = checkpoint.committed_steps(run)
    assert told == {
        "run": "stopped",
        "url": run.url,
        "state": "stopped",
        "step": step,
        "total_steps": told["total_steps"],
    }
    assert step >= 10
    convmae(*command, f"max_steps={step + 20}")
    assert len(losses(run)) == step + 20
    events = [event for event in run.read_events() if event["kind"] not in ("checkpoint", "consolidated")]
    assert [event["kind"] for event in events] == ["start", "stopped", "restart", "recovered", "finished"]
    assert events[2]["step"] == step
    assert events[2]["steps_redone"] == 0


WRONG_KEYS = {"AWS_ENDPOINT_URL": "ENDPOINT", "AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong"}


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        (WRONG_KEYS, ("inspect", "DATA"), "credentials: must be accepted"),
        (WRONG_KEYS, ("list", "--run-root", "s3://convmae/runs"), "credentials: must be accepted"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, ("list",), "AWS_SECRET_ACCESS_KEY: must come with AWS_ACCESS_KEY_ID"),
        ({}, ("shard", "PHOTOGRAPHS", "s3://no-such-bucket/data"), "bucket: must exist"),
        ({}, ("pretrain", "tiny", "data=s3://convmae/nothing", "--run", "bad"), "must hold a manifest.json"),
        ({}, ("pretrain", "tiny", "data=DATA", "run_root=s3://no-such-bucket/runs"), "bucket: must exist"),
        ({}, ("submit", "tiny", "data=DATA", "global_batch_size=960", "--run", "bad"), "960"),
        ({}, ("submit", "tiny", "data=DATA", "cpus_per_worker=64.0", "--run", "bad"), "local stack's 4 CPUs"),
        pytest.param(
            {},
            ("pretrain", "tiny", "data=DATA", "device=cuda", "--run", "bad"),
            "without a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        ({}, ("status", "mian"), "did you mean main?"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    convmae: Command,
    data: str,
    finished: str,
    photographs: Path,
    changes: dict[str, str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    places = {"DATA": data, "PHOTOGRAPHS": str(photographs)}
    filled = [
        argument.replace("DATA", data) if "=" in argument else places.get(argument, argument) for argument in arguments
    ]

    own = {
        name: value.replace("ENDPOINT", convmae.stack.environment()["AWS_ENDPOINT_URL"])
        for name, value in changes.items()
    }

    out, err = convmae(*filled, code=2, **own)

    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert expected in err
    assert not out
    assert not convmae.run("bad").exists()
