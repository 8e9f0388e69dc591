"""The page of a real run in a browser, while one of its ranks is killed and its worker group grows."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from browser import needs_browser, watched
from followed_runs import has_checkpoint, has_trained, trains, until
from patience import wait_until
from playwright.sync_api import Browser
from testbed import Command, family, processes, ranks, small_recipe

from jobs.stack.record import Stack

pytestmark = [pytest.mark.slow, needs_browser]

FIELDS: dict[str, object] = {
    "epochs": 1000,
    "warmup_epochs": 1.0,
    "checkpoint_every_steps": 20,
    "max_restarts_without_progress": 5,
    "cpus_per_worker": 1.0,
    "loader_threads": 1,
}


def test_the_page_of_a_run_follows_a_kill_and_a_resize(
    convmae: Command, data: str, local_stack: Stack, browser: Browser
) -> None:
    """Two of four CPUs are another run's at first: when it stops, this one grows from two ranks to three."""
    convmae("submit", *small_recipe(data, **FIELDS, max_workers=2), "--run", "neighbour")
    until(convmae.run("neighbour"), "two ranks", trains(2))
    others = {process.pid for process in ranks(local_stack)}
    growing = {**FIELDS, "min_workers": 1, "max_workers": 3, "resize_seconds": 2.0}
    convmae("submit", *small_recipe(data, **growing), "--run", "watched-page")
    run = convmae.run("watched-page")
    until(run, "two ranks", trains(2))
    until(run, "a checkpoint", has_checkpoint)
    url = run.read_heartbeat()["page_url"]
    assert dict(line.split(maxsplit=1) for line in convmae("status", run.name)[0].splitlines())["page"] == url

    with watched(browser, url) as seen:
        seen.waits_for(".state", "running")
        seen.waits_for_fact("Workers now", "2 of 3")
        seen.waits_for('[data-part="training"] svg.narrow', "loss")
        seen.page.evaluate("window.isTheSame = true")

        killed = next(process for process in ranks(local_stack) if process.pid not in others)
        os.kill(killed.pid, signal.SIGKILL)
        has_trained(run, 2)
        seen.waits_for_fact("Restarts", "1")
        seen.waits_for('[data-part="attempts"] td', "restart")

        convmae("stop", "neighbour")
        until(run, "three ranks", trains(3))
        seen.waits_for_fact("Workers now", "3 of 3")
        seen.waits_for('[data-part="attempts"] td', "resize")
        seen.is_in_order()
        assert seen.page.evaluate("window.isTheSame")
        (drawer,) = processes("jobs.report.live.drawing_process", family(local_stack))
    convmae("stop", run.name)
    wait_until("the end of what draws", lambda: not is_alive(drawer), 120)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
