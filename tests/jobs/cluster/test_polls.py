"""How workers are asked that cannot be reached for a while; with links that are cut: tests/hosts/test_cut_links.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from jobs.cluster.ray_internals.polls import ASK_AGAIN_SECONDS, UNREACHABLE_SECONDS, PatientPolls, Polls

WORKS = WorkerStatus(running=True)
UNREACHED = WorkerStatus(False, WorkerHealthCheckFailedError("unreached", ActorUnavailableError("broken pipe", None)))
DEAD = WorkerStatus(False, WorkerHealthCheckFailedError("dead", ActorDiedError()))


class Group:
    """A worker group that has the given answers, one list a round."""

    def __init__(self, *answers: list[WorkerStatus]) -> None:
        self.answers = list(answers)
        self.ongoing: dict[int, Any] = {}
        self.seconds = 0.0

    def polls(self) -> Polls:
        return Polls(lambda timeout: self.answers.pop(0), self.ongoing, clock=lambda: self.seconds)


def test_a_question_without_an_answer_is_asked_anew() -> None:
    group = Group([WORKS, WORKS], [WORKS, WORKS])
    polls = group.polls()
    group.ongoing[1] = SimpleNamespace(start_time=0.0)

    group.seconds = ASK_AGAIN_SECONDS
    polls.statuses(0.5)
    assert group.ongoing, "it may still be answered"

    group.seconds += 1
    polls.statuses(0.5)
    assert not group.ongoing


def test_a_worker_that_is_not_reached_for_a_while_is_taken_for_one_that_works() -> None:
    group = Group([WORKS, UNREACHED], [WORKS, UNREACHED], [WORKS, UNREACHED])
    polls = group.polls()

    for group.seconds in (0.0, UNREACHABLE_SECONDS):
        assert polls.statuses(0.5) == [WORKS, WORKS]
    group.seconds += 1
    assert polls.statuses(0.5) == [WORKS, UNREACHED]


def test_one_that_was_reached_again_has_the_whole_time_again() -> None:
    group = Group([UNREACHED], [WORKS], [UNREACHED], [UNREACHED])
    polls = group.polls()

    for group.seconds in (0.0, 50.0, 55.0, 110.0):
        assert polls.statuses(0.5) == [WORKS]


@pytest.mark.parametrize("status", [DEAD, WorkerStatus(False, ValueError("of the training function"))])
def test_what_else_a_worker_answers_stays(status: WorkerStatus) -> None:
    assert Group([status]).polls().statuses(0.5) == [status]


def test_every_worker_group_asks_so() -> None:
    group: Any = SimpleNamespace(
        _poll_workers_and_collect_errors=lambda timeout: [UNREACHED], _world_rank_to_ongoing_poll={}
    )

    PatientPolls().after_worker_group_start(group)

    assert group._poll_workers_and_collect_errors(0.5) == [WORKS]
