"""The worker group of a run, as Ray Train's controller keeps it: started, watched, resized, restarted.

Ray Train has no public hook for most of what happens to a group; what is used here is of its developer API, and its
version is pinned. Imports Ray: whoever needs it imports it late.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from jobs.cluster.node_watch import NodeWatch, end_actors, living_actors, raylet_addresses, unusable_nodes
from jobs.control.failure_cause import Failure, describe_failure, describe_start_failure
from jobs.errors import RunFailedError
from jobs.rank.instruction import PAUSE_SECONDS
from jobs.rank.process_group import RanksOverNodes
from jobs.rank.standby import Newcomers, own_environment, rank_environment, start_standbys
from jobs.rank.trainer import TrainJob, train_worker
from pipeline.host.scratch import scratch_folder

logger = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = 0.5
"""How often Ray Train asks its workers how they are; it restarts them no sooner than it has noticed."""
HEALTH_CHECKS_PER_SECOND = 1024.0
"""How many answers its controller takes, at most: of more workers it asks each less often."""
START_TIMEOUT_SECONDS = 20.0
"""For placing a group on nodes that have just answered; one that fell silent since never will."""
COORDINATOR_SECONDS = 5.0
COORDINATOR_CLASS = "_AutoscalingCoordinatorActor"
UNCOUNTED_LOOKS = 5
"""Without an answer to what there is room for, until the run says that it waits, and can be stopped."""


def fit(job: TrainJob) -> None:
    """Train `job` with Ray Train until its workers return, or the monitor gives it up. Blocks.

    Not on the main thread, where Ray Train would take SIGINT for itself.

    Raises:
        Exception: What Ray Train raises when it gives up; jobs.control.failure_cause finds the reason in it.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_SECONDS))
    recipe = job.recipe
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(health_check_seconds(recipe.max_workers)))
    resources = {"CPU": recipe.cpus_per_worker} | ({"GPU": 1.0} if recipe.device == "cuda" else {})
    with scratch_folder() as folder, NodeWatch(job.monitor):
        telling: Any = ControllerReporter(job.monitor)
        variables = rank_environment(os.environ, recipe.device, recipe.cpus_per_worker)
        run_config = RunConfig(
            name=job.run.name,
            storage_path=folder,  # Ray's own bookkeeping; checkpoints are ours
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[FailureReporter(job.monitor), telling],
            worker_runtime_env={"env_vars": variables} if recipe.standby else {},
            logging_config=LoggingConfig(log_level="ERROR"),
        )
        scaling_config = ScalingConfig(
            num_workers=(recipe.min_workers, recipe.max_workers),
            use_gpu=recipe.device == "cuda",
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=recipe.resize_seconds,
        )
        trainer = RunTrainer(
            lambda: train_worker(job),
            torch_config=RanksOverNodes(),
            scaling_config=scaling_config,
            run_config=run_config,
        )
        trainer.follow_nodes(job, standby=recipe.standby).fit()


def health_check_seconds(workers: int) -> float:
    """Between two questions to each of so many workers."""
    return max(HEALTH_CHECK_SECONDS, workers / HEALTH_CHECKS_PER_SECOND)


class RunTrainer(TorchTrainer):
    """Ray Train's trainer, with a scaling policy of our own."""

    def follow_nodes(self, job: TrainJob, *, standby: bool) -> RunTrainer:
        """Use `FollowNodes`, which tells the monitor when it waits and has processes wait where it would grow."""
        self._policy = FollowNodes(self.scaling_config, job.monitor, job.run.url, standby=standby)
        return self

    def _create_default_callbacks(self) -> Any:
        # Ray Data's would start a process for every worker group, and none of its data sets is read here.
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, "scaling_policy": self._policy})


class FollowNodes(ElasticScalingPolicy):
    """As many workers as the nodes that answer and stay have room for.

    Ray Train's own policy goes by a list that is up to 20 s old, and by Ray's health checks: after a node's death it
    asks for a group that cannot be placed, and waits a minute for it. It counts nodes that are being drained, too.
    """

    def __init__(self, scaling_config: Any, monitor: Any, run_url: str, *, standby: bool) -> None:
        super().__init__(scaling_config)
        self._monitor, self._run_url, self._standby = monitor, run_url, standby
        self._waiting = False
        self._uncounted = 0
        """Looks in a row at which nobody could say what there is room for."""
        self._newcomers = Newcomers()
        self._unusable: set[str] = set()
        self._pause_until: float | None = None

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        """Ask for nodes in the run's name, whichever driver it has.

        Ray Train's own asks in the name of its controller. One that was killed takes nothing back, and its nodes would
        be kept for it for three minutes more: nothing would be left for the controller after it.
        """
        self._requester_id = self._run_url
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._run_url)
        self._send_resource_request()  # type: ignore[no-untyped-call]

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start a group of all that can be placed; wait where they are fewer than min_workers, and say so."""
        self._pause_until = None
        decision = super().make_decision_for_non_running_worker_group()
        waits = isinstance(decision, NoopDecision)
        if waits and not self._waiting and (self._uncounted == 0 or self._uncounted >= UNCOUNTED_LOOKS):
            possible = self._count_possible_workers(self._latest_reserved_resources or {})
            self._monitor.waiting.remote(possible, self.scaling_config.min_workers)
            self._waiting = True
        elif not waits:
            self._waiting = False
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow where there is room; a group shrinks when a node is gone, and trains on one that leaves until then.

        The ranks save first. Meanwhile the controller goes on looking after them, so that one that dies is noticed.
        """
        if self._pause_until is not None:
            return self._grow_when_saved(worker_group_state.num_workers)
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision) or decision.num_workers <= worker_group_state.num_workers:
            return NoopDecision()
        if self._is_prepared(decision.num_workers, worker_group_state):
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            return self._grow_when_saved(worker_group_state.num_workers)
        return NoopDecision()

    def _grow_when_saved(self, num_workers: int) -> Any:
        """Grow as far as there is room by now, once the ranks stand still; give it up where they take too long."""
        assert self._pause_until is not None
        try:
            if ray.get(self._monitor.pause.remote()):
                possible = self._count_possible_workers(self._get_reserved_resources() or {})
                if possible >= self.scaling_config.min_workers:  # fewer than before do no harm: all is saved
                    self._pause_until = None
                    return self._get_resize_decision(possible)
            if time.monotonic() > self._pause_until:
                logger.warning("the %d ranks did not save for a larger group; they train on", num_workers)
                self._pause_until = None
                ray.get(self._monitor.end_pause.remote())
        except RayError:
            logger.warning("the run's monitor is being restarted")
        return NoopDecision()

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Keep the group off nodes that Ray believes to be alive; it would wait for what is placed there."""
        return {RAY_NODE_ID_KEY: f"!in({','.join(sorted(self._unusable))})"} if self._unusable else None

    def _is_prepared(self, num_workers: int, group: Any) -> bool:
        """Whether processes wait where the group would grow, if they are to."""
        if not self._standby:
            return True
        here = Counter(worker.metadata.node_id for worker in group.workers)
        reserved = self._latest_reserved_resources or {}
        room = {node: self._count_possible_workers({node: has}) for node, has in reserved.items()}

        def start(node_id: str, count: int) -> bool:
            address = raylet_addresses().get(node_id)
            try:
                environment = ray.get(group.workers[0].execute_async(own_environment), timeout=COORDINATOR_SECONDS)
            except RayError:
                return False
            return address is not None and start_standbys(address, environment, count)

        return self._newcomers.are_ready(here, room, num_workers, start, time.monotonic())

    def _get_reserved_resources(self) -> Any:
        """What is reserved for this run, freshly counted, on nodes that are usable; None if nobody knows."""
        if time.monotonic() - self._latest_reserved_resources_query_time < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        try:
            counted = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            reserved: dict[str, Any] = ray.get(counted, timeout=COORDINATOR_SECONDS)
            self._unusable = unusable_nodes()
            usable = {node: what for node, what in reserved.items() if node not in self._unusable}
            self._latest_reserved_resources, self._uncounted = usable, 0
        except RayError:
            logger.warning("the cluster's resources could not be counted; trying again", exc_info=True)
            self._latest_reserved_resources, self._uncounted = None, self._uncounted + 1
            self._renew_coordinator()
        self._latest_reserved_resources_query_time = time.monotonic()
        return self._latest_reserved_resources

    def _renew_coordinator(self) -> None:
        """Let go of the actor that deals out the cluster's resources, and end it where its node does not answer.

        Ray makes it on the node of whichever driver was the first to ask, and on no other: with that node it would be
        lost to all drivers after it. Who asks for it anew has it on a node of its own.
        """
        self._unusable = unusable_nodes()
        lost = [actor for actor, node in living_actors(COORDINATOR_CLASS).items() if node in self._unusable]
        if lost:
            logger.warning("the node of Ray's %s does not answer; it is made anew", COORDINATOR_CLASS)
            end_actors(ray.get_runtime_context().gcs_address, lost)
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._run_url)
        self._send_resource_request()  # type: ignore[no-untyped-call]


class FailureReporter(UserCallback):
    """Tells the monitor why a worker group ended, and asks it whether to go on."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raise to end the run."""
        for rank, exception in sorted(worker_exceptions.items()):
            logger.error("rank %d failed: %s", rank, exception)
        report_failure(self._monitor, describe_failure(worker_exceptions))


class ControllerReporter(ControllerCallback):
    """Tells the monitor what becomes of the group besides: that it ended, could not be started, or loses a node."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002
        """Note that no rank trains now."""
        ray.get(self._monitor.group_ended.remote())

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Tell of a node that is being drained, and until when; raise to end a run whose ranks cannot be started."""
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
    """Tell the monitor why a group ended.

    Raises:
        RunFailedError: The run is to be given up.
    """
    if given_up := ray.get(monitor.worker_failed.remote(*failure)):
        raise RunFailedError(given_up)
