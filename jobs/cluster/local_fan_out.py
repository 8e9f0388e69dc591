"""The same as `fan_out` in threads of this process: where there is no cluster, or too little to do for one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from pipeline.store.storage import Storage

Task = TypeVar("Task")
Result = TypeVar("Result")

TICK_SECONDS = 1.0


def fan_out_locally(
    work: Callable[[Storage, str, Task], Result],
    storage: Storage,
    url: str,
    tasks: Iterable[Task],
    *,
    on_tick: Callable[[], None],
    width: int,
) -> Iterator[Result]:
    """Run `work(storage, url, task)` for each task; results come in any order.

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
