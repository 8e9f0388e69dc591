"""How a request for a profile goes to one rank, and what comes of it. Real ranks: test_profiled_run.py."""

from __future__ import annotations

import pytest
from monitored_runs import Start, begin, last_event, record

from jobs.monitor.monitor import RunMonitor
from jobs.run.directory import RunDirectory
from jobs.run.profile_request import ProfileRequest

REQUEST = ProfileRequest(rank=1, steps=3, key="k1")


def failed(run: RunDirectory, monitor: RunMonitor) -> tuple[str, str]:
    monitor.flush()
    event = last_event(run)
    assert event["kind"] == "profile-failed"
    return event["request"], event["reason"]


def test_all_ranks_ask_one_takes_it_once_and_the_event_says_where_the_result_is(
    start: Start, run: RunDirectory
) -> None:
    monitor = start()
    begin(monitor)
    assert record(monitor, range(1, 2)) == ""

    monitor.ask_profile(REQUEST)

    assert [record(monitor, range(2, 3)), record(monitor, range(3, 4))] == ["profile", "profile"], "until it is taken"
    assert monitor.take_profile(0) is None
    assert monitor.take_profile(1) == REQUEST
    assert monitor.take_profile(1) is None, "a reply that came late asks again"
    assert record(monitor, range(4, 5)) == ""
    monitor.profiled(REQUEST, step=6, url="s3://b/p", files=["trace.json.gz"], note="")
    monitor.flush()
    event = last_event(run)
    assert (event["kind"], event["step"], event["rank"], event["steps"]) == ("profile", 6, 1, 3)
    assert (event["request"], event["url"], event["files"]) == ("k1", "s3://b/p", ["trace.json.gz"])


def test_a_save_or_a_stop_comes_first(start: Start) -> None:
    monitor = start()
    begin(monitor)
    monitor.ask_profile(REQUEST)
    monitor.drain([0], 1000.0)

    assert record(monitor, range(10, 11)) == "save"
    monitor.save_began(10)
    assert record(monitor, range(11, 12)) == "profile"
    monitor.request_stop("because")
    assert record(monitor, range(12, 13)) == "stop"


def test_one_at_a_time_and_another_after_it(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    monitor.ask_profile(REQUEST)

    monitor.ask_profile(ProfileRequest(0, 1, "k2"))

    assert failed(run, monitor) == ("k2", "rank 1 is being profiled")
    assert monitor.take_profile(0) is None and monitor.take_profile(1) == REQUEST
    monitor.profile_failed(REQUEST, "OSError: the disk is full")
    assert failed(run, monitor) == ("k1", "OSError: the disk is full")
    again = ProfileRequest(0, 1, "k3")
    monitor.ask_profile(again)
    assert monitor.take_profile(0) == again


def test_a_rank_that_is_not_there_is_refused(start: Start, run: RunDirectory) -> None:
    monitor = start()
    monitor.ask_profile(REQUEST)
    assert failed(run, monitor) == ("k1", "0 ranks train now, and the run is starting")
    begin(monitor, world_size=1)

    monitor.ask_profile(REQUEST)

    assert failed(run, monitor) == ("k1", "1 ranks train now, and the run is running")
    assert record(monitor, range(1, 2)) == ""


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_profile_ends_with_its_attempt(start: Start, run: RunDirectory, is_taken: bool) -> None:
    monitor = start()
    begin(monitor)
    monitor.ask_profile(REQUEST)
    assert not is_taken or monitor.take_profile(1)
    monitor.worker_failed("rank 1: lost", remedy="restart")

    begin(monitor)

    (event,) = [event for event in run.read_events() if event["kind"] == "profile-failed"]
    assert event["request"] == "k1" and "attempt ended" in event["reason"]
    assert monitor.take_profile(1) is None
    assert record(monitor, range(1, 2), attempt=2) == ""
