"""Questions of Ray Train's controller to its workers, which get over a connection that broke. Imports Ray Train late.

A link that is silent for some seconds may end a connection on one side alone: the worker's socket is gone, while the
controller, which has nothing to send, takes it for open. Ray Train waits ten minutes for the answer, and then ends a
group that has trained on, or has long finished. Here a question is asked anew, which shows
that the connection is broken; and a worker that cannot be reached for a while is taken for one that works, since who
hangs, and whose node is gone, is the run's own watch's to find.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

ASK_AGAIN_SECONDS = 10.0
UNREACHABLE_SECONDS = 60.0
"""For which a worker may not be reached; the watch ends those of a silent node sooner."""


class PatientPolls(WorkerGroupCallback):
    """Has every worker group ask so."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train."""
        polls = Polls(worker_group._poll_workers_and_collect_errors, worker_group._world_rank_to_ongoing_poll)
        worker_group._poll_workers_and_collect_errors = polls.statuses


class Polls:
    """The questions to one worker group.

    Owns: since when each rank has not been reached.
    """

    def __init__(
        self,
        ask: Callable[[float | None], list[WorkerStatus]],
        ongoing: dict[int, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the place of Ray Train's own.

        Args:
            ask: Asks every worker, and waits up to some seconds for all answers.
            ongoing: By rank, the question that has no answer yet, with its `start_time`; one that is not here is asked.
            clock: Seconds.
        """
        self._ask, self._ongoing, self._clock = ask, ongoing, clock
        self._unreached: dict[int, float] = {}

    def statuses(self, timeout: float | None) -> list[WorkerStatus]:
        """How all workers are, by rank."""
        for rank, question in list(self._ongoing.items()):
            if self._clock() - question.start_time > ASK_AGAIN_SECONDS:
                del self._ongoing[rank]
        return [self._excused(rank, status) for rank, status in enumerate(self._ask(timeout))]

    def _excused(self, rank: int, status: WorkerStatus) -> WorkerStatus:
        if not isinstance(getattr(status.error, "health_check_failure", None), ActorUnavailableError):
            self._unreached.pop(rank, None)
            return status
        if self._clock() - self._unreached.setdefault(rank, self._clock()) > UNREACHABLE_SECONDS:
            return status
        return WorkerStatus(running=True, error=None, training_report=None)
