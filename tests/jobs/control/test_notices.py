"""Notices of a run, by real webhooks: ones that answer, fail, hang, refuse or are not there."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from loopback_server import LoopbackServer
from monitored_runs import Start, begin, commit, record
from patience import wait_until

from jobs.control import unreported_end
from jobs.control.unreported_end import end_noted
from jobs.metrics.speed_watch import BLOCK_STEPS, LEAST_BLOCKS
from jobs.monitor.monitor import RunMonitor
from jobs.notices.notice_rules import Notice
from jobs.notices.notifier import Patience
from jobs.notices.webhook import Webhook
from jobs.recipe.named_recipes import named_recipe
from jobs.report.report import write_report
from jobs.report.status import run_status
from jobs.run.directory import RunDirectory
from pipeline.errors import DatasetError

SECRET = "T0-B0-s3cr3t"
FIELDS = {"notify_url": "env:CONVMAE_NOTIFY_URL", "notify_format": "auto"}
QUICK = Patience(answer_seconds=0.5, first_pause_seconds=0.05, most_pause_seconds=0.1, end_seconds=2.0)


class Hook(LoopbackServer):
    """A webhook that notes what it takes, and answers as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: list[int] = []
        """Of the next answers; then 200."""
        self.hangs = threading.Event()
        self.taken: list[dict[str, Any]] = []
        self.asked = 0

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self.hangs.is_set():
            self.closed.wait()
            return
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200 and handler.path == f"/hook/{SECRET}":
            self.taken.append(body)
        handler.send_response(status)
        handler.send_header("Location", "/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    @property
    def kinds(self) -> list[str]:
        return [notice["kind"] for notice in self.taken]


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook().running() as hook:
        yield hook


def webhook(run: RunDirectory, endpoint: str, **fields: str) -> Webhook:
    found = Webhook.of(FIELDS | fields, environ_of(endpoint), run)
    assert found
    return found


def environ_of(endpoint: str) -> dict[str, str]:
    return {"CONVMAE_NOTIFY_URL": f"{endpoint}/hook/{SECRET}"}


def reasons(run: RunDirectory) -> list[str]:
    return [event["reason"] for event in run.read_events() if event["kind"] == "notice-failed"]


def until(holds: Callable[[], bool]) -> None:
    wait_until("a notice", holds, 20)


def fail_and_restart(monitor: RunMonitor, error: str = "rank 1: lost") -> None:
    monitor.worker_failed(error, remedy="restart")
    begin(monitor, resume_step=10)


def test_people_are_notified_of_each_event_once_over_attempts_monitors_and_drivers(
    start: Start, run: RunDirectory, hook: Hook
) -> None:
    there = webhook(run, hook.endpoint)
    first = start(webhook=there, patience=QUICK, max_restarts=9)
    first.waiting(possible=0, needed=2)
    first.waiting(possible=1, needed=2)
    begin(first)
    record(first, range(1, 11))
    commit(first, 10)
    fail_and_restart(first, "rank 0: NonFiniteLossError: step 11")
    fail_and_restart(first, "rank 0: NonFiniteLossError: step 11")
    first.flush()
    until(lambda: hook.kinds == ["waiting", "not-finite"])

    second = start(webhook=there, patience=QUICK, max_restarts=9)
    fail_and_restart(second)
    fail_and_restart(second)
    fail_and_restart(second)
    second.waiting(possible=0, needed=2)
    second.flush()
    until(lambda: len(hook.taken) == 4)
    third = start(webhook=there, patience=QUICK)
    third.waiting(possible=0, needed=2)
    begin(third, resume_step=10)
    record(third, range(11, 21), attempt=7)
    third.end("finished")

    assert hook.kinds == ["waiting", "not-finite", "restart-loop", "waiting", "finished"]
    assert hook.taken[2]["reason"] == "more than 3 restarts within an hour; the last: rank 1: lost"
    last = {**hook.taken[-1]}
    assert last.pop("at").endswith("+00:00")
    assert last == {
        "run": "first",
        "directory": run.url,
        "kind": "finished",
        "title": "first is finished",
        "reason": "",
        "step": 20,
        "attempt": 7,
    }


def test_what_a_killed_driver_could_not_deliver_the_next_one_does_and_older_events_stay_unsaid(
    start: Start, run: RunDirectory, hook: Hook
) -> None:
    unnotified = start()
    unnotified.waiting(possible=0, needed=2)
    unnotified.end("failed", "before anybody wanted to know")
    hook.statuses = [503] * 1000
    killed = start(webhook=webhook(run, hook.endpoint), patience=QUICK)
    begin(killed)
    killed.end("failed", "no space left")  # what happens to it is the same as where it is killed here
    assert hook.taken == [] and hook.asked > 2

    run.write_notified({"at_seconds": run.read_events()[1]["at_seconds"]})  # as if it had not come to its end
    hook.statuses.clear()
    start(webhook=webhook(run, hook.endpoint), patience=QUICK)

    until(lambda: bool(hook.taken))
    assert [(notice["kind"], notice["reason"]) for notice in hook.taken] == [("failed", "no space left")]


@pytest.mark.parametrize("fault", ["hangs", "answers 500", "unreachable", "moved", "gone"])
def test_a_webhook_that_takes_nothing_delays_nothing_and_an_event_says_so_in_the_end(
    start: Start, run: RunDirectory, hook: Hook, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = "http://127.0.0.1:1" if fault == "unreachable" else hook.endpoint
    said = {
        "hangs": "127.0.0.1 did not answer within 0.5 s",
        "answers 500": "127.0.0.1 answered 500",
        "unreachable": "127.0.0.1 is unreachable (ConnectionRefusedError)",
        "moved": "127.0.0.1 answered 302",
        "gone": "127.0.0.1 answered 404",
    }[fault]
    if fault == "hangs":
        hook.hangs.set()
    hook.statuses = [{"moved": 302, "gone": 404}.get(fault, 500)] * 1000

    monitor = start(webhook=webhook(run, endpoint), patience=QUICK)
    began = time.monotonic()
    begin(monitor)
    record(monitor, range(1, 100))
    monitor.waiting(possible=0, needed=2)
    took, began = time.monotonic() - began, time.monotonic()
    monitor.end("finished")
    ended = time.monotonic() - began

    assert took < 2 and ended < 10
    assert run.read_heartbeat()["state"] == "finished"
    if fault in ("moved", "gone"):  # pointless to try again
        assert hook.asked == 2
        of = ("waiting of step 99", "finished of step 99")
        assert reasons(run) == [f"{notice} was not delivered: {said}" for notice in of]
    else:
        assert reasons(run) == [f"not delivered when the run ended: waiting, finished; {said}"]
    assert SECRET not in caplog.text


def test_a_webhook_that_fails_for_a_while_gets_the_notice_later(start: Start, run: RunDirectory, hook: Hook) -> None:
    hook.statuses = [500, 429, 408]
    monitor = start(webhook=webhook(run, hook.endpoint), patience=QUICK)
    begin(monitor)
    monitor.end("failed", "no more nodes")

    assert hook.kinds == ["failed"] and hook.asked == 4
    assert reasons(run) == []


def test_a_notice_is_given_up_while_the_run_trains_and_the_next_is_tried(
    start: Start, run: RunDirectory, hook: Hook
) -> None:
    hook.statuses = [500] * 1000
    monitor = start(webhook=webhook(run, hook.endpoint), patience=dataclasses.replace(QUICK, notice_seconds=0.3))
    begin(monitor)
    monitor.waiting(possible=0, needed=2)
    until(lambda: monitor.flush() or bool(reasons(run)))
    hook.statuses.clear()
    monitor.end("finished")

    assert hook.kinds == ["finished"]
    assert reasons(run) == ["waiting of step 0 was not delivered: 127.0.0.1 answered 500"]


def test_where_it_is_not_known_what_was_said_notices_begin_with_the_next_event(
    start: Start, run: RunDirectory, hook: Hook
) -> None:
    start().end("failed", "long ago")
    run.storage.write(run.path("notices.json"), b"{")

    start(webhook=webhook(run, hook.endpoint), patience=QUICK).end("finished")

    assert hook.kinds == ["finished"]


def test_slack_gets_text_in_which_nothing_is_markup(run: RunDirectory, start: Start, hook: Hook) -> None:
    posted: list[dict[str, Any]] = []
    hook.taken = posted
    monitor = start(webhook=webhook(run, hook.endpoint, notify_format="slack"), patience=QUICK)
    begin(monitor)
    record(monitor, range(1, 1201))
    monitor.end("failed", "rank 1: <!channel> & co")

    text = "*first* has failed (step 1,200, attempt 1): rank 1: &lt;!channel&gt; &amp; co"
    assert posted == [{"text": text}]


def test_a_run_that_becomes_slow_is_reported_once_with_its_figures(start: Start, run: RunDirectory, hook: Hook) -> None:
    monitor = start(webhook=webhook(run, hook.endpoint), patience=QUICK)
    begin(monitor)
    usual = (LEAST_BLOCKS + 1) * BLOCK_STEPS
    record(monitor, range(1, usual + 1))
    record(monitor, range(usual + 1, usual + 2 * BLOCK_STEPS + 1), step_seconds=2.0)
    until(lambda: hook.kinds == ["slow"])
    monitor.flush()

    (event,) = [event for event in run.read_events() if event["kind"] == "slow"]
    assert event["step"] == usual + BLOCK_STEPS
    assert event["reason"] == hook.taken[0]["reason"] == "16.0 images/s and rank over 100 steps, 25% of the usual 64.0"


def test_a_driver_that_ends_before_the_run_begins_notifies_too(run: RunDirectory, hook: Hook) -> None:
    run.claim(named_recipe("tiny").amended(FIELDS))
    error = DatasetError("data set", "must hold a manifest.json", "/ds", "make it")

    with pytest.raises(DatasetError), end_noted(run, environ_of(hook.endpoint)):
        raise error

    assert [(notice["kind"], notice["reason"]) for notice in hook.taken] == [("failed", str(error))]


def test_such_a_driver_whose_webhook_fails_says_so(
    run: RunDirectory, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreported_end, "PATIENCE", QUICK)
    hook.statuses = [500] * 1000
    run.claim(named_recipe("tiny").amended(FIELDS))

    with pytest.raises(DatasetError), end_noted(run, environ_of(hook.endpoint)):
        raise DatasetError("data set", "must hold a manifest.json", "/ds", "make it")

    assert [event["kind"] for event in run.read_events()] == ["failed", "notice-failed"]
    assert reasons(run) == ["not delivered when the run ended: failed; 127.0.0.1 answered 500"]


def test_the_webhooks_address_is_nowhere_but_in_the_request(
    start: Start, run: RunDirectory, hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    run.claim(named_recipe("tiny").amended(FIELDS))
    hook.statuses = [500, 404]
    there = webhook(run, hook.endpoint)
    monitor = start(webhook=there, patience=QUICK)
    begin(monitor)
    record(monitor, range(1, 11))
    monitor.end("finished")
    write_report(run)

    assert hook.asked == 2
    written = "".join(path.read_text(errors="replace") for path in Path(run.url).rglob("*") if path.is_file())
    shown = json.dumps(run_status(run)) + repr(there) + repr(monitor._config) + caplog.text
    assert SECRET not in written + shown
    assert "env:CONVMAE_NOTIFY_URL" in written


def test_a_monitors_settings_travel_to_its_process(run: RunDirectory, hook: Hook) -> None:
    sent = pickle.loads(pickle.dumps(webhook(run, hook.endpoint)))

    sent.post(Notice("failed", 1.0, 1, 1, ""))

    assert hook.kinds == ["failed"]
