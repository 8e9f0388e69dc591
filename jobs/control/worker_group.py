"""The worker group of a run, as Ray Train's controller keeps it: started, watched, restarted.

Ray Train has no public hook for most of what happens to a group: jobs.cluster.ray_internals. Imports Ray Train: import
it late.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import ray
from ray.train import UserCallback

from jobs.cluster.node_watch import NodeWatch
from jobs.cluster.ray_internals.polls import PatientPolls
from jobs.cluster.ray_internals.train import (
    ControllerCallback,
    FailureConfig,
    LoggingConfig,
    PreemptingState,
    ReschedulingState,
    RunConfig,
    ScalingConfig,
    TrainerWithPolicy,
    WorkerGroupStartupFailedError,
)
from jobs.control.memory_holders import MemoryHolders
from jobs.control.node_policy import FollowNodes
from jobs.errors import RunFailedError
from jobs.monitor.failure_cause import Failure, describe_failure, describe_start_failure
from jobs.rank.preflight import Preflight
from jobs.rank.process_group import RanksOverNodes
from jobs.rank.standby import rank_environment
from jobs.rank.trainer import TrainJob, train_worker
from pipeline.host.scratch import scratch_folder

logger = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = 0.5
"""How often Ray Train asks its workers how they are; it restarts them no sooner than it has noticed."""
HEALTH_CHECKS_PER_SECOND = 1024.0
"""How many answers its controller takes, at most: of more workers it asks each less often."""
START_TIMEOUT_SECONDS = 20.0
"""For placing a group on nodes that have just answered; one that fell silent since never will."""


def fit(job: TrainJob) -> None:
    """Train `job` with Ray Train until its workers return, or the monitor gives it up. Blocks.

    Not on the main thread, where Ray Train would take SIGINT for itself.

    Raises:
        Exception: What Ray Train raises when it gives up; jobs.monitor.failure_cause finds the reason in it.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_SECONDS))
    recipe = job.recipe
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(health_check_seconds(recipe.max_workers)))
    resources = {"CPU": recipe.cpus_per_worker} | ({"GPU": 1.0} if recipe.device == "cuda" else {})
    with scratch_folder() as folder, NodeWatch(job.monitor):
        reporter: Any = ControllerReporter(job.monitor)
        patient_polls: Any = PatientPolls()
        holders: Any = MemoryHolders(job.run)
        variables = rank_environment(os.environ, recipe.device, recipe.cpus_per_worker, standby=recipe.standby)
        run_config = RunConfig(
            name=job.run.name,
            storage_path=folder,  # Ray's own bookkeeping; checkpoints are ours
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[FailureReporter(job.monitor), reporter, patient_polls, holders],
            worker_runtime_env={"env_vars": variables},
            logging_config=LoggingConfig(log_level="ERROR"),
        )
        scaling_config = ScalingConfig(
            num_workers=(recipe.min_workers, recipe.max_workers),
            use_gpu=recipe.device == "cuda",
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=recipe.resize_seconds,
        )
        trainer: Any = TrainerWithPolicy(
            lambda: train_worker(job),
            torch_config=RanksOverNodes.of(recipe, Preflight.of(recipe, job.monitor)),
            scaling_config=scaling_config,
            run_config=run_config,
        )
        trainer.policy = FollowNodes(scaling_config, job.monitor, job.run.url, standby=recipe.standby)
        trainer.fit()


def health_check_seconds(workers: int) -> float:
    """Between two questions to each of so many workers."""
    return max(HEALTH_CHECK_SECONDS, workers / HEALTH_CHECKS_PER_SECOND)


class FailureReporter(UserCallback):
    """Reports to the monitor why an attempt ended, and asks it whether to restart."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raise to end the run."""
        for rank, exception in sorted(worker_exceptions.items()):
            logger.error("rank %d failed: %s", rank, exception)
        report_failure(self._monitor, describe_failure(worker_exceptions))


class ControllerReporter(ControllerCallback):
    """Reports to the monitor that an attempt has ended, could not be started, or is about to lose a node."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002
        """Note that no rank trains now."""
        ray.get(self._monitor.group_ended.remote())

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Report a node that is being drained, and until when; raise to end a run whose ranks cannot be started."""
        if isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
            info = current_state.preemption_info
            seconds = None if info.deadline_ms is None else info.deadline_ms / 1e3 - time.time()
            self._monitor.drain.remote(info.preempted_ranks, seconds)
        if isinstance(current_state, ReschedulingState) and not isinstance(previous_state, ReschedulingState):
            failure = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupFailedError):
                logger.error("the ranks could not be started: %s", failure, exc_info=failure)
                report_failure(self._monitor, describe_start_failure(failure))


def report_failure(monitor: Any, failure: Failure) -> None:
    """Report to the monitor why an attempt ended.

    Raises:
        RunFailedError: The run is given up.
    """
    if given_up := ray.get(monitor.worker_failed.remote(*failure)):
        raise RunFailedError(given_up)
