"""One rank of bench_checkpoint: trains on noise, and saves in turn as we do and as DeepSpeed's own call would.

Configured by the environment (RANK, WORLD_SIZE, BENCH_SETTINGS); rank 0 prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.rank_file import RankFile
from jobs.checkpoint.saver import CheckpointSaver
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.step.engine import build_engine, build_model, initialize_deepspeed
from model.noise import mask_noise
from pipeline.store.storage import Storage

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PLAIN_STEPS = 5


class Monitor:
    """A stand-in for the run's monitor, which costs the ranks no time; notes when a checkpoint was committed."""

    def __init__(self) -> None:
        self.committed: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(**fields: Any) -> None:
                notes = {"checkpoint_committed": self.committed, "checkpoint_failed": self.failed}
                notes.get(name, []).append(fields)

        return Method


class Rank:
    """An engine, and the two ways to save it."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self.recipe, self.run, self.steps = recipe, run, 0
        self.engine = build_engine(build_model(recipe), recipe, micro_batches_per_step=1, world_size=WORLD_SIZE)
        self._rank_file = RankFile(self.engine, RANK)

    def step(self, *, uploading: bool) -> tuple[float, bool]:
        """One optimizer step; its seconds, and whether any rank is uploading."""
        began = time.perf_counter()
        recipe, count = self.recipe, self.recipe.micro_batch_size
        generator = torch.Generator().manual_seed(self.steps * WORLD_SIZE + RANK)
        images = torch.randn(count, 3, *recipe.model.image_shape, generator=generator)
        noise = mask_noise(0, self.steps, torch.arange(count), recipe.model.mask_patches, "cpu")
        self.engine.backward(self.engine(images, noise=noise).loss)
        words = torch.tensor([float(uploading)])
        dist.all_reduce(words)
        self.engine.step()
        self.steps += 1
        return time.perf_counter() - began, bool(words.item())

    def save_ours(self) -> dict[str, float]:
        """Save in the background while steps continue, until it is committed."""
        monitor = Monitor()
        saver = CheckpointSaver(self.run, monitor, rank=RANK, world_size=WORLD_SIZE, keep=1)  # type: ignore[arg-type]
        began = time.perf_counter()
        saver.begin(self._commit(), self._rank_file.copied)
        stall, slowed = time.perf_counter() - began, []
        while saver.is_under_way:
            seconds, uploading = self.step(uploading=saver.is_uploading)
            slowed.append(seconds)
            if not uploading:
                at = time.perf_counter()
                saver.finish()
                stall += time.perf_counter() - at
        saver.close()
        assert not monitor.failed, monitor.failed
        return {
            "stall": stall,
            "until_commit": time.perf_counter() - began,
            "steps": len(slowed),
            "slowed": sum(slowed),
        }

    def save_stock(self) -> dict[str, float]:
        """DeepSpeed's own synchronous call, then this rank's files to the same store; training waits."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save_checkpoint(folder, tag="tag", save_latest=False)
            written = time.perf_counter() - began
            for path in sorted(Path(folder, "tag").iterdir()):
                if path.is_file():
                    self.run.storage.upload(path, self.run.path("stock", path.name))
            dist.barrier()
        seconds = time.perf_counter() - began
        return {"stall": seconds, "until_commit": seconds, "steps": 0, "slowed": 0.0, "written": written}

    def _commit(self) -> Commit:
        recipe = self.recipe
        return Commit(
            step=self.steps,
            epoch=0,
            world_size=WORLD_SIZE,
            zero_stage=recipe.zero_stage,
            precision=recipe.precision,
            recipe_digest=recipe.digest(),
            dataset_digest="",
            order_version=1,
            seed=recipe.seed,
            attempt=1,
            created_at_seconds=time.time(),
            milestone=False,
            counters={},
            versions={},
            files=(),
            claim=1,
        )


def main() -> None:
    """Measure steps alone, then both ways to save in turn."""
    settings = json.loads(os.environ["BENCH_SETTINGS"])
    recipe = Recipe.from_json(settings["recipe"])
    run = RunDirectory(Storage.from_json(settings["storage"]), settings["run"])
    ray.get = lambda reply: reply  # type: ignore[assignment,method-assign]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=settings["meeting_point"], rank=RANK, world_size=WORLD_SIZE)
    initialize_deepspeed("cpu")
    rank = Rank(recipe, run)
    rank.step(uploading=False)
    plain = [rank.step(uploading=False)[0] for _ in range(PLAIN_STEPS)]
    sides: dict[str, Callable[[], dict[str, float]]] = {"ours": rank.save_ours, "stock": rank.save_stock}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(settings["rounds"]):
        for side, save in sides.items():
            found[side].append(save())
    size = checkpoint.read_commit(run, checkpoint.committed_steps(run)[-1]).bytes
    if RANK == 0:
        sys.stdout.write(json.dumps({"plain": plain, "bytes": size, **found}) + "\n")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
