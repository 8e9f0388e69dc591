"""What one rank does: restore, train, save. Ray Train starts it on every worker of every attempt.

The gradient of a step is the exact mean over the global batch, whatever the world size: a micro-batch of n images is
weighted n * W * k / B before DeepSpeed's own division by k micro-batches and averaging over W ranks.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from jobs import checkpoint
from jobs.checkpoint import Commit
from jobs.checkpoint_saver import CheckpointSaver
from jobs.engine import (
    build_engine,
    build_model,
    discard_step,
    has_finite_gradients,
    initialize_deepspeed,
    parameter_groups,
    set_learning_rate,
)
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.initial_weights import load_initial_weights
from jobs.non_finite import (
    FAULT_WORDS,
    LeftOut,
    NonFiniteLossError,
    RolledBackError,
    fault_of,
    fault_words,
    rollbacks_in_a_row,
    stretches,
)
from jobs.provenance import git_commit
from jobs.rank_figures import FigureTable
from jobs.rank_group import RankGroup
from jobs.recipe import Recipe
from jobs.restore import restore_newest
from jobs.run_directory import RunDirectory
from jobs.schedule import Schedule, micro_batches
from jobs.shared_folder import Landmarks, check_seen_here
from jobs.standby import ask_for_successor
from jobs.step_reading import RankReading, StepReading, from_words, slowest, word_count
from jobs.trace import TraceWriter, begin_trace
from jobs.watchdog import COMPILE_ALLOWED_SECONDS, SAVE_ALLOWED_SECONDS, RankPulse
from jobs.wish import PAUSE_SECONDS, WISHES, Wish
from jobs.zero_state import ZeroState, owned_ranges, restore_optimizer
from model.convmae import ConvMAE, Output
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
    claim: int
    """Number of the claim under which the driver works."""
    driver: str
    """Who that is, for people."""
    trace_url: str = ""
    """Where to write what each rank consumes; empty: nowhere."""
    landmarks: Landmarks = ()
    """Of what lies on local disks: also nodes that come later must see it."""


@dataclass(frozen=True)
class Place:
    """Where this worker stands in its group."""

    rank: int
    world_size: int
    device: torch.device


class SharedStep(NamedTuple):
    """What every rank knows of a step before its update; the same on all of them."""

    loss: float
    """Mean over the global batch."""
    fault: str
    """What is not finite on some rank; empty where all is."""
    wish: Wish
    """What to do after it."""
    uploading: bool
    """Whether some rank is uploading a checkpoint."""
    samples: str
    """Digest of the samples that were used."""
    figures: tuple[StepReading, FigureTable] | None
    """Of all ranks, and by rank; rank 0 alone has them."""


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
        self._started_at_seconds = time.time()
        self.job, self.recipe, self.run_directory, self.place = job, job.recipe, job.run, place
        check_seen_here(job.run.storage, job.landmarks)
        self.dataset = open_dataset(job.run.storage, job.recipe)
        self.order = order_of(self.recipe, self.dataset.manifest.samples)
        self.schedule = Schedule.of(self.recipe, self.order.steps_per_epoch)
        sizes = [self.order.rank_batch_size(rank, place.world_size) for rank in range(place.world_size)]
        self.sizes = micro_batches(sizes[place.rank], max(sizes), self.recipe.micro_batch_size)
        initialize_deepspeed(self.recipe.device)
        self._group = RankGroup(place.rank, place.world_size, place.device)
        model = build_model(self.recipe)
        found = restore_newest(
            job.run,
            self._owned_ranges(model),
            self._group,
            check=self._check_commit,
            on_damage=self._pass_over,
        )
        self.step = found.commit.step if found else 0
        self.attempt, self.left_out = self._begin_attempt(found.commit if found else None)
        self.pulse = self._begin_pulse()
        self.engine = self._restored_engine(model, found.state if found else None)
        if place.rank == 0:
            job.monitor.restored.remote()
        self.saver = CheckpointSaver(
            job.run, job.monitor, rank=place.rank, world_size=place.world_size, keep=self.recipe.keep_checkpoints
        )
        self.trace = self._begin_trace() if job.trace_url else None
        self._reply: Any = None
        self._skipped_in_a_row = 0
        self._has_successor = False
        folders = [Path(tempfile.gettempdir()), *([Path(self.recipe.cache_dir)] if self.recipe.cache_dir else [])]
        self._reading = RankReading(self.dataset, place.rank, device=place.device, folders=folders)
        self._quarantined: set[int] = set()
        self._quarantine_replies: list[Any] = []

    def run(self) -> None:
        """Train to the end of the schedule; saves on the way, at the end, and when asked to stop."""
        for stretch in stretches(self.step, self.schedule.total_steps, self.left_out):
            if stretch.left_out:
                self._leave_out(stretch.steps)
            elif self._train(stretch.steps):
                break
        self.pulse.at("end", SAVE_ALLOWED_SECONDS)
        self.saver.close()
        self.pulse.close()
        if self.trace:
            self.trace.close()

    def _train(self, steps: range) -> bool:
        """Train `steps`, saving on the way; True if the run should end before the last of them."""
        with closing(self._loader().batches(steps.start, steps.stop)) as batches:
            self.pulse.at("data", self.recipe.stall_seconds)
            for batch in batches:
                compiles = self.recipe.compile and batch.step == steps.start
                self.pulse.at("step", COMPILE_ALLOWED_SECONDS if compiles else 0.0)
                wish = self._train_step(batch)
                if self.recipe.standby and not self._has_successor:
                    ask_for_successor()  # now, when the first step is done that others wait for
                    self._has_successor = True
                if wish or self._is_due(self.step):
                    self._save()
                if wish == "pause":
                    self._stand_still()
                if wish == "stop":
                    return True
                self.pulse.at("data", self.recipe.stall_seconds)
        return False

    def _stand_still(self) -> None:
        """Commit, say so, and wait to be ended; go on if nobody comes. Collective."""
        import ray

        self.pulse.at("pause", SAVE_ALLOWED_SECONDS + PAUSE_SECONDS)
        self.saver.settle()
        if self.place.rank == 0:
            ray.get(self.job.monitor.paused.remote())
        time.sleep(PAUSE_SECONDS)
        self._reply = None  # it repeats the wish
        logger.warning("the worker group was not ended; training goes on")

    def _leave_out(self, steps: range) -> None:
        """Pass over steps that an earlier attempt rolled back."""
        if self.place.rank == 0:
            rows = [
                {
                    "step": step + 1,
                    "epoch": self.order.epoch(step),
                    "loss": None,
                    "learning_rate": self.schedule.learning_rate(step),
                    "world_size": self.place.world_size,
                    "attempt": self.attempt,
                    "samples": str(ConsumedDigest.of(self.order.batch(step))),
                    "substitutions": 0,
                    "step_seconds": 0.0,
                    "data_wait_seconds": 0.0,
                    "skipped": "left out by a rollback",
                }
                for step in steps
            ]
            self.job.monitor.leave_out.remote(rows)
        self.step = steps.stop
        if any(self._is_due(step + 1) for step in steps):
            self._save()

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

    def _train_step(self, batch: Batch) -> Wish:
        """One optimizer step on the global batch `batch.step`; returns what to do after it."""
        learning_rate = self.schedule.learning_rate(batch.step)
        set_learning_rate(self.engine, learning_rate)
        self._quarantine(batch)
        shared = self._backward(batch)
        self._update(batch.step + 1, shared.fault)
        self.step = batch.step + 1
        if self.trace:
            self.trace.add(batch, float(self.engine.optimizer.param_groups[0]["lr"]), shared.fault)
        if self.saver.is_under_way and not shared.uploading:
            self.pulse.at("commit", SAVE_ALLOWED_SECONDS)
            self.saver.finish()
        if shared.figures:
            reading, ranks = shared.figures
            row = {
                "step": self.step,
                "epoch": batch.epoch,
                "loss": None if shared.fault else shared.loss,
                "learning_rate": learning_rate,
                "world_size": self.place.world_size,
                "attempt": self.attempt,
                "samples": shared.samples,
                "substitutions": int(reading.substitutions),
                # Of the slowest rank: since the last step, or since the attempt could read.
                "step_seconds": round(slowest(ranks, "step_seconds"), 6),
                "data_wait_seconds": round(slowest(ranks, "data_wait_seconds"), 6),
            } | ({"skipped": shared.fault} if shared.fault else {})
            norm = float(self.engine.get_global_grad_norm() or 0.0)
            self._reply = self.job.monitor.record.remote(row, norm, reading._asdict(), ranks)
        return shared.wish

    def _update(self, step: int, fault: str) -> None:
        """Update the weights, or do what the recipe says where something is not finite; the same on every rank."""
        if not fault:
            self._skipped_in_a_row = 0
            self.engine.step()
            if not self.engine.was_step_applied():  # every gradient is finite, and the sum of their squares is not
                raise NonFiniteLossError(f"the gradient's norm is not finite at step {step}; no update was made")
            return
        reason = f"{fault} is not finite at step {step}"
        self._skipped_in_a_row += 1
        if self.recipe.on_nonfinite_loss == "rollback":
            self._roll_back(step, reason)
        if self.recipe.on_nonfinite_loss == "stop" or self._skipped_in_a_row > self.recipe.max_nonfinite_in_a_row:
            raise NonFiniteLossError(f"{reason}; no update was made")
        logger.warning("%s; its batch is skipped", reason)
        discard_step(self.engine)

    def _roll_back(self, step: int, reason: str) -> None:
        """Leave out the steps from the newest checkpoint up to `step`, and end the attempt. Collective."""
        import ray

        with suppress(CheckpointError):  # the one under way: if it fails, the one before is gone back to
            self.saver.close()
        newest = checkpoint.latest_commit(self.run_directory) if self.place.rank == 0 else None
        done = [newest.step if newest else 0]
        dist.broadcast_object_list(done, src=0)
        window = LeftOut(done[0] + 1, step)
        if rollbacks_in_a_row(self.left_out, window) > self.recipe.max_nonfinite_in_a_row:
            raise NonFiniteLossError(f"{reason}, after {self.recipe.max_nonfinite_in_a_row} rollbacks in a row")
        if self.place.rank == 0:
            ray.get(self.job.monitor.roll_back.remote(**window.to_json(), reason=reason))
        dist.barrier()  # a rank that fails ends the others; the ledger comes first
        raise RolledBackError(f"{reason}; steps {window.first_step} to {step} are left out")

    def _quarantine(self, batch: Batch) -> None:
        """Tell the monitor of samples that were replaced, each once; the replies are awaited before a commit."""
        new = [item for item in batch.substitutions if item.bad.id not in self._quarantined]
        if new:
            self._quarantined |= {item.bad.id for item in new}
            rows = [{**item.to_json(), "step": batch.step + 1} for item in new]
            self._quarantine_replies.append(self.job.monitor.quarantine.remote(rows))

    def _backward(self, batch: Batch) -> SharedStep:
        """Gradients of the mean loss over the global batch.

        The monitor's wish travels from rank 0 with the loss, so that all ranks fulfil it after the same step; so does
        whether a rank is uploading, and what each rank read.
        """
        recipe, place = self.recipe, self.place
        words_from = 3 + FAULT_WORDS
        total = torch.zeros(words_from + word_count(place.world_size), device=place.device, dtype=torch.float64)
        first = 0
        for index, size in enumerate(self.sizes):
            # A rank without images for this micro-batch still takes part in the reduction, with weight 0.
            chosen = slice(first, first + size) if size else slice(0, 1)
            output = self._forward(batch, chosen)
            loss = output.loss
            if self.trace and size:
                self.trace.note_masks(output.mask)
            self.engine.backward(loss * (size * place.world_size * len(self.sizes) / recipe.global_batch_size))
            total[0] += loss.detach() * size / recipe.global_batch_size
            first += size
            if index + 1 < len(self.sizes):
                self.engine.step()
        total[1] = float(WISHES.index(self._monitors_wish()) if place.rank == 0 else 0)
        total[2] = float(self.saver.is_uploading)
        faults = fault_words(
            place.rank,
            loss_is_finite=bool(total[0].isfinite()),
            gradients_are_finite=has_finite_gradients(self.engine),
        )
        total[3:words_from] = torch.tensor(faults, dtype=torch.float64)
        self._reading.write(total[words_from:], batch)
        consumed = torch.tensor(ConsumedDigest.of(batch.sample_ids.numpy()).words(), device=place.device)
        dist.all_reduce(total)
        dist.all_reduce(consumed)
        loss_sum, wish, uploads, *faults = total[:words_from].tolist()
        digest = str(ConsumedDigest.from_words(consumed.tolist()))
        figures = from_words(total[words_from:].cpu().numpy()) if place.rank == 0 else None
        return SharedStep(loss_sum, fault_of(faults), WISHES[int(wish)], uploads > 0, digest, figures)

    def _forward(self, batch: Batch, chosen: slice) -> Output:
        device = self.place.device
        pixels = batch.images[chosen]
        sample_ids = batch.sample_ids[chosen].to(device, non_blocking=True)
        noise = mask_noise(self.recipe.seed, batch.epoch, sample_ids, self.recipe.model.mask_patches, device)
        output: Output = self.engine(normalise(pixels), noise=noise)
        return output

    def _monitors_wish(self) -> Wish:
        """The monitor's answer to an earlier step, if it is there and new; never waits."""
        import ray

        if self._reply is None or not ray.wait([self._reply], timeout=0)[0]:
            return ""
        # If the monitor died, so did the newest rows of the history: this raises, and the restart does them again.
        reply, self._reply = self._reply, None
        wish: Wish = ray.get(reply)
        return wish

    def _is_due(self, step: int) -> bool:
        by_steps = self.recipe.checkpoint_interval == "steps"  # else the monitor wishes for it
        return (
            (by_steps and step % self.recipe.checkpoint_every_steps == 0)
            or step == self.schedule.total_steps
            or self.schedule.is_milestone(step, self.recipe.milestone_epochs)
        )

    def _save(self) -> None:
        """Begin a checkpoint of the steps done; every rank must come here after the same step."""
        import ray

        self.pulse.at("save", SAVE_ALLOWED_SECONDS)
        if self._reply is not None:
            ray.get(self._reply)  # raises if the monitor died; else it may repeat the wish that this fulfils
            self._reply = None
        ray.get(self._quarantine_replies)  # the ledger up to a commit is never lost
        self._quarantine_replies.clear()
        if self.trace:
            self.trace.flush()  # nor is the trace up to a commit
        self.saver.begin(self._commit(), self._write_zero_files)

    def _begin_pulse(self) -> RankPulse:
        import ray

        return RankPulse(
            self.job.monitor,
            attempt=self.attempt,
            rank=self.place.rank,
            node_id=ray.get_runtime_context().get_node_id(),
            limit_seconds=self.recipe.hang_seconds,
        )

    def _begin_trace(self) -> TraceWriter:
        storage, url, place = self.run_directory.storage, self.job.trace_url, self.place
        if place.rank == 0:
            begin_trace(storage, url, self.run_directory.url, self.step)
        return TraceWriter(storage, url, rank=place.rank, world_size=place.world_size, attempt=self.attempt)

    def _write_zero_files(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def _commit(self) -> Commit:
        import ray

        recipe = self.recipe
        counters: Any = ray.get(self.job.monitor.save_began.remote(self.step)) if self.place.rank == 0 else {}
        return Commit(
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
            milestone=self.schedule.is_milestone(self.step, recipe.milestone_epochs),
            counters=counters,
            versions=software_versions(),
            files=(),
            claim=self.job.claim,
            driver=self.job.driver,
        )

    def _check_commit(self, commit: Commit) -> None:
        if commit.order_version != ORDER_VERSION:
            remedy = "resume with the version of convmae-pretrain that began the run"
            raise CheckpointError("order_version", f"must be {ORDER_VERSION}", commit.order_version, remedy)
        if commit.dataset_digest != self.dataset.manifest.digest:
            rule = f"must be the data set that the run began with ({commit.dataset_digest[:12]})"
            found_digest = self.dataset.manifest.digest[:12]
            raise CheckpointError("data", rule, found_digest, "restore it, or start a new run")

    def _pass_over(self, step: int, damage: str) -> None:
        import ray

        if self.recipe.on_damaged_checkpoint == "fail":
            remedy = "resume with on_damaged_checkpoint=previous to go on from the checkpoint before"
            raise DamagedCheckpointError("checkpoint", "must be as it was written", damage, remedy)
        ray.get(self.job.monitor.checkpoint_damaged.remote(step=step, reason=damage))

    def _begin_attempt(self, commit: Commit | None) -> tuple[int, list[LeftOut]]:
        """The attempt's number, and the steps that earlier ones rolled back."""
        import ray

        told: list[Any] = [0, []]
        if self.place.rank == 0:
            begin: Any = self.job.monitor.begin_attempt.remote(
                world_size=self.place.world_size,
                resume_step=self.step,
                counters=dict(commit.counters) if commit else {},
                host=socket.gethostname(),
                started_at_seconds=self._started_at_seconds,
            )
            told = [ray.get(begin), [LeftOut.from_json(row) for row in self.run_directory.read_left_out()]]
        dist.broadcast_object_list(told, src=0)
        return told[0], told[1]

    def _owned_ranges(self, model: ConvMAE) -> dict[str, range]:
        """Of each trained parameter, what this rank updates."""
        groups = parameter_groups(model, self.recipe.weight_decay)
        rank, world_size = self.place.rank, self.place.world_size
        return owned_ranges(model, groups, stage=self.recipe.zero_stage, rank=rank, world_size=world_size)

    def _restored_engine(self, model: ConvMAE, state: ZeroState | None) -> deepspeed.DeepSpeedEngine:
        if state:
            model.load_state_dict(state.weights, strict=True)
        elif self.recipe.init_from:
            weights = load_initial_weights(self.run_directory.storage, self.recipe, self._group)
            model.load_state_dict(weights, strict=True)
        model.to(self.place.device)
        count, world_size = len(self.sizes), self.place.world_size
        engine = build_engine(model, self.recipe, micro_batches_per_step=count, world_size=world_size)
        if state:
            restore_optimizer(engine, state)
        return engine


def software_versions() -> Mapping[str, str]:
    """Versions that a checkpoint was made with."""
    packages = ("convmae-pretrain", "torch", "deepspeed", "ray", "webdataset")
    git = git_commit(os.environ)
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        **({"git": git} if git else {}),
    }
