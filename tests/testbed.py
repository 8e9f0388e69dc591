"""The testbed of end-to-end tests: the command as a user runs it, and a recipe that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.consolidation.target import ONE_FILE, consolidated_url
from jobs.run.directory import RunDirectory
from jobs.stack.record import Stack
from pipeline.store.storage import Storage

SMALL: dict[str, object] = {
    "model.image_size": 32,
    "model.embed_dim": [16, 24, 32],
    "model.depth": [1, 1, 1],
    "model.num_heads": 2,
    "model.decoder_dim": 32,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
    "global_batch_size": 12,
    "lanes": 12,
    "micro_batch_size": 4,
    "base_learning_rate": 0.02,
    "probes": False,  # most tests look at something else, and a probe imports PyTorch once more
    "memory_checkpoint_every_steps": 0,  # most tests restart nothing, and holders are processes
    "standby": False,  # most tests restart nothing, and importing takes seconds of both cores
}
TILES = 96


@dataclass(frozen=True)
class Command:
    """Runs `convmae` as a user would, against the test's local stack."""

    stack: Stack
    home: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a shell in which `convmae up` was run."""
        foreign = ("AWS_", "RAY_", "CONVMAE_S3_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return {**clean, "CONVMAE_HOME": str(self.home), **changes}

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        """Start it and return at once."""
        command = [sys.executable, "-m", "jobs.cli.main", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(**changes), stdout=pipe, stderr=pipe, text=True)

    def __call__(self, *arguments: str, code: int = 0, within_seconds: float = 480, **changes: str) -> tuple[str, str]:
        """Run it to its end; returns standard output and standard error."""
        process = self.start(*arguments, **changes)
        out, err = process.communicate(timeout=within_seconds)
        assert process.returncode == code, f"{arguments} ended with {process.returncode}\n{out}\n{err}"
        return out, err

    def run(self, name: str) -> RunDirectory:
        """The directory of a run."""
        storage = Storage.from_environment(self.stack.environment())
        return RunDirectory(storage, f"s3://{self.stack.bucket}/runs/{name}")


def small_recipe(data: str, **fields: object) -> Sequence[str]:
    """Arguments for the recipe `tiny`, made small."""
    overrides = {"data": data, **SMALL, **fields}
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in overrides.items()}
    return ("tiny", *(f"{key}={value}" for key, value in written.items()))


def losses(run: RunDirectory) -> list[float]:
    """Loss of each step, after checking that the history has every step once."""
    rows = run.read_history()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def family(stack: Stack) -> list[psutil.Process]:
    """All processes of a stack, those of its jobs among them; no other Ray on this machine."""
    now = Stack.load(stack.settings.home) or stack  # its keeper may have restarted a service
    roots = [process for record in now.records() if (process := record.process())]
    found = {*roots, *(child for root in roots for child in root.children(recursive=True))}
    return sorted(found, key=lambda process: process.pid)


def processes(title: str, among: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those whose command line contains `title`."""
    found = []
    for process in among:
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks(stack: Stack) -> list[psutil.Process]:
    """Processes of ranks, of all runs of a stack."""
    return processes("ray::RayTrainWorker", family(stack))


def is_consolidated(run: RunDirectory, step: int) -> bool:
    """Whether the consolidated fp32 weights of `step` exist."""
    return ONE_FILE.is_finished(run.storage, consolidated_url(run, step))
