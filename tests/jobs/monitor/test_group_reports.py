"""What becomes of what the controller reports to the monitor, and asks of it."""

from __future__ import annotations

import time

from monitored_runs import (
    FakeClock,
    Start,
    begin,
    commit,
    last_event,
    record,
    scraped,
)

from jobs.monitor.group_reports import LEAST_SAVE_SECONDS
from jobs.rank.watchdog import Examined, Pulse
from jobs.run.directory import RunDirectory
from pipeline.host.process_identity import ProcessIdentity


def test_failures_without_progress_are_given_up(start: Start) -> None:
    monitor = start(max_restarts=2)

    assert [monitor.worker_failed("rank 0: boom", remedy="restart") for _ in range(2)] == ["", ""]
    assert monitor.worker_failed("rank 0: boom", remedy="restart") == (
        "3 failures without a new checkpoint; the last: rank 0: boom"
    )


def test_a_checkpoint_is_progress(start: Start) -> None:
    monitor = start(max_restarts=2)
    begin(monitor)

    for step in range(1, 10):
        assert monitor.worker_failed("rank 0: boom", remedy="restart") == ""
        assert monitor.worker_failed("rank 0: boom", remedy="restart") == ""
        commit(monitor, step)


def test_no_restart_is_made_where_none_is_allowed(start: Start) -> None:
    assert start(max_restarts=0).worker_failed("rank 0: boom", remedy="restart").endswith("rank 0: boom")


def test_what_no_restart_can_mend_is_given_up_at_once(start: Start) -> None:
    assert start(max_restarts=100).worker_failed("rank 0: bad data", remedy="none") == "rank 0: bad data"


def test_what_the_store_took_once_is_asked_for_again(start: Start) -> None:
    refused, remedy = "rank 0: CredentialsError: expired", "restart after progress"
    assert start().worker_failed(refused, remedy) == refused, "nothing was trained yet"

    monitor = start(max_restarts=2)
    begin(monitor)
    record(monitor, range(1, 3))
    assert monitor.worker_failed(refused, remedy) == ""
    begin(monitor)  # from step 0: there is no checkpoint
    assert monitor.worker_failed(refused, remedy) == ""
    assert monitor.worker_failed(refused, remedy).startswith("3 failures without a new checkpoint")
    monitor.flush()
    assert start().worker_failed(refused, remedy) == "", "an earlier driver trained"


def test_ranks_are_asked_to_pause_until_they_have_saved(start: Start) -> None:
    monitor = start()
    assert not monitor.pause()
    begin(monitor)
    record(monitor, range(1, 2))
    assert not monitor.pause()

    # A reply that comes too late for a step is not read: the next one must say the same.
    assert [record(monitor, range(step, step + 1)) for step in (2, 3)] == ["pause", "pause"]
    assert not monitor.pause()
    monitor.paused()

    assert monitor.pause()
    assert monitor.pause(), "they still do"
    assert not record(monitor, range(4, 5)), "nobody ended them, and they train on"
    assert not monitor.pause()
    monitor.end_pause()  # they did not save in time
    assert not record(monitor, range(5, 6))


def test_who_stood_still_in_one_attempt_does_not_in_the_next(start: Start) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 2))
    monitor.pause()
    monitor.paused()
    begin(monitor, resume_step=1)
    assert not monitor.pause()
    monitor.paused()

    monitor.worker_failed("rank 0: ActorDiedError: killed", remedy="restart")
    monitor.group_ended()

    assert monitor.status()["state"] == "restarting"
    assert not monitor.pause()


def test_a_node_that_is_unreachable_is_why_the_group_ended(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 4))
    for rank, node in enumerate("abba"):
        monitor.pulse(Pulse(1, rank, f"host-{node}", node, ProcessIdentity(100 + rank), "", "step", 7, 0.0))

    monitor.unreachable({"b": "host-b, 10.0.0.2"}, 6.4)
    # What Ray says of the ranks that are ended for it, and of those that waited for them.
    assert monitor.worker_failed("rank 0: ActorDiedError: killed", remedy="restart") == ""
    begin(monitor, resume_step=3)
    monitor.flush()

    text = "the node of ranks 1, 2 (host-b, 10.0.0.2) has been unreachable for 6 s"
    told = next(event for event in run.read_events() if event["kind"] == "unreachable")
    assert (told["reason"], told["step"], told["attempt"]) == (text, 3, 1)
    assert last_event(run)["reason"] == text
    assert scraped(monitor)["convmae_failures_total NodeUnreachable"] == 1
    monitor.worker_failed("rank 1: ValueError: boom", remedy="restart")
    begin(monitor, resume_step=3)
    assert last_event(run)["reason"] == "rank 1: ValueError: boom", "of its own attempt alone"


def test_a_node_that_is_unreachable_while_ranks_start_is_told_by_its_name(start: Start, run: RunDirectory) -> None:
    monitor = start()

    monitor.unreachable({"b": "host-b, 10.0.0.2"}, 6.0)
    monitor.flush()

    text = "a node where ranks were to start (host-b, 10.0.0.2) has been unreachable for 6 s"
    assert last_event(run)["reason"] == text


def test_nodes_that_are_lost_together_are_told_in_one_line(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    for rank in range(12):
        monitor.pulse(Pulse(1, rank, "host", f"node-{rank // 2}", ProcessIdentity(100 + rank), "", "step", 7, 0.0))

    monitor.unreachable({f"node-{number}": f"host-{number}, 10.0.0.{number}" for number in range(1, 6)}, 6.0)
    monitor.flush()

    assert last_event(run)["reason"] == (
        "the nodes of ranks 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 (host-1, 10.0.0.1; host-2, 10.0.0.2; host-3, 10.0.0.3;"
        " host-4, 10.0.0.4 and 1 more) have been unreachable for 6 s"
    )


def test_a_drained_node_is_told_and_has_the_ranks_save_now_and_before_it_goes(
    start: Start, run: RunDirectory, clock: FakeClock
) -> None:
    clock.tick_seconds = 1e-3
    monitor = start(monotonic=clock)
    begin(monitor)
    record(monitor, range(1, 6))

    monitor.drain([1, 3], 29.6)

    # A reply that comes too late for a step is not read: the next one must say the same.
    assert [record(monitor, range(step, step + 1)) for step in (6, 7)] == ["save", "save"]
    monitor.save_began(7)
    assert record(monitor, range(8, 9)) == ""
    clock.seconds += 29.6 - LEAST_SAVE_SECONDS + 0.1
    assert record(monitor, range(9, 10)) == "pause"
    begin(monitor, resume_step=9)
    assert record(monitor, range(10, 11)) == "", "the drain is over"
    monitor.flush()
    told = next(event for event in run.read_events() if event["kind"] == "drain")
    assert (told["step"], told["reason"]) == (5, "the node of ranks 1, 3 goes away in 30 s")


def test_a_run_that_has_no_room_says_so_until_it_trains(start: Start, run: RunDirectory) -> None:
    monitor = start()

    monitor.waiting(1, 2)

    assert (monitor.status()["state"], monitor.status()["waiting"]) == ("waiting", True)
    begin(monitor)
    assert (monitor.status()["state"], monitor.status()["waiting"]) == ("running", False)
    monitor.waiting(0, 2)
    monitor.request_stop("SIGTERM")
    monitor.waiting(0, 2)
    assert (monitor.status()["state"], monitor.status()["waiting"]) == ("stopping", True)
    monitor.flush()
    assert "there is room for 0 workers, and min_workers is 2" in last_event(run)["reason"]


def test_a_rank_that_hangs_is_told_and_is_why_the_attempt_ended(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 4))
    now = time.monotonic()
    for rank in range(2):
        monitor.pulse(Pulse(1, rank, "node-1", "n", ProcessIdentity(100 + rank), "", "step", 7 + rank, 0.0))
    examined = []

    def examine(pulse: Pulse) -> Examined:
        examined.append(pulse.rank)
        # What the controller says when it sees the death before the examination has ended.
        assert monitor.worker_failed("rank 0: ActorDiedError: killed", remedy="restart") == ""
        return Examined("stopped (T)", "stacks")

    monitor.look_for_hangs(now + 29.0, examine)
    assert examined == []
    monitor.look_for_hangs(now + 31.0, examine)
    monitor.look_for_hangs(now + 99.0, examine)
    assert examined == [0, 1]  # neither spoke
    monitor.flush()

    hang = next(event for event in run.read_events() if event["kind"] == "hang")
    assert (hang["rank"], hang["host"], hang["pid"], hang["step"], hang["stack"]) == (0, "node-1", 100, 3, "stacks")
    assert scraped(monitor)["convmae_hangs_total"] == 2
    begin(monitor, resume_step=3)
    assert last_event(run)["kind"] == "restart"
    assert last_event(run)["reason"].startswith("rank 1 on node-1 (pid 101) has not spoken for 31 s; its process is st")
