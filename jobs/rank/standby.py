"""Processes that have imported all that a rank needs, and wait beside it to become workers of the next attempt.

A rank's imports take 12 s of CPU time. Ray's raylet can start idle worker processes in advance, and gives one to the
next actor that has the same runtime environment; a hook in that environment has them import. Ray offers this to its
own core only (jobs.cluster.ray_internals). Whatever goes wrong is a warning, and costs nothing but the seconds.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from jobs.cluster.ray_internals.core import own_environment, own_raylet, prestart_workers, setup_hook_variable
from jobs.rank.gpu import gpu_environment

logger = logging.getLogger(__name__)

HOOK = "jobs.rank.standby.import_all"
KEEP_SECONDS = 10 * 365 * 86_400
"""How long a process waits at most; it ends with the run's driver anyway."""
WARM_SECONDS = 20
"""What a process is given to import before a group is ended for its sake."""
IMPORTS = (
    "aiobotocore.session",
    "deepspeed",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.original_muon",
    "jobs.monitor.monitor",
    "jobs.control.worker_group",
    "ray.train.torch",
    "s3fs",
    "torch._dynamo",
)
"""What a rank has imported by the end of its first step, as far as it takes long."""


class Newcomers:
    """Standbys on nodes where a group would grow, started before it is ended so that it can.

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
        """Ask for the standbys that were not asked for yet; returns whether all have had the time they need.

        Args:
            here: Workers of the group on each node.
            room: Workers that each node could have.
            num_workers: Those of the group to come.
            start: Starts standbys on a node; returns whether it could.
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


def rank_environment(environ: Mapping[str, str], device: str, cpus: float, *, standby: bool) -> dict[str, str]:
    """Variables with which a rank's process, and the standbys for its place, are started.

    Args:
        environ: The driver's.
        device: `cpu` or `cuda`.
        cpus: Of a rank.
        standby: Whether processes import in advance.
    """
    variables = {
        "DS_ACCELERATOR": device,
        # Ray sets it when a process is given its work, and by then torch has looked.
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(max(1, int(cpus))),
        **(gpu_environment(environ) if device == "cuda" else {}),
    }
    if not standby:
        return variables
    try:
        return {setup_hook_variable(): HOOK, **variables}
    except Exception as error:
        _warn(f"standbys cannot import anything in advance: {error}")
        return variables


def import_all() -> None:
    """Import what a rank needs. Ray calls it in every process with `rank_environment`, before the process has work.

    Must not ask CUDA anything: the process is given its GPU later. What cannot be imported is logged; the rank itself
    will say it better.
    """
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception:
            logger.warning("a standby could not import %s", name, exc_info=True)


def ask_for_successor() -> bool:
    """Have the raylet of this rank's node start a standby that could take this rank's place.

    Returns:
        Whether the raylet agreed.
    """
    try:
        return start_standbys(own_raylet(), own_environment(), count=1)
    except Exception as error:
        _warn(f"no standby waits for this rank's place: {error}")
        return False


def start_standbys(address: tuple[str, int], environment: str, count: int) -> bool:
    """Have a raylet start standbys. Does not wait for them.

    Args:
        address: Of the raylet.
        environment: From `own_environment` of a rank.
        count: How many.

    Returns:
        Whether the raylet agreed.
    """
    try:
        prestart_workers(address, environment, count, KEEP_SECONDS)
    except Exception as error:  # of gRPC, of the network, or of a version of Ray that has another protocol
        _warn(f"no standbys wait on {address[0]}: {error}")
        return False
    return True


@functools.cache
def _warn(text: str) -> None:
    """Log a warning, once in this process."""
    logger.warning("%s", text)
