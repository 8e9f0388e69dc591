"""A live run is changed by command, watched by a tracker and a webhook, and trains what it would have trained."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from followed_runs import has_trained, trains, until
from json_hook import JsonHook
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from testbed import Command, family, losses, processes, small_recipe

from jobs.run.directory import RunDirectory
from jobs.stack.record import Stack

pytestmark = pytest.mark.slow

SECRET = "secret-of-the-hook"
FIELDS = {"epochs": 1000, "checkpoint_every_steps": 100, "max_workers": 2, "resize_seconds": 2.0}


@pytest.fixture
def hook() -> Iterator[JsonHook]:
    with JsonHook().running() as hook:
        yield hook


def resized(run: RunDirectory, workers: int, attempt: int) -> dict[str, Any]:
    """Wait until an attempt of so many workers trains; the event by which it began."""
    until(run, f"{workers} ranks", lambda now: trains(workers)(now) and now["attempt"] >= attempt)
    return next(event for event in reversed(run.read_events()) if "steps_redone" in event)


def test_a_live_run_is_changed_without_losing_a_step(
    convmae: Command, data: str, local_stack: Stack, hook: JsonHook
) -> None:
    watching = {"tracker": ["tensorboard"], "notify_url": "env:CONVMAE_NOTIFY_TEST"}
    secret = {"CONVMAE_NOTIFY_TEST": f"{hook.endpoint}/{SECRET}"}
    arguments = small_recipe(data, **FIELDS, **{key: json.dumps(value) for key, value in watching.items()})
    convmae("submit", *arguments, "--run", "changed", **secret)
    run = convmae.run("changed")
    has_trained(run, 1, after=5)

    out, _ = convmae("set", "changed", "max_workers=1", "checkpoint_every_steps=7")
    assert out.splitlines() == [
        "checkpoint_every_steps: 100 -> 7",
        "max_workers: 2 -> 1",
        "in force from the next attempt, which begins as soon as the ranks have saved",
    ]
    event = resized(run, workers=1, attempt=2)
    assert (event["kind"], event["steps_redone"]) == ("resize", 0)
    assert event["reason"] == "checkpoint_every_steps 100 -> 7, max_workers 2 -> 1 (set; workers 2 -> 1)"
    until(run, "a checkpoint", lambda now: now.get("checkpoint_step", 0) > event["step"] + 7)

    (driver,) = (process for process in processes(run.url, family(local_stack)) if "jobs.cli.main" in process.cmdline())
    os.kill(driver.pid, signal.SIGKILL)
    has_trained(run, 3)
    assert run.read_heartbeat()["world_size"] == 1, "the next driver keeps to what was set"
    convmae("set", "changed", "max_workers=2")
    event = resized(run, workers=2, attempt=4)
    assert event["steps_redone"] == 0
    _, err = convmae("set", "changed", "seed=3", code=2)
    assert "decides what is computed" in err

    convmae("stop", "changed")
    convmae("pretrain", *arguments, f"max_steps={len(losses(run))}", "--run", "left-alone", **secret)
    assert losses(run) == losses(convmae.run("left-alone"))
    assert_watched(run, hook, local_stack)


def assert_watched(run: RunDirectory, hook: JsonHook, stack: Stack) -> None:
    """One run in TensorBoard, with every step once; a notice of each thing once; the address nowhere."""
    assert [(each["run"], each["kind"]) for each in hook.taken] == [("left-alone", "finished")]
    folder = stack.settings.home / "tensorboard-copy"
    folder.mkdir()
    for name in run.storage.list_files(run.path("tensorboard")):
        (folder / name.replace("/", "-")).write_bytes(run.storage.read(run.path("tensorboard", name)))
    seen: dict[int, float] = {}
    for path in sorted(folder.iterdir()):
        found = EventAccumulator(str(path)).Reload()
        if "loss" in found.Tags()["scalars"]:
            seen |= {event.step: event.value for event in found.Scalars("loss")}
    assert [seen[step] for step in sorted(seen)] == pytest.approx(losses(run), rel=1e-5)
    for name in ("recipe.json", "heartbeat.json"):
        assert SECRET.encode() not in run.storage.read(run.path(name))
    assert SECRET not in json.dumps(run.read_events())
