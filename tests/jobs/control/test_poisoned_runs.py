"""Whole runs in which the loss of one rank is NaN now and then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from testbed import Command, small_recipe

from jobs.checkpoint import checkpoint

SCRIPT = Path(__file__).with_name("poisoned_run.py")
FIELDS = {"epochs": 10, "max_steps": 20, "checkpoint_every_steps": 5}


def train(
    convmae: Command, data: str, name: str, poison: str, code: int = 0, flip: str = "0", **fields: object
) -> list[dict[str, Any]]:
    """History of a run that was poisoned."""
    workers = fields.pop("workers", 2)
    recipe = small_recipe(data, **{**FIELDS, "min_workers": workers, "max_workers": workers, **fields})
    command = [sys.executable, str(SCRIPT), "pretrain", *recipe, "--run", name]
    environment = convmae.environment(POISON=poison, FLIP=flip, PYTHONPATH=str(SCRIPT.parents[3]))
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert ended.returncode == code, ended.stderr
    return convmae.run(name).read_history()


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """Of the steps that made an update."""
    return [row["loss"] for row in rows if row["loss"] is not None]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_skipped_batch_is_the_same_at_every_world_size(convmae: Command, data: str) -> None:
    runs = {
        workers: train(convmae, data, f"skips-{workers}", "7,8", workers=workers, on_nonfinite_loss="skip_batch")
        for workers in (1, 2, 3)
    }

    for workers, rows in runs.items():
        assert [row["step"] for row in rows] == list(range(1, 21))
        assert [row["step"] for row in rows if row["loss"] is None] == [7, 8]
        assert rows[6]["skipped"] == f"the loss of rank {workers - 1}"
        assert losses(rows) == pytest.approx(losses(runs[1]), rel=1e-6)
        assert {row["attempt"] for row in rows} == {1}
    events = [event for event in convmae.run("skips-2").read_events() if event["kind"] == "skipped"]
    assert [event["step"] for event in events] == [7, 8]
    assert convmae.run("skips-2").read_heartbeat()["skipped_steps_total"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rollback_leaves_out_the_steps_since_the_checkpoint(convmae: Command, data: str) -> None:
    undisturbed = train(convmae, data, "rolls-not", "1000")
    rows = train(convmae, data, "rolls", "8", on_nonfinite_loss="rollback")

    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if row["loss"] is None] == [6, 7, 8]
    assert losses(rows)[:5] == pytest.approx(losses(undisturbed)[:5], rel=1e-6)
    run = convmae.run("rolls")
    kinds = [event["kind"] for event in run.read_events() if event["kind"] not in ("checkpoint", "consolidated")]
    assert kinds == ["start", "rollback", "restart", "recovered", "finished"]
    assert [(window["first_step"], window["last_step"]) for window in run.read_left_out()] == [(6, 8)]
    assert checkpoint.committed_steps(run)[-1] == 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_never_finite_is_given_up(convmae: Command, data: str) -> None:
    every_step = ",".join(map(str, range(3, 30)))
    rows = train(
        convmae, data, "never", every_step, code=1, on_nonfinite_loss="skip_batch", max_nonfinite_in_a_row=4,
        max_restarts_without_progress=0,
    )  # fmt: skip

    assert [row["step"] for row in rows if row["loss"] is None] == [3, 4, 5, 6]
    assert "the loss of rank 1 is not finite at step 7" in convmae.run("never").read_events()[-1]["reason"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_replay_finds_the_step_at_which_one_rank_computed_with_another_bit(convmae: Command, data: str) -> None:
    """The lowest bit of one weight, on one of two ranks."""
    train(convmae, data, "flipped", "0", flip="7", digest_every_steps=1, keep_checkpoints=10)

    out, err = convmae("replay", "flipped", "--from", "5", "--steps", "4", code=1)

    apart = [int(line.split()[1]) for line in out.splitlines() if "DIFFERS" in line]
    assert apart and apart[0] == 8 and apart == list(range(8, 10)), out
    assert "step 8 is the first that differs, on cpu with 1 thread" in err
    assert "all agree" in convmae("replay", "flipped", "--from", "5", "--steps", "2")[0]
