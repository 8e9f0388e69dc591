"""Ray Train's insides under names of ours. Imports Ray Train: import it late, and after `check_ray`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _shutdown_torch, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

__all__ = [
    "ControllerCallback",
    "ElasticPolicy",
    "FailureConfig",
    "LoggingConfig",
    "NoopDecision",
    "PreemptingState",
    "ReschedulingState",
    "ResizeDecision",
    "RunConfig",
    "ScalingConfig",
    "TorchBackend",
    "TorchConfig",
    "TrainerWithPolicy",
    "WorkerGroupCallback",
    "WorkerGroupStartupFailedError",
    "shutdown_torch",
]

TorchBackend = _TorchBackend
shutdown_torch = _shutdown_torch


class TrainerWithPolicy(TorchTrainer):
    """Ray Train's trainer, whose scaling policy is given, and which reads no data sets of Ray Data."""

    policy: ElasticPolicy

    def _create_default_callbacks(self) -> Any:
        # Ray Data's would start a process for every worker group, and none of its data sets is read here.
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, "scaling_policy": self.policy})


class ElasticPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, which counts the room of the cluster as its children say."""

    client: Callable[[str], Any] = TrainAutoscalingCoordinatorClient
    """What asks for resources in somebody's name."""
    count_seconds: float = ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S
    """For which what was counted last holds."""

    def count_room(self) -> Mapping[str, Mapping[str, float]] | None:
        """Resources that this run can have, by node id; None if nobody knows."""
        raise NotImplementedError

    def request_resources(self, requester: str) -> None:
        """Ask for the resources of all workers in somebody's name; from now on with a new handle."""
        self._requester_id = requester
        self._coordinator_client = type(self).client(requester)
        self._send_resource_request()  # type: ignore[no-untyped-call]

    def reserved_reply(self) -> Any:
        """The promise of what is reserved for the requester, freshly counted."""
        return self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)

    @property
    def last_room(self) -> Mapping[str, Mapping[str, float]]:
        """What was counted last; empty where nobody knew."""
        return self._latest_reserved_resources or {}

    def room(self) -> Mapping[str, Mapping[str, float]]:
        """What is counted now, or was within `count_seconds`; empty where nobody knows."""
        return self._get_reserved_resources() or {}

    def possible_workers(self, room: Mapping[str, Mapping[str, float]]) -> int:
        """Workers that so much room is enough for; no more than the run takes."""
        return self._count_possible_workers({node: dict(has) for node, has in room.items()})

    def resized(self, workers: int) -> ResizeDecision:
        """The decision for a group of so many workers."""
        return self._get_resize_decision(workers)

    def _get_reserved_resources(self) -> Any:
        if time.monotonic() - self._latest_reserved_resources_query_time >= self.count_seconds:
            self._latest_reserved_resources = self.count_room()  # type: ignore[assignment]
            self._latest_reserved_resources_query_time = time.monotonic()
        return self._latest_reserved_resources
