"""A job handed to Ray's head, for which a stand-in for its client answers."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.cluster.submission import hand_over
from jobs.errors import ClusterError

JOB = {"entrypoint": "python -m jobs.control.supervisor s3://b/runs/r", "submission_id": "r-a1"}
NOT_READY = "Request failed with status code 500: No available agent to submit job, please try again later.."


class Head:
    """Answers with one error after another, then accepts the job."""

    def __init__(self, *errors: str) -> None:
        self.errors, self.asked = list(errors), 0

    def submit_job(self, **job: Any) -> str:
        self.asked += 1
        if self.errors:
            raise RuntimeError(self.errors.pop(0))
        return str(job["submission_id"])


def test_a_cluster_that_has_only_just_started_is_waited_for() -> None:
    head = Head(NOT_READY, NOT_READY)

    assert hand_over(head, JOB, "http://head:8265") == "r-a1"
    assert head.asked == 3


def test_a_cluster_that_stays_without_an_agent_is_reported_in_one_line() -> None:
    head = Head(NOT_READY, NOT_READY)

    with pytest.raises(
        ClusterError, match=r"RAY_ADDRESS: must accept the job \(.*No available agent.*head:8265"
    ) as caught:
        hand_over(head, JOB, "http://head:8265", patience_seconds=0)

    assert head.asked == 1
    assert "convmae doctor" in str(caught.value)


def test_a_job_that_is_refused_is_not_submitted_again() -> None:
    head = Head("Request failed with status code 400: Traceback ...\nValueError: a job of that id exists")

    with pytest.raises(ClusterError, match="a job of that id exists"):
        hand_over(head, JOB, "http://head:8265")

    assert head.asked == 1
