"""Processes that have imported all that a rank needs, and wait beside it to take the place of its group's next life.

A rank's imports take 12 s of CPU time. Ray's raylet can start idle worker processes in advance, and gives one to the
next actor that has the same runtime environment; a hook in that environment has them import. Ray offers this to its
own core only, so what is called here is its protocol; a cluster that refuses costs nothing but the seconds.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

HOOK = "jobs.rank.standby.import_all"
KEEP_SECONDS = 10 * 365 * 86_400
"""How long a process waits at most; it ends with the run's driver anyway."""
WARM_SECONDS = 20
"""What a process is given to import before a group is ended for its sake."""
CALL_SECONDS = 10.0
IMPORTS = (
    "aiobotocore.session",
    "deepspeed",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.original_muon",
    "jobs.control.monitor",
    "jobs.control.worker_group",
    "ray.train.torch",
    "s3fs",
    "torch._dynamo",
)
"""What a rank has imported when its first step is done, as far as it takes long."""


class Newcomers:
    """Has processes import where a group would grow, before it is ended so that it can.

    Owns: which nodes were asked for how many since the group was started.
    """

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._warm_at = 0.0

    def are_ready(
        self,
        here: Mapping[str, int],
        room: Mapping[str, int],
        num_workers: int,
        start: Callable[[str, int], bool],
        now: float,
    ) -> bool:
        """Ask what was not asked yet; whether all that was has had the time it needs.

        Args:
            here: Workers of the group on each node.
            room: Workers that each node could have.
            num_workers: Those of the group to come.
            start: Starts processes on a node that wait; whether it could.
            now: Monotonic seconds.
        """
        missing = num_workers - sum(here.values()) - sum(self._asked.values())
        for node, possible in sorted(room.items()):
            count = min(possible - here.get(node, 0) - self._asked[node], missing)
            if count > 0 and start(node, count):
                self._asked[node] += count
                self._warm_at = now + WARM_SECONDS
                missing -= count
        if now < self._warm_at:
            return False
        self._asked.clear()
        return True


def rank_environment(environ: Mapping[str, str], device: str, cpus: float) -> dict[str, str]:
    """Variables with which a rank's process, and those that wait for its place, are started.

    Args:
        environ: The driver's.
        device: `cpu` or `cuda`.
        cpus: Of a rank.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    return {
        WORKER_PROCESS_SETUP_HOOK_ENV_VAR: HOOK,
        "DS_ACCELERATOR": device,
        # Ray sets it when a process is given its work, and by then torch has looked.
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(max(1, int(cpus))),
    }


def import_all() -> None:
    """Import what a rank needs. Ray calls it in every process with `rank_environment`, before the process has work.

    Must not ask CUDA anything: the process is given its GPU later. What cannot be imported is logged; the rank itself
    will say it better.
    """
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception:
            logger.warning("a waiting process could not import %s", name, exc_info=True)


def ask_for_successor() -> None:
    """Have the raylet of this rank's node start a process that could take this one's place."""
    from ray._private.worker import global_worker

    node: Any = global_worker.node
    start_standbys((node.node_ip_address, node.node_manager_port), own_environment(), count=1)


def own_environment() -> str:
    """This process's runtime environment, as Ray compares it."""
    from ray._private.worker import global_worker

    worker: Any = global_worker
    environment: str = worker.core_worker.get_current_runtime_env()
    return environment


def start_standbys(address: tuple[str, int], environment: str, count: int) -> bool:
    """Have a raylet start processes that wait. Does not wait for them.

    Args:
        address: Of the raylet.
        environment: From `own_environment` of a rank.
        count: How many.

    Returns:
        Whether the raylet agreed.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.worker import global_worker
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    common: Any = common_pb2
    messages: Any = node_manager_pb2
    services: Any = node_manager_pb2_grpc
    environments: Any = runtime_environment_pb2
    request = messages.PrestartWorkersRequest(
        language=common.PYTHON,
        job_id=global_worker.current_job_id.binary(),
        runtime_env_info=environments.RuntimeEnvInfo(serialized_runtime_env=environment),
        keep_alive_duration_secs=KEEP_SECONDS,
        num_workers=count,
    )
    host, port = address
    try:
        with init_grpc_channel(f"{host}:{port}") as channel:
            services.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        logger.warning("no processes wait on %s: %s", host, error)
        return False
    return True
