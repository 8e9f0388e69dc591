"""A run whose newest checkpoint is damaged resumes from the previous one, or is refused; its weights start another."""

from __future__ import annotations

import hashlib
import json

import pytest
from testbed import Command, losses, small_recipe

from jobs.checkpoint import checkpoint

pytestmark = pytest.mark.slow

FIELDS = {"epochs": 10, "checkpoint_every_steps": 10}


def test_a_damaged_checkpoint_is_skipped_or_refused_and_the_trajectory_is_the_same(convmae: Command, data: str) -> None:
    convmae("pretrain", *small_recipe(data, **FIELDS, max_steps=40), "--run", "whole")
    convmae("pretrain", *small_recipe(data, **FIELDS, max_steps=30), "--run", "damaged")
    run = convmae.run("damaged")
    assert checkpoint.committed_steps(run) == [10, 20, 30]
    assert all(row["verified"] for row in json.loads(convmae("checkpoints", "damaged", "--verify", "--json")[0]))
    file = checkpoint.read_commit(run, 30).files[-1]
    url = checkpoint.file_url(run, 30, file.name)
    content = run.storage.read(url)
    run.storage.write(url, content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])

    out, _ = convmae("checkpoints", "damaged", "--verify", code=1)
    assert f"{url} was altered" in out
    longer = ("pretrain", *small_recipe(data, **FIELDS, max_steps=40), "--run", "damaged")
    _, err = convmae(*longer, "--strict", code=1)
    assert "DamagedCheckpointError" in err and url in err
    assert checkpoint.committed_steps(run) == [10, 20, 30], "nothing was trained"
    convmae(*longer)

    assert losses(run) == pytest.approx(losses(convmae.run("whole")), rel=1e-6)
    (event,) = [event for event in run.read_events() if event["kind"] == "checkpoint-damaged"]
    assert (event["step"], url in event["reason"]) == (30, True)
    assert checkpoint.committed_steps(run) == [20, 30, 40]
    assert all(row["verified"] for row in json.loads(convmae("checkpoints", "damaged", "--verify", "--json")[0]))
    out, _ = convmae("prune", "damaged", "--keep", "1", "--yes")
    assert "step 20" in out and "stays: 40" in out
    assert checkpoint.committed_steps(run) == [40]


def test_a_run_starts_from_the_weights_of_another(convmae: Command, data: str) -> None:
    fields = {**FIELDS, "max_steps": 40, "warmup_epochs": 0.0}
    convmae("pretrain", *small_recipe(data, **fields), "--run", "first")
    before = convmae.run("first")
    start = before.path("consolidated", "step-00000040.safetensors")

    convmae("pretrain", *small_recipe(data, **{**fields, "max_steps": 5}, init_from=start), "--run", "second")
    convmae("pretrain", *small_recipe(data, **{**fields, "max_steps": 8}, init_from=start), "--run", "second")

    second = convmae.run("second")
    assert losses(second)[0] < 0.9 * losses(before)[0]
    assert len(losses(second)) == 8
    assert second.read_recipe().init_sha256 == hashlib.sha256(before.storage.read(start)).hexdigest()
    wrong = small_recipe(data, **fields, init_from=start)
    _, err = convmae("pretrain", *wrong, "model.kernel_size=7", "--run", "third", code=2)
    assert "encoder.blocks1.0.attn.weight has shape" in err
