"""What is used of Ray's insides, and the check that the installed version has it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from jobs.errors import DependencyError

PINNED = "2.60.0"
"""The version in constraints.txt."""


class Internal(NamedTuple):
    """Something that Ray does not document."""

    path: str
    """`module:name.name`."""
    use: str
    """What it is needed for."""


_TRAIN = "ray.train.v2._internal"
_SCALING = f"{_TRAIN}.execution.scaling_policy"
_CONTROLLER = f"{_TRAIN}.execution.controller.state"
_NODES = "which nodes are there, before a process connects"
_PARCEL = "the store's settings on their way to a job"
_KILL = "ending actors of which there is no handle"
_GROUP = "sizing the worker group by the nodes that answer"
_TOLD = "what becomes of the worker group besides its end"
_ASK = "a worker whose connection broke is asked again"
_CONNECT = "connecting the ranks by the right interface"
_START = "starting the worker group"
_STANDBY = "processes that have imported what a rank needs"

OF_COMMANDS = (
    Internal("ray._raylet:InnerGcsClient.get_all_node_info", _NODES),
    Internal("ray._raylet:InnerGcsClient.internal_kv_get", _PARCEL),
    Internal("ray._raylet:InnerGcsClient.internal_kv_del", _PARCEL),
    Internal("ray.job_submission:JobSubmissionClient._do_request", _PARCEL),
    Internal("ray:_config.health_check_period_ms", "what `convmae doctor` says of silent hosts"),
    Internal("ray:_config.health_check_timeout_ms", "what `convmae doctor` says of silent hosts"),
    Internal("ray:_config.health_check_failure_threshold", "what `convmae doctor` says of silent hosts"),
    Internal("ray._private.utils:get_entrypoint_name", "command lines that are no UTF-8"),
)
"""Checked where they are used: only some commands need them."""

OF_DRIVERS = (
    Internal("ray._raylet:GcsClient", _NODES),
    Internal("ray._raylet:RAY_NODE_ID_KEY", "keeping a group off nodes that do not answer"),
    Internal("ray._private.state:state.get_draining_nodes", _GROUP),
    Internal("ray._private.state:actors", _KILL),
    Internal("ray._private.grpc_utils:init_grpc_channel", _KILL),
    Internal("ray.core.generated.gcs_service_pb2:KillActorViaGcsRequest", _KILL),
    Internal("ray.core.generated.gcs_service_pb2_grpc:ActorInfoGcsServiceStub", _KILL),
    Internal("ray.train.v2.api.config:FailureConfig", _START),
    Internal("ray.train.v2.api.config:LoggingConfig", _START),
    Internal("ray.train.v2.api.config:RunConfig", _START),
    Internal("ray.train.v2.api.config:ScalingConfig", _START),
    Internal("ray.train.v2.torch.torch_trainer:TorchTrainer._create_default_callbacks", _START),
    Internal("ray.train.v2.torch.torch_trainer:TorchTrainer._initialize_and_run_controller", _GROUP),
    Internal(f"{_TRAIN}.callbacks.datasets:DatasetsCallback", _START),
    Internal(f"{_TRAIN}.execution.callback:ControllerCallback.after_controller_state_update", _TOLD),
    Internal(f"{_TRAIN}.execution.callback:ControllerCallback.before_controller_execute_failure_decision", _TOLD),
    Internal(f"{_TRAIN}.execution.callback:ControllerCallback.on_controller_start_worker_group", _GROUP),
    Internal(f"{_TRAIN}.execution.callback:WorkerGroupCallback.after_worker_group_start", _ASK),
    Internal(f"{_TRAIN}.execution.worker_group.poll:WorkerStatus", _ASK),
    Internal(f"{_TRAIN}.execution.worker_group.worker_group:WorkerGroup._poll_workers_and_collect_errors", _ASK),
    Internal(
        f"{_TRAIN}.execution.worker_group.worker_group:WorkerGroup.execute_single_async", "checking each rank's node"
    ),
    Internal(f"{_CONTROLLER}:PreemptingState", _TOLD),
    Internal(f"{_CONTROLLER}:ReschedulingState", _TOLD),
    Internal(f"{_TRAIN}.exceptions:WorkerGroupStartupFailedError", _TOLD),
    Internal(f"{_TRAIN}.execution.worker_group.worker:RayTrainWorker", "finding the ranks of a silent node"),
    Internal(f"{_SCALING}:NoopDecision", _GROUP),
    Internal(f"{_SCALING}:ResizeDecision", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy.make_decision_for_non_running_worker_group", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy.make_decision_for_running_worker_group", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy._autoscaling_coordinator", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy._count_possible_workers", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy._get_reserved_resources", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy._get_resize_decision", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy._maybe_send_resource_request", _GROUP),
    Internal(f"{_SCALING}:ElasticScalingPolicy._send_resource_request", _GROUP),
    Internal(f"{_SCALING}.autoscaling_coordinator_client:TrainAutoscalingCoordinatorClient", _GROUP),
    Internal(
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:_AutoscalingCoordinatorActor",
        "making it anew when its node is gone",
    ),
    Internal("ray.train.torch.config:_TorchBackend.on_start", _CONNECT),
    Internal("ray.train.torch.config:_TorchBackend.on_shutdown", _CONNECT),
    Internal("ray.train.torch.config:_shutdown_torch", _CONNECT),
)
"""Checked when a driver starts."""

OF_STANDBY = (
    Internal("ray._private.ray_constants:WORKER_PROCESS_SETUP_HOOK_ENV_VAR", _STANDBY),
    Internal("ray._private.worker:global_worker.current_job_id", _STANDBY),
    Internal("ray._private.worker:global_worker.node", _STANDBY),
    Internal("ray._private.grpc_utils:init_grpc_channel", _STANDBY),
    Internal("ray.core.generated.common_pb2:PYTHON", _STANDBY),
    Internal("ray.core.generated.node_manager_pb2:PrestartWorkersRequest", _STANDBY),
    Internal("ray.core.generated.node_manager_pb2_grpc:NodeManagerServiceStub", _STANDBY),
    Internal("ray.core.generated.runtime_environment_pb2:RuntimeEnvInfo", _STANDBY),
)
"""Never checked: a run does without, after a warning."""


def of_ray(path: str) -> Any:
    """Something of Ray's insides, imported when it is asked for.

    Args:
        path: `module:name.name`, as in the table.

    Raises:
        DependencyError: The installed version does not have it.
    """
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise DependencyError.missing("ray", f"{module}.{names}", PINNED) from error
    return found


def check_ray(internals: Iterable[Internal] = OF_DRIVERS) -> None:
    """Check that the installed Ray has all that a driver uses of its insides. Imports Ray Train.

    Raises:
        DependencyError: Names the first that is missing, and both versions.
    """
    for internal in internals:
        of_ray(internal.path)
