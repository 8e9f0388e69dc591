"""What one rank does: restore, train, save. Ray Train starts it on every worker of every attempt.

The gradient of a step is the exact mean over the global batch, whatever the world size: a micro-batch of n images is
weighted n * W * k / B before DeepSpeed's own division by k micro-batches and averaging over W ranks.
"""

from __future__ import annotations

import logging
import math
import platform
import socket
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from jobs import checkpoint
from jobs.checkpoint import Commit
from jobs.engine import build_engine, build_model, initialize_deepspeed, set_learning_rate
from jobs.errors import CheckpointError
from jobs.recipe import Recipe
from jobs.run_directory import RunDirectory
from jobs.schedule import Schedule, micro_batches
from jobs.step_reading import RankReading, StepReading, from_words, word_count
from jobs.zero_state import ZeroState, read_zero_state, restore_optimizer
from model.noise import mask_noise
from model.pixels import normalise
from pipeline.batch import Batch
from pipeline.block_cache import CachePlace
from pipeline.dataset import Dataset
from pipeline.image_maker import BadSamplePolicy
from pipeline.loader import Loader
from pipeline.order import ORDER_VERSION, ConsumedDigest, Order
from pipeline.storage import Storage

if TYPE_CHECKING:
    import deepspeed
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """All that a worker is told."""

    recipe: Recipe
    run: RunDirectory
    monitor: ActorHandle[Any]


@dataclass(frozen=True)
class Place:
    """Where this worker stands in its group."""

    rank: int
    world_size: int
    device: torch.device


class NonFiniteLossError(RuntimeError):
    """The loss of a global batch is NaN or infinite on some rank; nothing was updated."""


def train_worker(job: TrainJob) -> None:
    """Train `job` from its newest checkpoint to its end, or until the monitor asks to stop."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device() if job.recipe.device == "cuda" else torch.device("cpu")
    Trainer(job, Place(context.get_world_rank(), context.get_world_size(), device)).run()


def order_of(recipe: Recipe, samples: int) -> Order:
    """The order in which `recipe` reads a data set of `samples` samples."""
    return Order(
        samples,
        global_batch_size=recipe.global_batch_size,
        lanes=recipe.lanes,
        seed=recipe.seed,
        block_samples=recipe.block_samples,
        window_blocks=recipe.window_blocks,
    )


def open_dataset(storage: Storage, recipe: Recipe) -> Dataset:
    """The data set of `recipe`, read as the recipe says."""
    cache = CachePlace(recipe.cache_dir, recipe.cache_bytes) if recipe.cache_dir else None
    return Dataset.open(storage, recipe.data, cache=cache, check_etags=recipe.check_etags)


class Trainer:
    """One rank's engine, data and place in the run."""

    def __init__(self, job: TrainJob, place: Place) -> None:
        """Restore the newest committed checkpoint; every rank must come here together."""
        self.job, self.recipe, self.run_directory, self.place = job, job.recipe, job.run, place
        self.dataset = open_dataset(job.run.storage, job.recipe)
        self.order = order_of(self.recipe, self.dataset.manifest.samples)
        self.schedule = Schedule.of(self.recipe, self.order.steps_per_epoch)
        self.rank_sizes = [len(self.order.rank_batch(0, rank, place.world_size)) for rank in range(place.world_size)]
        self.sizes = micro_batches(self.rank_sizes[place.rank], max(self.rank_sizes), self.recipe.micro_batch_size)
        initialize_deepspeed(self.recipe.device)
        commit = self._agree_on_commit()
        self.step = commit.step if commit else 0
        self.attempt = self._begin_attempt(commit)
        self.engine = self._restored_engine(commit)
        self._stop_reply: Any = None
        self._reading = RankReading(self.dataset, place.rank, place.world_size)
        self._quarantined: set[int] = set()
        self._quarantine_replies: list[Any] = []

    def run(self) -> None:
        """Train to the end of the schedule; saves on the way, at the end, and when asked to stop."""
        with closing(self._loader().batches(self.step, self.schedule.total_steps)) as batches:
            for batch in batches:
                stop = self._train_step(batch)
                if stop or self._is_due():
                    self._save()
                if stop:
                    return

    def _loader(self) -> Loader:
        return Loader(
            self.dataset,
            self.order,
            image_shape=self.recipe.model.image_shape,
            seed=self.recipe.seed,
            rank=self.place.rank,
            world_size=self.place.world_size,
            threads=self.recipe.loader_threads,
            device=self.place.device,
            policy=BadSamplePolicy(self.recipe.on_bad_sample, self.recipe.max_consecutive_bad_samples),
            stall_seconds=self.recipe.stall_seconds,
        )

    def _train_step(self, batch: Batch) -> bool:
        """One optimizer step on the global batch `batch.step`; True if the run should stop after it."""
        learning_rate = self.schedule.learning_rate(batch.step)
        set_learning_rate(self.engine, learning_rate)
        self._quarantine(batch)
        loss, stop, samples, reading, wait_seconds = self._backward(batch)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"loss is {loss} at step {batch.step + 1}; no update was made")
        self.engine.step()
        self.step = batch.step + 1
        if self.place.rank == 0:
            row = {
                "step": self.step,
                "epoch": batch.epoch,
                "loss": loss,
                "learning_rate": learning_rate,
                "world_size": self.place.world_size,
                "attempt": self.attempt,
                "samples": samples,
                "substitutions": int(reading.substitutions),
                "data_wait_seconds": round(wait_seconds, 6),
            }
            norm = float(self.engine.get_global_grad_norm() or 0.0)
            self._stop_reply = self.job.monitor.record.remote(row, norm, reading._asdict())
        return stop

    def _quarantine(self, batch: Batch) -> None:
        """Tell the monitor of samples that were replaced, each once; the replies are awaited before a commit."""
        new = [item for item in batch.substitutions if item.bad.id not in self._quarantined]
        if new:
            self._quarantined |= {item.bad.id for item in new}
            rows = [{**item.to_json(), "step": batch.step + 1} for item in new]
            self._quarantine_replies.append(self.job.monitor.quarantine.remote(rows))

    def _backward(self, batch: Batch) -> tuple[float, bool, str, StepReading, float]:
        """Gradients of the mean loss over the global batch.

        Rank 0's wish to stop travels with the loss, so that all ranks leave after the same step; so does what each
        rank read.

        Returns:
            The loss, whether to stop, the digest of the samples, what was read, and the longest wait for it in seconds.
        """
        recipe, place = self.recipe, self.place
        total = torch.zeros(2 + word_count(place.world_size), device=place.device, dtype=torch.float64)
        first = 0
        for index, size in enumerate(self.sizes):
            # A rank without images for this micro-batch still takes part in the reduction, with weight 0.
            chosen = slice(first, first + size) if size else slice(0, 1)
            loss = self._forward(batch, chosen)
            self.engine.backward(loss * (size * place.world_size * len(self.sizes) / recipe.global_batch_size))
            total[0] += loss.detach() * size / recipe.global_batch_size
            first += size
            if index + 1 < len(self.sizes):
                self.engine.step()
        total[1] = float(place.rank == 0 and self._stop_asked())
        total[2:] = torch.tensor(self._reading.words(batch), dtype=torch.float64)
        consumed = torch.tensor(ConsumedDigest.of(batch.sample_ids.numpy()).words(), device=place.device)
        dist.all_reduce(total)
        dist.all_reduce(consumed)
        loss_sum, stops, *words = total.tolist()
        return loss_sum, stops > 0, str(ConsumedDigest.from_words(consumed.tolist())), *from_words(words)

    def _forward(self, batch: Batch, chosen: slice) -> torch.Tensor:
        device = self.place.device
        pixels = batch.images[chosen]
        sample_ids = batch.sample_ids[chosen].to(device, non_blocking=True)
        noise = mask_noise(self.recipe.seed, batch.epoch, sample_ids, self.recipe.model.mask_patches, device)
        loss: torch.Tensor = self.engine(normalise(pixels), noise=noise).loss
        return loss

    def _stop_asked(self) -> bool:
        """The monitor's answer to an earlier step, if it is there; never waits."""
        import ray

        if self._stop_reply is None or not ray.wait([self._stop_reply], timeout=0)[0]:
            return False
        # If the monitor died, so did the newest rows of the history: this raises, and the restart does them again.
        return bool(ray.get(self._stop_reply))

    def _is_due(self) -> bool:
        return (
            self.step % self.recipe.checkpoint_every_steps == 0
            or self.step == self.schedule.total_steps
            or self.schedule.is_milestone(self.step, self.recipe.milestone_epochs)
        )

    def _save(self) -> None:
        """Save a checkpoint of the steps done; every rank must come here after the same step."""
        import ray

        start = time.monotonic()
        ray.get(self._quarantine_replies)  # the ledger up to a commit is never lost
        self._quarantine_replies.clear()
        with checkpoint.scratch_folder() as scratch:
            self.engine.save_checkpoint(scratch, tag="native", save_latest=False)
            files = checkpoint.upload_files(self.run_directory, self.step, Path(scratch) / "native")
        by_rank: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(by_rank, files)
        if self.place.rank == 0:
            self._commit([file for rank_files in by_rank for file in rank_files], start)
        dist.barrier()

    def _commit(self, files: list[checkpoint.CheckpointFile], start: float) -> None:
        import ray

        monitor, recipe = self.job.monitor, self.recipe
        ray.get(monitor.flush.remote())  # history up to a commit is never lost
        milestone = self.schedule.is_milestone(self.step, recipe.milestone_epochs)
        commit = Commit(
            step=self.step,
            epoch=self.step // self.schedule.steps_per_epoch,
            world_size=self.place.world_size,
            zero_stage=recipe.zero_stage,
            precision=recipe.precision,
            recipe_digest=recipe.digest(),
            dataset_digest=self.dataset.manifest.digest,
            order_version=ORDER_VERSION,
            seed=recipe.seed,
            attempt=self.attempt,
            created_at_seconds=time.time(),
            milestone=milestone,
            counters=ray.get(monitor.counters.remote()),
            versions=software_versions(),
            files=tuple(files),
        )
        checkpoint.write_commit(self.run_directory, commit)
        stall_seconds = time.monotonic() - start
        monitor.checkpoint_committed.remote(
            step=self.step, stall_seconds=stall_seconds, size_bytes=commit.bytes, milestone=milestone
        )
        checkpoint.prune(self.run_directory, recipe.keep_checkpoints)

    def _agree_on_commit(self) -> Commit | None:
        """The newest checkpoint as rank 0 sees it: listings may differ from rank to rank for a moment."""
        found = [checkpoint.latest_commit(self.run_directory) if self.place.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        commit = found[0]
        if commit and commit.order_version != ORDER_VERSION:
            remedy = "resume with the version of convmae-pretrain that began the run"
            raise CheckpointError("order_version", f"must be {ORDER_VERSION}", commit.order_version, remedy)
        if commit and commit.dataset_digest != self.dataset.manifest.digest:
            rule = f"must be the data set that the run began with ({commit.dataset_digest[:12]})"
            found_digest = self.dataset.manifest.digest[:12]
            raise CheckpointError("data", rule, found_digest, "restore it, or start a new run")
        return commit

    def _begin_attempt(self, commit: Commit | None) -> int:
        import ray

        number = [0]
        if self.place.rank == 0:
            begin: Any = self.job.monitor.begin_attempt.remote(
                world_size=self.place.world_size,
                resume_step=self.step,
                counters=dict(commit.counters) if commit else {},
                host=socket.gethostname(),
            )
            number = [ray.get(begin)]
        dist.broadcast_object_list(number, src=0)
        return number[0]

    def _restored_engine(self, commit: Commit | None) -> deepspeed.DeepSpeedEngine:
        model = build_model(self.recipe)
        with checkpoint.scratch_folder() as scratch:
            state: ZeroState | None = None
            if commit:
                checkpoint.download_files(self.run_directory, commit, Path(scratch))
                state = read_zero_state(Path(scratch))
                model.load_state_dict(state.weights(), strict=True)
            model.to(self.place.device)
            count, world_size = len(self.sizes), self.place.world_size
            engine = build_engine(model, self.recipe, micro_batches_per_step=count, world_size=world_size)
            if state:
                restore_optimizer(engine, state)
        return engine


def software_versions() -> Mapping[str, str]:
    """Versions that a checkpoint was made with."""
    packages = ("convmae-pretrain", "torch", "deepspeed", "ray", "webdataset")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
