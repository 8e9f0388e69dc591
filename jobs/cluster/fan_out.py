"""Many small tasks on a Ray cluster, or in threads of this process: a bounded number in flight, results as they come.

Ray is imported only by what runs on a cluster.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from jobs.errors import RunFailedError
from jobs.run.shared_folder import Landmark, Landmarks, check_seen_here
from pipeline.errors import UserError
from pipeline.host.local_files import umask_here
from pipeline.store.storage import Storage

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_CPU = 2
"""In flight: enough that no core waits for the driver, and so few that a full disk stops the rest."""
COPIES_PER_NODE = 4
"""In flight, of tasks that copy: they fill a node's network before its memory."""
GPU_TASK_CPUS = 4
"""Cores of a task that takes a GPU: they decode what it computes on."""
TICK_SECONDS = 1.0
INGEST_RESOURCE = "ingest"
"""What a node offers that is reserved for ingests, which have rights of their own; its amount is the tasks at once."""


@dataclass(frozen=True)
class Progress:
    """How far a fan-out has come."""

    done: int = 0
    total: int = 0
    kept: int = 0
    """Of the done: those that an earlier run had finished; they say nothing about the rate."""
    samples: int = 0
    kept_samples: int = 0
    bad: int = 0
    """Skipped images, or faults."""

    def after(self, *, kept: bool, samples: int, bad: int) -> Progress:
        """One more is done."""
        return Progress(
            self.done + 1,
            self.total,
            self.kept + kept,
            self.samples + samples,
            self.kept_samples + samples * kept,
            self.bad + bad,
        )


Show = Callable[[str, Progress], None]
"""Called with the name and progress of a stage, after each task and about every second."""


class FanOut(Protocol):
    """Runs tasks: `fan_out` on a cluster, or `fan_out_locally` in threads of this process."""

    def __call__(
        self,
        work: Callable[[Storage, str, Task], Result],
        storage: Storage,
        url: str,
        tasks: Iterable[Task],
        *,
        on_tick: Callable[[], None],
    ) -> Iterator[Result]:
        """As `fan_out`."""


def fan_out(
    work: Callable[[Storage, str, Task], Result],
    storage: Storage,
    url: str,
    tasks: Iterable[Task],
    *,
    on_tick: Callable[[], None],
    copying: bool = False,
    on_gpu: bool = False,
    landmarks: Sequence[Landmark] = (),
) -> Iterator[Result]:
    """Run `work(storage, url, task)` on the cluster for each task; results come in any order.

    A task takes a CPU, or INGEST_RESOURCE where a node offers that: then no other node is used.

    Args:
        work: A function of this project, found by its name on every node.
        storage: Reaches what the tasks read and write, from every node.
        url: Handed to every task.
        tasks: Made one by one, as they are started.
        on_tick: Called at the start and about every second, also while no task ends. What it raises ends the fan-out.
        copying: The tasks wait for storage more than they compute. They ask for no CPU, so that they also run where
            training has all of them, a few on each node.
        on_gpu: A task takes a GPU and GPU_TASK_CPUS cores.
        landmarks: Of folders on local disks, which every node that a task comes to must see.

    Raises:
        UserError, OSError: One that a task met, as itself; the other tasks are cancelled.
        RunFailedError: A task's process died again and again.
    """
    import ray

    remote: Any = ray.remote(_worked)
    places = copying_places() if copying else itertools.repeat(task_needs(on_gpu=on_gpu))
    shared, guards = ray.put(storage), (tuple(landmarks), umask_here())
    waiting = iter(tasks)
    running: list[Any] = []
    on_tick()
    try:
        while True:
            started = itertools.islice(waiting, max(0, task_limit(copying, on_gpu=on_gpu) - len(running)))
            running += [
                remote.options(name=work.__name__, **next(places)).remote(work, shared, url, task, guards)
                for task in started
            ]
            if not running:
                return
            done, running = ray.wait(running, num_returns=1, timeout=TICK_SECONDS)
            for reference in done:
                yield _result(reference)
            on_tick()
    finally:
        for reference in running:
            ray.cancel(reference)


def fan_out_locally(
    work: Callable[[Storage, str, Task], Result],
    storage: Storage,
    url: str,
    tasks: Iterable[Task],
    *,
    on_tick: Callable[[], None],
    width: int,
) -> Iterator[Result]:
    """Run `work(storage, url, task)` in threads of this process for each task; results come in any order.

    Args:
        work: Safe to call from several threads.
        storage: Reaches what the tasks read and write.
        url: Handed to every task.
        tasks: Made one by one, as they are started, in the caller's thread.
        on_tick: Called at the start and about every second, also while no task ends. What it raises ends the fan-out.
        width: Tasks at once.

    Raises:
        Exception: What a task raised, when the tasks that had begun have ended.
    """
    waiting = iter(tasks)
    running: set[Future[Result]] = set()
    on_tick()
    with ThreadPoolExecutor(width, "convmae-task") as threads:
        while True:
            started = itertools.islice(waiting, width - len(running))
            running |= {threads.submit(work, storage, url, task) for task in started}
            if not running:
                return
            done, running = wait(running, TICK_SECONDS, FIRST_COMPLETED)
            for future in done:
                yield future.result()
            on_tick()


def _worked(
    work: Callable[[Storage, str, Task], Result],
    storage: Storage,
    url: str,
    task: Task,
    guards: tuple[Landmarks, int],
) -> Result:
    landmarks, umask = guards
    os.umask(umask)  # the node's own is that of the shell in which Ray was started
    check_seen_here(storage, landmarks)
    return work(storage, url, task)


def task_needs(*, on_gpu: bool = False) -> dict[str, Any]:
    """Ray's options for a task that computes."""
    if on_gpu:
        return {"num_cpus": GPU_TASK_CPUS, "num_gpus": 1}
    if offered(INGEST_RESOURCE):
        return {"num_cpus": 0, "resources": {INGEST_RESOURCE: 1}}
    return {"num_cpus": 1}


def copying_places() -> Iterator[dict[str, Any]]:
    """Ray's options for tasks that copy, in turn: not on nodes for ingests, which may not write what is copied."""
    if not offered(INGEST_RESOURCE):
        return itertools.repeat({"num_cpus": 0, "scheduling_strategy": "SPREAD"})
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in _nodes() if not node["Resources"].get(INGEST_RESOURCE)]
    places = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    return itertools.cycle({"num_cpus": 0, "scheduling_strategy": place} for place in places)


def task_limit(copying: bool, *, on_gpu: bool = False) -> int:
    """How many tasks may be in flight; may change at any time, as nodes come and go."""
    if on_gpu:
        return max(1, TASKS_PER_CPU * int(offered("GPU")))
    if copying:
        return COPIES_PER_NODE * max(1, sum(not node["Resources"].get(INGEST_RESOURCE) for node in _nodes()))
    return max(1, TASKS_PER_CPU * int(offered(INGEST_RESOURCE) or offered("CPU") or 1))


def _nodes() -> list[Mapping[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def offered(resource: str) -> float:
    """By all nodes together, whether it is in use or not."""
    import ray

    return float(ray.cluster_resources().get(resource, 0.0))  # type: ignore[no-untyped-call]


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from None
        raise
    except RayError as error:  # the process died four times, as when memory runs out
        raise RunFailedError(
            f"a task died: {str(error).strip().splitlines()[0]}; the same command resumes it"
        ) from error
