"""Process groups of real DeepSpeed engines on gloo, for tests of steps and checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory

WORKER = Path(__file__).with_name("zero_worker.py")
PROJECT = Path(jobs.__file__).parent.parent
FOLDERS = (".", "tests", "tests/gpu", "benchmarks")


class WorkerGroup:
    """A process group that trains one case after the other, since starting one takes seconds."""

    def __init__(self, world_size: int, folder: Path) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                str(PROJECT / folder) for folder in (".", "tests", "tests/gpu", "benchmarks")
            ),
            "MEETING_POINT": (folder / f"meeting-point-of-{world_size}").as_uri(),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
        }
        self.read_bytes = [0] * world_size
        """What each rank of the last case read to resume."""
        self.digests: list[str] = []
        self.norms: list[float] = []
        """After each step of the last case, where gradients are exact; of all ranks."""
        self._logs = [folder / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
        self._processes = []
        for rank, path in enumerate(self._logs):
            variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with path.open("w") as log:
                pipe = subprocess.PIPE
                process = subprocess.Popen(
                    [sys.executable, str(WORKER)], env=variables, stdin=pipe, stdout=pipe, stderr=log, text=True
                )
            self._processes.append(process)

    def train(self, recipe: Recipe, steps: list[str], resume: RunDirectory | None = None) -> list[float]:
        """Run a case on every rank; returns the losses of its steps."""
        case = {"recipe": recipe.to_json(), "resume": resume.url if resume else "", "steps": steps}
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        answers = [self._answer(rank) for rank in range(len(self._processes))]
        losses: list[float] = answers[0]["losses"]
        assert all(answer[name] == answers[0][name] for answer in answers for name in answer if name != "read_bytes")
        self.digests, self.norms = answers[0].get("digests", []), answers[0].get("norms", [])
        self.read_bytes = [answer["read_bytes"] for answer in answers]
        return losses

    def _answer(self, rank: int) -> dict[str, Any]:
        output = self._processes[rank].stdout
        assert output
        for line in output:
            if line.startswith("done: "):
                answer: dict[str, Any] = json.loads(line.removeprefix("done: "))
                return answer
        raise AssertionError(self._logs[rank].read_text()[-3000:])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()  # closes its pipes, too
