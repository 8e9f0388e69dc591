"""Which events are worth a notice, and that a driver which replays them decides alike."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.notices.notice_rules import NoticeRules

HOUR = 3600.0


def event(kind: str, at_seconds: float, reason: str = "") -> dict[str, Any]:
    return {"kind": kind, "at_seconds": at_seconds, "attempt": 1, "step": 7, "reason": reason}


def kinds(*events: dict[str, Any]) -> list[str]:
    rules = NoticeRules()
    return [notice.kind if (notice := rules.see(each)) else "" for each in events]


@pytest.mark.parametrize("kind", ["start", "checkpoint", "stopped", "probe", "recovered", "notice-failed", "hang"])
def test_most_events_are_not_worth_one(kind: str) -> None:
    assert kinds(event(kind, 1.0, "anything")) == [""]


def test_ends_are_worth_one_each_time() -> None:
    assert kinds(event("failed", 1.0), event("failed", 2.0), event("finished", 3.0)) == ["failed", "failed", "finished"]


def test_waiting_is_one_until_an_attempt_begins() -> None:
    waits = [
        event("waiting", 1.0),
        event("waiting", 9 * HOUR),
        event("resize", 10 * HOUR),
        event("waiting", 10.1 * HOUR),
    ]

    assert kinds(*waits) == ["waiting", "", "", "waiting"]


def test_more_than_three_restarts_within_an_hour_are_a_loop_and_one_notice_an_hour() -> None:
    times = [0.0, 0.3, 0.6, 0.9, 1.0, 1.2, 1.5, 1.8, 1.95]

    found = kinds(*(event("restart", time * HOUR) for time in times))

    assert [time for time, kind in zip(times, found, strict=True) if kind == "restart-loop"] == [0.9, 1.95]
    assert kinds(*(event("restart", time * HOUR / 2.6) for time in range(9))) == [""] * 9, "three within each hour"


def test_what_is_not_finite_is_one_notice_an_hour_however_it_is_met() -> None:
    not_finite = [
        event("skipped", 0.0, "the loss of rank 1 is not finite"),
        event("rollback", 0.5 * HOUR),
        event("restart", 0.9 * HOUR, "rank 0: NonFiniteLossError: step 8"),
        event("skipped", 1.1 * HOUR),
    ]

    assert kinds(*not_finite) == ["not-finite", "", "", "not-finite"]
