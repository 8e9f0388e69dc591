"""Ray's insides under names of ours: its head, its nodes, actors without a handle, and processes started in advance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jobs.cluster.ray_internals.table import of_ray

CALL_SECONDS = 5.0
PRESTART_SECONDS = 10.0
RANK_CLASS = "RayTrainWorker"
"""The class of Ray Train's actors, each of which is a rank."""
COORDINATOR_CLASS = "_AutoscalingCoordinatorActor"
"""The class of the actor that deals out the cluster's resources."""


def nodes_of(gcs_address: str, seconds: float) -> list[Any]:
    """What a head says of each node, to a process that is not connected.

    Args:
        gcs_address: HOST:PORT of the head.
        seconds: How long it may take.
    """
    return list(of_ray("ray._raylet:GcsClient")(address=gcs_address).get_all_node_info(timeout=seconds).values())


def draining_nodes() -> set[str]:
    """Ids of the nodes that are being drained."""
    return set(of_ray("ray._private.state:state.get_draining_nodes")())


def not_on(nodes: Iterable[str]) -> dict[str, str]:
    """The label selector of actors that are to be placed on none of these nodes."""
    return {of_ray("ray._raylet:RAY_NODE_ID_KEY"): f"!in({','.join(sorted(nodes))})"}


def health_settings(names: Iterable[str]) -> dict[str, int]:
    """Settings by which this node's Ray processes look after others, by their names."""
    return {name: int(of_ray(f"ray:_config.{name}")()) for name in names}


@contextlib.contextmanager
def printable_command_line() -> Iterator[None]:
    """While active, Ray is given this process's command line as UTF-8, which names of files need not be."""
    get = of_ray("ray._private.utils:get_entrypoint_name")
    utils = of_ray("ray._private:utils")
    utils.get_entrypoint_name = lambda: get().encode("utf-8", "backslashreplace").decode()
    try:
        yield
    finally:
        utils.get_entrypoint_name = get


def dashboard_address(client: Any) -> str:
    """The URL that a client for jobs asks."""
    address: str = client._address
    return address


def put_package(client: Any, name: str, content: bytes) -> int:
    """Put something where packages of jobs are kept, in the head's key-value store; returns the HTTP status.

    Args:
        client: For jobs, of the cluster.
        name: Of the package.
        content: What is in it.
    """
    status: int = client._do_request("PUT", f"/api/packages/gcs/{name}", data=content).status_code
    return status


def take_package(gcs_address: str, name: str, seconds: float) -> bytes:
    """What is in such a package, which is gone by then; nothing where there is none."""
    gcs, key = of_ray("ray._raylet:GcsClient")(address=gcs_address), f"gcs://{name}".encode()
    content: bytes = gcs.internal_kv_get(key, None, timeout=seconds) or b""
    gcs.internal_kv_del(key, False, None, timeout=seconds)
    return content


def living_actors(class_name: str, job_id: str = "") -> dict[str, str]:
    """Actors of a class, also those that are yet to start, and on which node.

    Args:
        class_name: As Ray knows it; the ranks of a group are of RANK_CLASS.
        job_id: Ray's, of their driver; empty for any.

    Returns:
        Node id by actor id.
    """
    import ray

    table = of_ray("ray._private.state:actors")(job_id=ray.JobID.from_hex(job_id) if job_id else None)
    return {
        actor: facts["Address"]["NodeID"]
        for actor, facts in table.items()
        if facts["ActorClassName"] == class_name and facts["State"] != "DEAD"
    }


def end_actors(gcs_address: str, actors: Sequence[str]) -> None:
    """Have Ray's head count actors as dead at once; their processes are killed as soon as their nodes can be reached.

    `ray.kill` would do, but asks for handles, which the controller alone has.

    Args:
        gcs_address: Host and port of the head's GCS.
        actors: Ids.
    """
    request = of_ray("ray.core.generated.gcs_service_pb2:KillActorViaGcsRequest")
    stub = of_ray("ray.core.generated.gcs_service_pb2_grpc:ActorInfoGcsServiceStub")
    with of_ray("ray._private.grpc_utils:init_grpc_channel")(gcs_address) as channel:
        service = stub(channel)
        asked = [
            service.KillActorViaGcs.future(
                request(actor_id=bytes.fromhex(actor), force_kill=True, no_restart=True), timeout=CALL_SECONDS
            )
            for actor in actors
        ]
        for answer in asked:
            answer.result()


def setup_hook_variable() -> str:
    """Name of the variable that names a function which Ray calls in every process before it has work."""
    name: str = of_ray("ray._private.ray_constants:WORKER_PROCESS_SETUP_HOOK_ENV_VAR")
    return name


def own_raylet() -> tuple[str, int]:
    """Host and port of the raylet of this process's node."""
    node = of_ray("ray._private.worker:global_worker.node")
    return node.node_ip_address, node.node_manager_port


def own_environment() -> str:
    """This process's runtime environment, as Ray compares it."""
    environment: str = of_ray("ray._private.worker:global_worker.core_worker").get_current_runtime_env()
    return environment


def prestart_workers(address: tuple[str, int], environment: str, count: int, keep_seconds: int) -> None:
    """Have a raylet start idle worker processes for the job of this process. Does not wait for them.

    Args:
        address: Of the raylet.
        environment: From `own_environment` of a process that they could replace.
        count: How many.
        keep_seconds: How long each waits at most.

    Raises:
        grpc.RpcError: The raylet does not answer, or not so.
    """
    request = of_ray("ray.core.generated.node_manager_pb2:PrestartWorkersRequest")(
        language=of_ray("ray.core.generated.common_pb2:PYTHON"),
        job_id=of_ray("ray._private.worker:global_worker.current_job_id").binary(),
        runtime_env_info=of_ray("ray.core.generated.runtime_environment_pb2:RuntimeEnvInfo")(
            serialized_runtime_env=environment
        ),
        keep_alive_duration_secs=keep_seconds,
        num_workers=count,
    )
    host, port = address
    stub = of_ray("ray.core.generated.node_manager_pb2_grpc:NodeManagerServiceStub")
    with of_ray("ray._private.grpc_utils:init_grpc_channel")(f"{host}:{port}") as channel:
        stub(channel).PrestartWorkers(request, timeout=PRESTART_SECONDS)
