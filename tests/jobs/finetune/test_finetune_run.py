"""`convmae finetune` on the local stack, as a user runs it; a minute and a half on one core."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from labelled_data import labelled_dataset
from testbed import SMALL, Command, ranks

from jobs.stack.record import Stack
from jobs.weights import consolidated

CLASSES = {"left": 30, "right": 30, "low": 30, "far": 30}
FIELDS = {
    **SMALL,
    "epochs": 24,
    "warmup_epochs": 1,
    "base_learning_rate": 0.08,
    "checkpoint_every_steps": 20,
    "finetune.validate_epochs": 8,
    "finetune.drop_path": 0.1,
    "finetune.mixup": 0.1,
    "finetune.least_crop": 0.5,
    "finetune.randaugment_magnitude": 1,
    "grain_size": 2,
    "lanes": 6,
}


def arguments(data: str, fields: dict[str, object]) -> list[str]:
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in fields.items()}
    return [f"data={data}", *(f"{key}={value}" for key, value in written.items())]


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_has_the_curve_of_one_that_is_left_alone(local_stack: Stack, tmp_path: Path) -> None:
    command = Command(local_stack, local_stack.settings.home)
    data = labelled_dataset(tmp_path, CLASSES).url
    command("submit", "tiny", *arguments(data, {**SMALL, "epochs": 2, "warmup_epochs": 0.5}), "--run", "pre", "-f")
    given = arguments(data, FIELDS)

    command("finetune", "tiny_finetune", *given, "--from", "pre", "--run", "calm", "--follow")
    process = command.start("finetune", "tiny_finetune", *given, "--from", "pre", "--run", "killed", "--follow")
    killed = command.run("killed")
    while killed.read_heartbeat().get("checkpoint_step", 0) < 40:
        time.sleep(0.2)
    os.kill(ranks(local_stack)[0].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=300)

    assert process.returncode == 0, out + err
    rows, calm = (run.read_history() for run in (killed, command.run("calm")))
    kept = ("step", "loss", "samples", "learning_rate", "validation_top1", "digest")
    assert [{key: row.get(key) for key in kept} for row in rows] == [
        {key: row.get(key) for key in kept} for row in calm
    ]
    assert max(row["attempt"] for row in rows) > 1
    measured = [row for row in rows if "validation_top1" in row]
    assert [row["step"] for row in measured] == [64, 128, 192]
    assert measured[-1]["validation_samples"] == 24
    assert measured[-1]["validation_top1"] > 0.6, "chance is a quarter"

    weights = consolidated.of_run(killed)
    assert weights.head and weights.head.classes == tuple(sorted(CLASSES))
    assert "validation" in command("status", "killed")[0]
    assert "Accuracy" in killed.storage.read(killed.path("report.html")).decode()
    out, _ = command("export", "killed", "--format", "official", "--out", str(tmp_path / "official.pth"))
    official = torch.load(tmp_path / "official.pth", weights_only=True)
    assert official["model"]["head.weight"].shape == (4, 32)
    assert json.loads(official["convmae_pretrain"]["classifier"])["classes"] == sorted(CLASSES)

    own = json.loads(command("evaluate", "calm", "--data", data, "--json", "-")[0])
    [head] = own["results"]
    assert head["method"] == "head" and own["test"]["samples"] == 24, "not those that it was trained with"
    assert head["top1"]["accuracy"] == measured[-1]["validation_top1"]
    changes = [word for word in arguments("", FIELDS)[1:] if not word.startswith("model.")]
    words = ("evaluate", "pre", "--data", data, "--knn", "--finetune", "--finetune-recipe", "tiny_finetune", *changes)
    found, again = (json.loads(command(*words, "--json", "-")[0]) for _ in range(2))
    assert [result["method"] for result in found["results"]] == ["knn", "knn", "finetune"]
    assert found["results"][-1]["top1"] == head["top1"], "the same training"
    tuned = found["results"][-1]["settings"]["run"].rpartition("/")[2]
    assert tuned in command("list")[0]
    assert command.run(tuned).read_history()[-1]["digest"] == calm[-1]["digest"]
    assert again == found, "the run is found again"
