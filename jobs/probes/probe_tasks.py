"""A process on the cluster that probes weights with the CPU time that nothing else wants.

It is an actor, not a task for each probe: importing PyTorch takes seconds, and labels are read once. It asks Ray for no
CPU, so that no rank ever waits for it, nor it for a rank.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from jobs.cluster.fan_out import INGEST_RESOURCE, copying_places, offered
from jobs.errors import ProbeDiedError
from jobs.probes.probe_plan import RunProbes
from jobs.probes.probe_process import Allowance, ProbeProcess
from jobs.probes.run_probe import ProbedWeights
from jobs.run.directory import RunDirectory
from pipeline.access.urls import is_local
from pipeline.errors import UserError

IDLE_SECONDS = 120.0
"""Without a probe, after which its process is ended: it holds about half a gigabyte of memory."""
NODE_SHARE = 0.02
"""Of the CPU time of a node's cores that probes take while the run trains. Whatever its priority, a process slows its
neighbours, with whom it shares caches, memory and, on many machines, the cores themselves."""
PLACE_SECONDS = 10.0
"""For asking where a CPU is idle."""


class ProbeTasks:
    """Measures weights by tasks of one process, which is started when it is needed.

    Concurrency: called by one thread, for the first time when the run trains. Blocking: as long as a probe takes, which
    is longer where it may use less CPU time than it wants (Pace).
    """

    def __init__(
        self,
        run: RunDirectory,
        probes: RunProbes,
        *,
        idle_seconds: float = IDLE_SECONDS,
        node_share: float = NODE_SHARE,
    ) -> None:
        """Start nothing yet.

        Args:
            run: The run.
            probes: On what it is probed.
            idle_seconds: Without a probe, after which the process is ended.
            node_share: Of the CPU time of a node that probes may take while the run trains.
        """
        self._run, self._probes = run, probes
        self._idle_seconds, self._node_share = idle_seconds, node_share
        self._process: Any = None
        self._end: threading.Timer | None = None
        self._lock = threading.Lock()
        self._began: float | None = None
        self._used_before = self._used = 0.0
        """CPU seconds of processes that have ended, and of the present one as far as it said."""
        self._is_busy = self._is_hurried = False

    def __call__(self, weights: ProbedWeights) -> Mapping[str, Any]:
        """The fields of a probe's event.

        Raises:
            UserError, OSError: What it met.
            ProbeDiedError: Its process died.
        """
        while True:
            was_hurried = self._is_hurried
            try:
                return self._measured(weights)
            except ProbeDiedError:
                if was_hurried == self._is_hurried:
                    raise
            finally:
                self._rest()

    def hurry(self) -> None:
        """Take an ordinary priority from now on, since nothing trains any more. A probe under way begins anew.

        No process may raise its priority again, and beside other people's work an idle one might never end.
        """
        with self._lock:
            self._is_hurried = True
            process, self._process = self._process, None
        _kill(process)

    def _measured(self, weights: ProbedWeights) -> Mapping[str, Any]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        with self._lock:
            self._is_busy = True
            if self._process is None:
                self._used_before, self._used = self._used_before + self._used, 0.0
                self._process = self._started()
            process, allowance = self._process, self._allowance()
        try:
            asked = process.probe.remote(self._run.storage, self._probes.data, weights, allowance)
            found: Mapping[str, Any]
            found, self._used = ray.get(asked)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | OSError):
                raise error.cause from None
            raise
        except RayError as error:
            with self._lock:
                self._process = None if self._process is process else self._process
            what = str(error).strip().splitlines()
            raise ProbeDiedError(f"the probe's process died: {what[0] if what else type(error).__name__}") from error
        return found

    def _allowance(self) -> Allowance | None:
        if self._is_hurried:
            return None
        now = time.monotonic()
        if self._began is None:
            self._began = now
        return Allowance(self._node_share, now - self._began, self._used_before)

    def _rest(self) -> None:
        with self._lock:
            self._is_busy = False
            if self._end:
                self._end.cancel()
            self._end = threading.Timer(self._idle_seconds, self._end_process)
            self._end.daemon = True
            self._end.start()

    def _end_process(self) -> None:
        with self._lock:
            if self._is_busy or self._process is None:
                return
            process, self._process = self._process, None
        _kill(process)

    def _started(self) -> Any:
        import ray

        actor: Any = ray.remote(ProbeProcess)
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        options = {"num_cpus": 0, "runtime_env": {"env_vars": variables}, **self._place()}
        return actor.options(**options).remote(is_idle=not self._is_hurried)

    def _place(self) -> dict[str, Any]:
        """This node where folders on local disks are read, else one that has an idle CPU."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        data = self._probes.data
        urls = (self._run.url, data.url, data.labels, self._probes.recipe.init_from)
        if any(url and is_local(url) for url in urls):
            here = ray.get_runtime_context().get_node_id()
            return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
        if node := _idle_node():
            return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}
        return next(copying_places())


def _kill(process: Any) -> None:
    import ray

    if process is not None:
        with contextlib.suppress(Exception):  # it is dead
            ray.kill(process)


def _idle_node() -> str:
    """A node with a CPU that nothing has reserved, by a task that takes it for a moment; empty where there is none."""
    import ray

    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if sum(node["Alive"] for node in nodes) < 2 or free.get("CPU", 0.0) < 1 or offered(INGEST_RESOURCE):
        return ""
    asked = ray.remote(num_cpus=1, max_retries=0)(_this_node).remote()
    try:
        return str(ray.get(asked, timeout=PLACE_SECONDS))
    except Exception:  # somebody was faster
        ray.cancel(asked, force=True)
        return ""


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
