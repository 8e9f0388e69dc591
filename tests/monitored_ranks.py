"""Ranks of a run in processes of their own, whose monitor is in the test's: all is real but Ray between them.

Each process is `trained_rank.py`: the trainer of a run, with DeepSpeed on gloo and a data set on the disk.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from testbed import SMALL
from zero_groups import FOLDERS, PROJECT

from jobs.monitor.monitor import RunMonitor
from jobs.monitor.run_memory import MonitorConfig
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule, order_of
from jobs.run.directory import RunDirectory
from pipeline.ingest.photographs import cut_tiles
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

RANK = Path(__file__).with_name("trained_rank.py")
SAMPLES = 96


def made_dataset(folder: Path) -> str:
    """A small data set on the disk."""
    storage, source, url = Storage(), folder / "photographs", str(folder / "dataset")
    cut_tiles(source, SAMPLES, seed=0)
    sources = find_sources(storage, str(source))
    tasks = plan_shards(sources, Sharding(40))
    reports = [write_shard(storage, url, task) for task in tasks]
    Manifest.of(tasks, reports, sources.classes).save(storage, url, [])
    return url


def long_recipe(data: str, run_root: str, **changes: object) -> Recipe:
    """A recipe that trains until it is stopped."""
    fields = {
        **SMALL,
        "model.image_size": 64,
        "data": data,
        "run_root": run_root,
        "epochs": 10_000,
        "block_samples": 4,
        "window_blocks": 2,
        "checkpoint_every_steps": 1_000_000,
        "memory_checkpoint_every_steps": 0,
        "max_workers": 3,
        "loader_threads": 1,
    }
    return named_recipe("tiny").amended({**fields, **changes})


class MonitoredRanks:
    """A run whose ranks train, from `__enter__` to `__exit__`."""

    def __init__(
        self, recipe: Recipe, name: str, folder: Path, world_size: int = 3, trace_url: str = "", **slow: str
    ) -> None:
        """Start nothing yet.

        Args:
            recipe: Of the run.
            name: Of the run.
            folder: For logs and the place where ranks meet.
            world_size: Ranks.
            trace_url: Where they write what they consume; empty: nowhere.
            slow: `reading`, `decoding` or `flips`, by `rank_<number>`: what takes that rank longer, or what it does.
        """
        self.run = RunDirectory.of(Storage(), recipe.run_root, name)
        self.run.claim(recipe)
        schedule = Schedule.of(recipe, order_of(recipe, SAMPLES).steps_per_epoch)
        config = MonitorConfig(
            run=self.run,
            schedule=schedule,
            global_batch_size=recipe.global_batch_size,
            max_restarts_without_progress=0,
            target_world_size=world_size,
            checkpoint_interval=IntervalRule.of(recipe),
            device="cpu",
            hang_seconds=recipe.hang_seconds,
            straggler_factor=recipe.straggler_factor,
            leave_out_stragglers=recipe.leave_out_stragglers,
            claim=1,
            host="127.0.0.1",
            metrics_port=0,
            targets_folder="",
            flush_seconds=0.1,
        )
        self.monitor = RunMonitor(config)
        self._recipe, self._folder, self._world_size, self._slow = recipe, folder, world_size, slow
        self._trace_url = trace_url
        self._listener = Listener()
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> MonitoredRanks:
        threading.Thread(target=self._accept, daemon=True).start()
        shared = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(PROJECT / folder) for folder in FOLDERS),
            "MEETING_POINT": (self._folder / f"meeting-{self.run.name}").as_uri(),
            "WORLD_SIZE": str(self._world_size),
            "OMP_NUM_THREADS": "1",
            "RUN_URL": self.run.url,
            "TRACE_URL": self._trace_url,
            "MONITOR": str(self._listener.address),
        }
        for rank in range(self._world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLOW": self._slow.get(f"rank_{rank}", "")}
            with self._log(rank).open("w") as log:
                command = [sys.executable, str(RANK)]
                self.processes.append(subprocess.Popen(command, env=shared | own, stdout=log, stderr=log))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.monitor.end("stopped")
        self._listener.close()

    def events(self, kind: str) -> list[dict[str, Any]]:
        self.monitor.flush()
        return [event for event in self.run.read_events() if event["kind"] == kind]

    def until(self, found: Callable[[], Any], seconds: float = 120.0) -> Any:
        """What is found in the end, while all ranks live."""
        deadline = time.monotonic() + seconds
        while not (value := found()):
            for rank, process in enumerate(self.processes):
                assert process.poll() is None, self._log(rank).read_text()[-3000:]
            assert time.monotonic() < deadline, [self.monitor.status()["step"], *self.run.read_events()]
            time.sleep(0.1)
        return value

    def stop(self) -> None:
        """Have the ranks save and end by themselves."""
        self.monitor.request_stop("the test is over")
        self.end()

    def end(self, seconds: float = 60.0) -> None:
        """Wait until the ranks have ended by themselves."""
        for rank, process in enumerate(self.processes):
            assert process.wait(seconds) == 0, self._log(rank).read_text()[-3000:]

    def log(self, rank: int) -> str:
        """What a rank has printed."""
        return self._log(rank).read_text()

    def _log(self, rank: int) -> Path:
        return self._folder / f"{self.run.name}-rank-{rank}.log"

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        while True:
            try:
                name, words, named = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            try:
                answer = (True, getattr(self.monitor, name)(*words, **named))
            except Exception as error:
                answer = (False, error)
            connection.send_bytes(pickle.dumps(answer))
