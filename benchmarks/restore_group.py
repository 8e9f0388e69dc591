"""As many processes of restore_rank as there are ranks; they restore one case after the other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from restore_rank import Shapes
from zero_material import Material

import jobs
from jobs.run.directory import RunDirectory

_RANK = Path(__file__).with_name("restore_rank.py")
_PROJECT = Path(jobs.__file__).parent.parent

Answer = dict[str, Any]


def shapes_of(material: Material) -> list[Shapes]:
    """Shapes of the parameters of each group."""
    return [{name: tuple(value.shape) for name, value in group.items()} for group in material.groups]


class RestoreGroup:
    """The processes, while they wait for cases."""

    def __init__(self, ranks: Sequence[subprocess.Popen[str]], logs: Sequence[Path]) -> None:
        self._ranks, self._logs = ranks, logs

    def restore(self, run: RunDirectory, groups: Sequence[Shapes], stage: int) -> list[Answer]:
        """Restore the run's one checkpoint; returns each rank's figures."""
        storage = run.storage.to_json()
        case = {"run": run.url, "storage": storage, "groups": groups, "stage": stage}
        for rank in self._ranks:
            assert rank.stdin
            rank.stdin.write(json.dumps(case) + "\n")
            rank.stdin.flush()
        return [self._answer(rank, log) for rank, log in zip(self._ranks, self._logs, strict=True)]

    def _answer(self, rank: subprocess.Popen[str], log: Path) -> Answer:
        assert rank.stdout
        for line in rank.stdout:
            if line.startswith("done: "):
                found: Answer = json.loads(line.removeprefix("done: "))
                return found
        raise AssertionError(log.read_text()[-3000:])


@contextlib.contextmanager
def restore_group(world_size: int, folder: Path) -> Iterator[RestoreGroup]:
    """Start the ranks; they end with the context.

    Args:
        world_size: How many.
        folder: For their logs and the point at which they meet.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"restore-of-{world_size}-", dir=folder))  # an old meeting point misleads
    environment = os.environ | {
        "PYTHONPATH": str(_PROJECT),
        "MEETING_POINT": (folder / f"meeting-point-of-{world_size}").as_uri(),
        "WORLD_SIZE": str(world_size),
    }
    logs = [folder / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
    ranks = []
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            pipe = subprocess.PIPE
            command = [sys.executable, "-W", "ignore", str(_RANK)]
            variables = environment | {"RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, stderr=log, text=True))
    try:
        yield RestoreGroup(ranks, logs)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()  # closes its pipes
