"""A made-up run of half a million steps and some hundred attempts, as its monitors would have left it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import HISTORY_PART_STEPS, RunDirectory

REDONE_STEPS = 200
"""Most steps that an attempt does again."""
EPOCH_STEPS = 313
BEGAN_AT = 1.79e9
STEP_SECONDS = 0.5
SAVE_STEPS = 500
WRITES_AT_ONCE = 16


@dataclass(frozen=True)
class LongRun:
    """What is written."""

    steps: int
    attempts: int
    seed: int = 0

    def write(self, run: RunDirectory) -> None:
        """Write recipe, history, events, quarantine and heartbeat, a request for each part."""
        run.claim(named_recipe("convmae_base").amended({"max_workers": 64}))
        last, at = self.steps, BEGAN_AT + STEP_SECONDS * self.steps
        run.write_heartbeat(
            {
                "run": run.name, "state": "finished", "step": last, "total_steps": last, "attempt": self.attempts,
                "steps_per_epoch": EPOCH_STEPS, "restarts": self.attempts - 1, "loss": 0.4, "world_size": 64,
                "target_world_size": 64, "images_per_second": 8192.0, "updated_at_seconds": at,
                "worker_seconds_total": 64 * STEP_SECONDS * last,
            }
        )  # fmt: skip
        with ThreadPoolExecutor(WRITES_AT_ONCE) as threads:
            for written in [threads.submit(self._write_attempt, run, *each) for each in self._attempts()]:
                written.result()

    def _attempts(self) -> Iterator[tuple[int, int, int]]:
        """Number, first step and last step of each; the next begins before the end of the one before."""
        draw = random.Random(self.seed)
        ends = sorted(draw.sample(range(1, self.steps), self.attempts - 1))
        for number, (end_before, end) in enumerate(pairwise([0, *ends, self.steps]), 1):
            yield number, max(1, end_before + 1 - draw.randrange(REDONE_STEPS)), end

    def _write_attempt(self, run: RunDirectory, number: int, first: int, last: int) -> None:
        draw = random.Random(self.seed + number)
        for start in range(first, last + 1, HISTORY_PART_STEPS):
            steps = range(start, min(start + HISTORY_PART_STEPS, last + 1))
            run.write_history(number, start, [self._row(step, number, draw) for step in steps])
        at = BEGAN_AT + STEP_SECONDS * first
        kind = "restart" if number > 1 else "start"
        events: list[dict[str, Any]] = [
            {
                "at_seconds": at, "attempt": number, "kind": kind, "reason": "rank 1: ActorDiedError: killed",
                "step": first - 1, "world_size": 64, "world_size_before": 64, "steps_redone": 100, "host": "node-1",
                "restored_from": "store", "step_flops": 6e13, "peak_flops_per_second": 64 * 312e12,
                "devices": "64 x A100 (data sheet)",
            }
        ]  # fmt: skip
        events += [
            {
                "at_seconds": at + STEP_SECONDS * (step - first), "attempt": number, "kind": "checkpoint",
                "step": step, "stall_seconds": 0.2, "duration_seconds": 3.0, "bytes": 10**9, "milestone": False,
            }
            for step in range(first + SAVE_STEPS, last + 1, SAVE_STEPS)
        ]  # fmt: skip
        run.write_events(number, events)
        where = {"url": "s3://data/shard-000001.tar", "fault": "checksum", "reason": "the CRC32C differs"}
        run.write_quarantine(number, [{"step": first, "id": number, "substitute": 0, "attempt": number, **where}])

    def _row(self, step: int, attempt: int, draw: random.Random) -> dict[str, Any]:
        row = {
            "step": step, "epoch": (step - 1) // EPOCH_STEPS,
            "loss": 0.35 + 0.6 * math.exp(-step / 5e4) + draw.gauss(0, 0.01),
            "learning_rate": 1.5e-4 * (1 + math.cos(math.pi * step / self.steps)), "world_size": 64,
            "attempt": attempt, "samples": f"4096-{draw.getrandbits(64):016x}", "substitutions": 0,
            "step_seconds": round(STEP_SECONDS + draw.random() * 0.05, 6),
            "data_wait_seconds": round(draw.random() * 1e-3, 6),
        }  # fmt: skip
        return {**row, **({"digest": f"{draw.getrandbits(64):016x}"} if step % SAVE_STEPS == 0 else {})}
