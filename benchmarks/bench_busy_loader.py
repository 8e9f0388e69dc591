"""The loader beside a busy main thread, by threads and by processes: `make bench-busy-loader`.

The main thread has the first core to itself and launches additions of 16 numbers, between which it runs Python, so
that alone it launches as many a second as is asked for and holds the interpreter's lock as a training step does. All
that loads has the other cores, and as many decoders as these. What is left is what the two take from each other
through the lock: not a core. Another thread takes the batches as they come. What the main thread waited for its core is
subtracted from its steps (schedstat of the kernel), so that other work on the machine hardly counts in these.

Each figure comes from a fresh process, which measures in turn: operations alone, images alone, both, images alone,
operations alone. Rounds of threads and processes are interleaved; printed are medians over rounds. Other work on the
machine spoils images a second, and is printed.

    python benchmarks/bench_busy_loader.py [--images DIR] [--rounds 5] [--seconds 6] [--launches 50000]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from loader_material import make_material
from loader_sides import BATCH, BLOCK_SAMPLES, LANES, SEED, SIDE, WINDOW_BLOCKS

from pipeline.load.dataset import Dataset
from pipeline.load.loader import Loader
from pipeline.order.sample_order import Order
from pipeline.store.storage import Storage

LEAST_KEPT = 0.9
"""Share of its speed alone that the loader keeps beside the main thread."""
MOST_SLOWER = 0.03
"""Share by which a step of the main thread takes longer beside the loader."""
SIDES = ("threads", "processes")
STEP_SECONDS = 0.05
"""Of operations that count as one step."""
WARM_BATCHES = 8


@dataclass(frozen=True)
class Found:
    """What one process measured."""

    images_alone: float
    """A second."""
    images_beside: float
    cpu_ms_alone: float
    """Of an image: of all that loads, and of the thread that takes batches."""
    launches_alone: float
    """A second."""
    step_alone: float
    """Median seconds."""
    step_beside: float
    dispatch_alone: float
    """Median seconds of one launch."""
    dispatch_beside: float
    dispatch_mean_beside: float
    other_work: float
    """Share of the machine's CPU time that others took meanwhile."""

    @property
    def kept(self) -> float:
        """Share of its speed that the loader keeps."""
        return self.images_beside / self.images_alone

    @property
    def slower(self) -> float:
        """Share by which a step takes longer."""
        return self.step_beside / self.step_alone - 1


class Launcher:
    """A main thread's work: an operation, some Python, and again."""

    def __init__(self, launches_per_second: float) -> None:
        """Find how much Python there is between two launches."""
        self._a, self._b = torch.ones(16), torch.ones(16)
        self._out = torch.empty(16)
        self.turns = 0
        # One turn more or less takes the same whatever their number, so two points give the line.
        few, many = self._seconds(0), self._seconds(200)
        self.turns = max(0, round((1 / launches_per_second - few) / ((many - few) / 200)))
        self.launches = max(1, round(STEP_SECONDS * launches_per_second))

    def step(self, launched: np.ndarray | None = None) -> float:
        """Seconds of one step, without those for which no core was free; writes the seconds of each launch."""
        add, a, b, out, turns = torch.add, self._a, self._b, self._out, range(self.turns)
        clock = time.perf_counter
        took = np.empty(self.launches) if launched is None else launched
        waited, began = _waited_seconds(), clock()
        for number in range(len(took)):
            at = clock()
            add(a, b, out=out)
            took[number] = clock() - at
            for _ in turns:
                pass
        return clock() - began - (_waited_seconds() - waited)

    def steps(self, seconds: float) -> tuple[list[float], np.ndarray]:
        """Seconds of each step, and of each launch."""
        steps, launched, until = [], [], time.perf_counter() + seconds
        while time.perf_counter() < until:
            took = np.empty(self.launches)
            steps.append(self.step(took))
            launched.append(took)
        return steps, np.concatenate(launched)

    def _seconds(self, turns: int) -> float:
        self.turns = turns
        began = time.thread_time()  # other work does not count in it
        for _ in range(10):
            self.step(np.empty(1000))
        return (time.thread_time() - began) / 10_000


class Consumer:
    """A thread that takes batches as they come, while it is let."""

    def __init__(self, loader: Loader, stop: int) -> None:
        self._images = 0
        self._let = threading.Event()
        self._ended = threading.Event()
        self._loader, self._stop = loader, stop
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Take batches while the block runs."""
        self._let.set()
        try:
            yield
        finally:
            self._let.clear()

    @property
    def images(self) -> int:
        """Taken so far."""
        return self._images

    def warm(self) -> None:
        """Take the first batches: then processes are up, and a window has been read."""
        with self.taking():
            while self._images < WARM_BATCHES * BATCH:
                time.sleep(0.01)

    def close(self) -> None:
        """End the thread and the loader's own."""
        self._ended.set()
        self._let.set()
        self._thread.join()

    def _take(self) -> None:
        with contextlib.closing(self._loader.batches(0, self._stop)) as batches:
            for batch in batches:
                self._images += len(batch.images)
                self._let.wait()
                if self._ended.is_set():
                    return


def measure(shards: str, side: str, seconds: float, launches_per_second: float) -> Found:
    """All figures of one side, in this process.

    Args:
        shards: A dataset on disk.
        side: threads or processes.
        seconds: Of each of five measurements.
        launches_per_second: Of the main thread alone.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    os.sched_setaffinity(0, others or [first])  # inherited by what is started from now on
    dataset = Dataset.open(Storage(), shards)
    order = Order(dataset.samples, BATCH, LANES, SEED, BLOCK_SAMPLES, WINDOW_BLOCKS)
    loader = Loader(
        dataset,
        order,
        image_shape=(SIDE, SIDE),
        rank=0,
        world_size=1,
        seed=SEED,
        threads=len(others) or 1,
        in_processes=side == "processes",
    )
    with contextlib.closing(Consumer(loader, 10**6)) as consumer:
        consumer.warm()
        time.sleep(1.0)  # what is read ahead of the warm batches
        for thread in _pinned(side):
            os.sched_setaffinity(thread, [first])
        launcher = Launcher(launches_per_second)
        before, own_before, began = _busy_seconds(), _own_seconds(), time.perf_counter()
        steps, launched = [launcher.steps(seconds)], []
        alone = [_images_alone(consumer, seconds)]
        images, at = consumer.images, time.perf_counter()
        with consumer.taking():
            steps_beside, launched_beside = launcher.steps(seconds)
        images_beside = (consumer.images - images) / (time.perf_counter() - at)
        alone.append(_images_alone(consumer, seconds))
        steps.append(launcher.steps(seconds))
        took = time.perf_counter() - began
        others_seconds = max(0.0, _busy_seconds() - before - (_own_seconds() - own_before))
    steps_alone = [step for found, _ in steps for step in found]
    launched = np.concatenate([found for _, found in steps])
    return Found(
        images_alone=statistics.mean(speed for speed, _ in alone),
        images_beside=images_beside,
        cpu_ms_alone=1e3 * statistics.mean(cpu for _, cpu in alone),
        launches_alone=launcher.launches / statistics.median(steps_alone),
        step_alone=statistics.median(steps_alone),
        step_beside=statistics.median(steps_beside),
        dispatch_alone=float(np.median(launched)),
        dispatch_beside=float(np.median(launched_beside)),
        dispatch_mean_beside=float(np.mean(launched_beside)),
        other_work=others_seconds / took / (os.cpu_count() or 1),
    )


def report(rounds: Mapping[str, Sequence[Found]], cores: int) -> list[str]:
    """What is printed of all rounds, by side."""
    head = f"{'':<24}" + "".join(f"{side:>12}" for side in rounds)
    lines = [
        f"{cores} cores, one of them the main thread's; medians of {len(next(iter(rounds.values())))} rounds",
        head,
    ]
    rows = (
        ("images/s alone", lambda found: f"{found.images_alone:.0f}"),
        ("images/s beside it", lambda found: f"{found.images_beside:.0f}"),
        ("CPU ms an image alone", lambda found: f"{found.cpu_ms_alone:.2f}"),
        ("launches/s alone", lambda found: f"{found.launches_alone:.0f}"),
        ("launch alone, us", lambda found: f"{1e6 * found.dispatch_alone:.2f}"),
        ("launch beside, us", lambda found: f"{1e6 * found.dispatch_beside:.2f}"),
        ("its mean, us", lambda found: f"{1e6 * found.dispatch_mean_beside:.2f}"),
    )
    middle = {side: _median(found) for side, found in rounds.items()}
    lines += [f"{name:<24}" + "".join(f"{text(found):>12}" for found in middle.values()) for name, text in rows]
    for side, found in rounds.items():
        kept, slower = (statistics.median(getattr(one, name) for one in found) for name in ("kept", "slower"))
        each = ", ".join(f"{one.kept:.0%}/{one.slower:+.1%}" for one in found)
        lines.append(f"{side}: keeps {kept:.0%} of its speed, steps slower by {slower:+.1%} (each round: {each})")
    found = rounds["processes"]
    reached = statistics.median(one.kept for one in found) >= LEAST_KEPT
    reached &= statistics.median(one.slower for one in found) <= MOST_SLOWER
    verdict = "reached" if reached else "NOT reached"
    lines.append(f"goal of processes: keeps >= {LEAST_KEPT:.0%}, steps slower by <= {MOST_SLOWER:.0%}: {verdict}")
    worst = max(one.other_work for each in rounds.values() for one in each)
    if worst > 0.02:
        lines.append(f"other work took up to {worst:.0%} of the machine: measure again without it")
    if cores < 2:
        lines.append("one core: what loads has none of its own, so these figures say nothing of the lock")
    return lines


def _median(found: Sequence[Found]) -> Found:
    return Found(**{name: statistics.median(asdict(one)[name] for one in found) for name in asdict(found[0])})


def _pinned(side: str) -> list[int]:
    """Ids of the threads that get the main thread's core.

    With processes those that hand batches over, too: they never run Python beside the main thread, and on a core that
    a loader process fills the scheduler lets each of their many short turns wait.
    """
    if side == "threads":
        return [threading.get_native_id()]
    return [thread.id for thread in psutil.Process().threads()]


def _images_alone(consumer: Consumer, seconds: float) -> tuple[float, float]:
    """Images a second, and CPU seconds of each."""
    images, cpu, at = consumer.images, _own_seconds(), time.perf_counter()
    with consumer.taking():
        time.sleep(seconds)
    more = consumer.images - images
    return more / (time.perf_counter() - at), (_own_seconds() - cpu) / more


def _waited_seconds() -> float:
    """For which this thread could have run, and no core was free."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _own_seconds() -> float:
    """CPU seconds of this process and of all below it."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _busy_seconds() -> float:
    """CPU seconds of everything on the machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def main() -> None:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="a folder of JPEGs, flat or in class folders")
    parser.add_argument("--count", type=int, default=2048, help="images at least; a smaller folder is repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each of five measurements of a round and side")
    parser.add_argument("--launches", type=float, default=50_000.0, help="a second, of the main thread alone")
    parser.add_argument("--measure", nargs=2, metavar=("SHARDS", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(asdict(measure(*options.measure, options.seconds, options.launches))))
        return
    rounds: dict[str, list[Found]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        shards = make_material(options.images, options.count, Path(folder)).shards
        for number in range(options.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                asked = ["--measure", shards, side, "--seconds", str(options.seconds), "--launches"]
                command = [sys.executable, __file__, *asked, str(options.launches)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                rounds[side].append(Found(**json.loads(done.stdout.splitlines()[-1])))
                print(f"round {number + 1}, {side}: {rounds[side][-1]}", file=sys.stderr)
    print("\n".join(report(rounds, len(os.sched_getaffinity(0)))))


if __name__ == "__main__":
    main()
