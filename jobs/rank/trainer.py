"""One rank's training: restore, train, save. Ray Train starts it on every worker of every attempt."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint, copies_of
from jobs.checkpoint.held.memory_keeper import MemoryKeeper
from jobs.checkpoint.rank_file import RankFile
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.restore import InMemory, Restored, Source, restore_newest
from jobs.checkpoint.saver import CheckpointSaver
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.finetune.classification import Classification
from jobs.finetune.training_labels import TrainingLabels
from jobs.finetune.validation import Validation
from jobs.rank.compute import group_compute
from jobs.rank.gpu import check_given, compute_as
from jobs.rank.history_row import done_row, skipped_row
from jobs.rank.monitor_line import MonitorLine
from jobs.rank.rank_data import RankData
from jobs.rank.rank_loader import rank_loader
from jobs.rank.restored_engine import restored_engine, values_of_rank
from jobs.rank.resumable import check_resumable, software_versions
from jobs.rank.standby import ask_for_successor
from jobs.rank.step_profile import StepProfile
from jobs.rank.watchdog import COMPILE_ALLOWED_SECONDS, SAVE_ALLOWED_SECONDS
from jobs.recipe.placement import LIVE_FIELDS
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import RunDirectory
from jobs.run.shared_folder import Landmarks, check_seen_here
from jobs.run.trace import TraceWriter, begin_trace
from jobs.step.engine import build_model, initialize_deepspeed
from jobs.step.instruction import PAUSE_SECONDS, SAVES, Instruction
from jobs.step.non_finite import NonFiniteLossError, RolledBackError, SkippedSteps, rollbacks_in_a_row, stretches
from jobs.step.objective import Objective, Reconstruction
from jobs.step.step_reading import RankReading
from jobs.step.step_verification import CorruptGradientError, Verdict
from jobs.step.training_step import RankPlace, SharedStep, TrainingStep
from model import Classifier
from pipeline.load.batch import Batch
from pipeline.order.sample_order import ORDER_VERSION

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """What a worker is given."""

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


def train_worker(job: TrainJob, step_of: type[TrainingStep] = TrainingStep) -> None:
    """Train `job` from its newest checkpoint to its end, or until the monitor asks to stop.

    Args:
        job: What to train.
        step_of: Does each step.
    """
    import ray
    import ray.train.torch

    context = ray.train.get_context()
    device = torch.device("cpu")
    if job.recipe.device == "cuda":
        given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        device = ray.train.torch.get_device()
        check_given(device, os.environ.get("CUDA_VISIBLE_DEVICES", ""), given)
    Trainer(job, RankPlace(context.get_world_rank(), context.get_world_size(), device), step_of).run()


def objective_of(recipe: Recipe, model: nn.Module, labels: TrainingLabels | None, device: torch.device) -> Objective:
    """What the model is trained for."""
    if labels is None:
        return Reconstruction(recipe, device)
    assert isinstance(model, Classifier)
    return Classification(recipe, labels.train.labels, model, device)


class Trainer:
    """One rank's engine, data and place in the run."""

    def __init__(self, job: TrainJob, place: RankPlace, step_of: type[TrainingStep] = TrainingStep) -> None:
        """Restore the newest committed checkpoint; every rank must come here together."""
        self._started_at_seconds = time.time()
        self.job, self.run_directory, self.place = job, job.run, place
        self.line = MonitorLine(job.monitor)
        check_seen_here(job.run.storage, job.landmarks)
        initialize_deepspeed(job.recipe.device)
        self._group = RankGroup(place.rank, place.world_size, place.device)
        self.recipe = self._present_recipe()
        compute_as(self.recipe)
        self.data = RankData.open(job.run.storage, self.recipe, self._group)
        self.dataset, self.order = self.data.dataset, self.data.order
        self.schedule = Schedule.of(self.recipe, self.order.steps_per_epoch)
        model = build_model(self.recipe)
        self._nodes = self._group.gathered(self.line.node_id)
        in_memory = self._in_memory()
        found = restore_newest(
            job.run,
            values_of_rank(model, self.recipe, place),
            self._group,
            check=lambda commit: check_resumable(commit, self.dataset.manifest.digest),
            on_damage=self._skip_checkpoint,
            in_memory=in_memory,
        )
        self.done_steps = found.commit.step if found else 0
        self.attempt, self.skipped = self._begin_attempt(found)
        self.pulse = self.line.begin_pulse(self.attempt, place.rank, self.recipe.hang_seconds)
        self.engine = restored_engine(
            model,
            found.state if found else None,
            recipe=self.recipe,
            order=self.order,
            place=place,
            storage=job.run.storage,
        )
        if place.rank == 0:
            self.line.restored()
        self.saver = CheckpointSaver(
            job.run, job.monitor, rank=place.rank, world_size=place.world_size, keep=self.recipe.keep_checkpoints
        )
        self._rank_file = RankFile(self.engine, place.rank)
        is_from_memory = found is not None and found.source == "memory"
        self._keeper = self._memory_keeper(in_memory.held if in_memory and is_from_memory else None)
        self.trace = self._begin_trace() if job.trace_url else None
        self.step = self._training_step(step_of)
        self._validation = self._opened_validation()
        self._skipped_in_a_row = 0
        self._has_successor = False
        self._profile: StepProfile | None = None
        """Recording, or being written."""
        self._quarantined: set[int] = set()
        self._undigested: Callable[[str], None] | None = None
        """Reports the last step, once the digest of what it left is known: it travels with the next step."""

    def _present_recipe(self) -> Recipe:
        """That of the driver, with what was set since it began; the same on every rank."""
        group, given = self._group, self.job.recipe
        stored = group.broadcast(group.together(lambda: self.run_directory.read_recipe() if group.rank == 0 else given))
        return given.model_copy(update={name: getattr(stored, name) for name in LIVE_FIELDS})

    def run(self) -> None:
        """Train to the end of the schedule; saves on the way, at the end, and when asked to stop."""
        for stretch in stretches(self.done_steps, self.schedule.total_steps, self.skipped):
            if stretch.skipped:
                self._skip(stretch.steps)
            elif self._train(stretch.steps):
                break
        self.pulse.at("end", SAVE_ALLOWED_SECONDS)
        self._settle_digest()
        self.saver.close()
        self._close_profile()
        self.pulse.close()
        if self.trace:
            self.trace.close()

    def _train(self, steps: range) -> bool:
        """Train `steps`, saving on the way; True if the run should end before the last of them."""
        with closing(
            rank_loader(self.dataset, self.order, self.recipe, self.place).batches(steps.start, steps.stop)
        ) as batches:
            self.pulse.at("data", self.recipe.stall_seconds)
            for batch in batches:
                self.pulse.at("step", COMPILE_ALLOWED_SECONDS if self.step.compiles(batch) else 0.0)
                instruction = self._train_step(batch).instruction
                if self.recipe.standby and not self._has_successor:
                    ask_for_successor()  # now, when the first step is done that others wait for
                    self._has_successor = True
                if instruction == "pause":
                    self._settle_memory()  # else the state that is saved now would not be held, too
                if self._is_due(self.done_steps) or instruction in SAVES:
                    self._save()
                elif instruction == "hold":
                    self._hold()
                if instruction == "pause":
                    self._stand_still()
                if instruction == "stop":
                    return True
                self._attend_to_profile(is_asked=instruction == "profile")
                self.pulse.at("data", self.recipe.stall_seconds)
        return False

    def _attend_to_profile(self, *, is_asked: bool) -> None:
        """Between two steps: end a profile that has its steps, or begin the one that this rank is asked for."""
        if self._profile and self._profile.is_recording and self._profile.stepped():
            self._finish_profile(self._profile)
        request = self.line.take_profile(self.place.rank) if is_asked else None
        if request is None:
            return
        try:
            self._profile = StepProfile(request, self.run_directory, self.place.device)
        except (OSError, RuntimeError) as error:  # of a disk, or of a profiler that somebody else has started
            self.line.profile_failed(request, f"{type(error).__name__}: {error}")

    def _finish_profile(self, profile: StepProfile) -> None:
        done = functools.partial(self.line.profiled, profile.request)
        profile.finish(self.done_steps, done, functools.partial(self.line.profile_failed, profile.request))

    def _close_profile(self) -> None:
        """Write what there is of a profile, and wait for it."""
        if self._profile and self._profile.is_recording:
            self._finish_profile(self._profile)
        if self._profile:
            self._profile.close()

    def _stand_still(self) -> None:
        """Commit, report it, and wait to be ended; continue training if nobody comes. Collective."""
        self.pulse.at("pause", SAVE_ALLOWED_SECONDS + PAUSE_SECONDS)
        self.saver.settle()
        self._settle_memory()
        if self.place.rank == 0:
            self.line.paused()
        time.sleep(PAUSE_SECONDS)
        self.line.forget_reply()
        logger.warning("the worker group was not ended; training continues")

    def _skip(self, steps: range) -> None:
        """Skip steps that an earlier attempt rolled back."""
        if self.place.rank == 0:
            place = {"world_size": self.place.world_size, "attempt": self.attempt}
            rows = [skipped_row(step, self.order, self.schedule, **place) for step in steps]
            self.line.skip(rows)
        self.done_steps = steps.stop
        if any(self._is_due(step + 1) for step in steps):
            self._save()

    def _train_step(self, batch: Batch) -> SharedStep:
        """One optimizer step on the global batch `batch.step`; returns what all ranks know of it."""
        began, learning_rate = time.monotonic(), self.schedule.learning_rate(batch.step)
        self._quarantine(batch)
        shared = self.step.gradients(
            batch,
            learning_rate,
            instruction=self._instruction(batch.step + 1) if self.place.rank == 0 else "",
            uploading=self.saver.is_uploading,
            holding=self._is_holding(),
            with_digest=self._undigested is not None,
        )
        self._report_undigested(shared.state)
        if shared.verdicts:
            self._end_for_corruption(batch.step + 1, shared.verdicts)
        self._update(batch.step + 1, shared.fault)
        self.done_steps = batch.step + 1
        if self.trace:
            self.trace.add(batch, self.step.learning_rate, shared.fault)
        if self.saver.is_under_way and not shared.uploading:
            self.pulse.at("commit", SAVE_ALLOWED_SECONDS)
            self.saver.finish()
        if self._keeper:
            self._keeper.stepped(time.monotonic() - began, self.done_steps, holding=shared.holding)
        report = self._reporter(batch.epoch, learning_rate, shared, self._measured())
        due = self.done_steps % self.recipe.digest_every_steps == 0 or self._is_due(self.done_steps)
        if self.recipe.is_exact and (due or shared.instruction in SAVES):
            self._undigested = report
        else:
            report("")
        return shared

    def _instruction(self, step: int) -> Instruction:
        """What rank 0 has all ranks do after `step`."""
        instruction = self.line.instruction()
        if self._keeper and not instruction and self._keeper.is_due(step):
            return "hold"
        return instruction

    def _measured(self) -> dict[str, Any]:
        """The accuracy of a fine-tuning, where it is due after the steps done. Collective."""
        if not (self._validation and self.schedule.ends_in_validation(self.done_steps, self.recipe)):
            return {}
        on_batch = functools.partial(self.pulse.at, "validate", self.recipe.stall_seconds)
        return self._validation.measure(self.engine.module, self.place.device, on_batch)

    def _opened_validation(self) -> Validation | None:
        labels, place = self.data.labels, self.place
        if labels is None or labels.validation is None:
            return None
        storage = self.run_directory.storage
        return Validation(storage, self.recipe, labels.validation, place.rank, place.world_size)

    def _reporter(
        self, epoch: int, learning_rate: float, shared: SharedStep, measured: Mapping[str, Any]
    ) -> Callable[[str], None]:
        """Reports the step that is done, given the digest of what it left, as the rank that knows of all."""
        if not shared.figures:
            return lambda _: None
        place = {"world_size": self.place.world_size, "attempt": self.attempt}
        row = {**done_row(self.done_steps, epoch, learning_rate, shared, **place), **measured}
        norm, (reading, ranks) = self.step.gradient_norm, shared.figures

        def report(digest: str) -> None:
            self.line.report_step({**row, **({"digest": digest} if digest else {})}, norm, reading, ranks)

        return report

    def _report_undigested(self, digest: str) -> None:
        if self._undigested:
            self._undigested(digest)
            self._undigested = None

    def _settle_digest(self) -> str:
        """The digest of the state as it is; reports the step that waits for it. Collective."""
        digest = self.step.digest()
        self._report_undigested(digest)
        return digest

    def _update(self, step: int, fault: str) -> None:
        """Update the weights, or do what the recipe says where something is not finite; the same on every rank."""
        if not fault:
            self._skipped_in_a_row = 0
            self.step.update(step)
            return
        reason = f"{fault} is not finite at step {step}"
        self._skipped_in_a_row += 1
        if self.recipe.on_nonfinite_loss == "rollback":
            self._roll_back(step, reason)
        if self.recipe.on_nonfinite_loss == "stop" or self._skipped_in_a_row > self.recipe.max_nonfinite_in_a_row:
            raise NonFiniteLossError(f"{reason}; no update was made")
        logger.warning("%s; its batch is skipped", reason)
        self.step.discard()

    def _end_for_corruption(self, step: int, found: Sequence[Verdict]) -> None:
        """Report ranks that erred, and end the attempt before the update. Collective."""
        reason = f"step {step}: {'; '.join(verdict.line() for verdict in found)}"
        if self.place.rank == 0:
            self.line.corrupt(step, found)
        dist.barrier()  # a rank that fails ends the others; the report comes first
        raise CorruptGradientError(f"{reason}; no update was made")

    def _roll_back(self, step: int, reason: str) -> None:
        """Skip the steps from the newest checkpoint up to `step`, and end the attempt. Collective."""
        with suppress(CheckpointError):  # the one under way: if it fails, the one before counts
            self.saver.close()
        newest = checkpoint.latest_commit(self.run_directory) if self.place.rank == 0 else None
        done = [newest.step if newest else 0]
        dist.broadcast_object_list(done, src=0)
        window = SkippedSteps(done[0] + 1, step)
        if rollbacks_in_a_row(self.skipped, window) > self.recipe.max_nonfinite_in_a_row:
            raise NonFiniteLossError(f"{reason}, after {self.recipe.max_nonfinite_in_a_row} rollbacks in a row")
        if self.place.rank == 0:
            self.line.roll_back(window, reason)
        dist.barrier()  # a rank that fails ends the others; the ledger comes first
        raise RolledBackError(f"{reason}; steps {window.first_step} to {step} are skipped")

    def _quarantine(self, batch: Batch) -> None:
        """Report samples that were replaced, each once; the replies are awaited before a commit."""
        new = [item for item in batch.substitutions if item.bad.id not in self._quarantined]
        if new:
            self._quarantined |= {item.bad.id for item in new}
            self.line.quarantine([{**item.to_json(), "step": batch.step + 1} for item in new])

    def _training_step(self, step_of: type[TrainingStep]) -> TrainingStep:
        folders = [Path(tempfile.gettempdir()), *([Path(self.recipe.cache_dir)] if self.recipe.cache_dir else [])]
        reading = RankReading(self.dataset, self.place.rank, device=self.place.device, folders=folders)
        objective = objective_of(self.recipe, self.engine.module, self.data.labels, self.place.device)
        step = functools.partial(
            step_of, self.engine, self.recipe, self.place, self.order, reading=reading, objective=objective
        )
        return step(on_mask=self.trace.note_masks) if self.trace else step()

    def _is_due(self, step: int) -> bool:
        return self.schedule.ends_in_a_checkpoint(step, self.recipe)

    def _save(self) -> None:
        """Begin a checkpoint of the steps done; every rank must come here after the same step."""
        self.pulse.at("save", SAVE_ALLOWED_SECONDS)
        digest = self._settle_digest()
        self.line.settle()
        if self.trace:
            self.trace.flush()  # the trace up to a commit is never lost
        commit = self._commit(digest, self.line.save_began(self.done_steps) if self.place.rank == 0 else {})
        part = self.saver.begin(commit, self._rank_file.copied)
        if self._keeper:
            self._keeper.begin(commit, part, 0.0)  # training stood still for the store

    def _hold(self) -> None:
        """Begin a memory checkpoint of the steps done; every rank must come here after the same step."""
        assert self._keeper
        began = time.monotonic()
        digest = self._settle_digest() if self._undigested else ""
        self.line.await_reports()  # whoever resumes here finds history and ledger up to here
        counters = self.line.counters() if self.place.rank == 0 else {}
        if self.trace:
            self.trace.write()
        part = self._rank_file.copied()
        self._keeper.begin(self._commit(digest, counters), part, time.monotonic() - began)

    def _is_holding(self) -> bool:
        """Whether the memory checkpoint under way waits for this rank: for its part, or its trace up to there."""
        if self._keeper is None:
            return False
        return self._keeper.is_holding or (self.trace is not None and self.trace.is_writing)

    def _settle_memory(self) -> None:
        """Wait until the memory checkpoint under way is whole, or has failed. Collective."""
        if self._keeper:
            if self.trace:
                self.trace.flush()
            self._keeper.settle(self.done_steps)

    def _begin_trace(self) -> TraceWriter:
        storage, url, place = self.run_directory.storage, self.job.trace_url, self.place
        if place.rank == 0:
            begin_trace(storage, url, self.run_directory.url, self.done_steps)
        return TraceWriter(storage, url, rank=place.rank, world_size=place.world_size, attempt=self.attempt)

    def _commit(self, digest: str, counters: Mapping[str, float]) -> Commit:
        recipe = self.recipe
        return Commit(
            step=self.done_steps,
            epoch=self.done_steps // self.schedule.steps_per_epoch,
            world_size=self.place.world_size,
            zero_stage=recipe.zero_stage,
            precision=recipe.precision,
            recipe_digest=recipe.digest(),
            dataset_digest=self.dataset.manifest.digest,
            order_version=ORDER_VERSION,
            seed=recipe.seed,
            attempt=self.attempt,
            created_at_seconds=time.time(),
            milestone=self.schedule.is_milestone(self.done_steps, recipe.milestone_epochs),
            counters=counters,
            versions=software_versions(),
            files=(),
            claim=self.job.claim,
            driver=self.job.driver,
            digest=digest,
        )

    def _in_memory(self) -> InMemory | None:
        """What the run's nodes hold, as its monitor knows it; the same on every rank."""
        if self.recipe.memory_checkpoint_every_steps == 0:
            return None
        held = self._group.broadcast(self.line.memory_checkpoint() if self.place.rank == 0 else None)
        return InMemory(held, copies_of(self.job.run.url, held, self.line.node_id)) if held else None

    def _memory_keeper(self, whole: HeldCheckpoint | None) -> MemoryKeeper | None:
        """Keeps this rank's state in memory, if the recipe has it and every node has a holder."""
        every = self.recipe.memory_checkpoint_every_steps
        if every == 0:
            return None
        keeper, missing = None, ""
        try:
            keeper = MemoryKeeper(
                self.job.run.url,
                self.line.monitor,
                self._group,
                self._nodes,
                every=every,
                part_bytes=self._rank_file.bytes,
                whole=whole,
            )
        except ValueError as error:
            missing = str(error)
        if not self._group.total(1 if missing else 0):
            return keeper
        if missing:
            self.line.memory_off(f"rank {self.place.rank}: {missing}")
        return None

    def _skip_checkpoint(self, step: int, damage: str, source: Source) -> None:
        if source == "memory":
            self.line.memory_lost(step, damage)
            return
        if self.recipe.on_damaged_checkpoint == "fail":
            remedy = "resume with on_damaged_checkpoint=previous to resume from the checkpoint before"
            raise DamagedCheckpointError("checkpoint", "must be as it was written", damage, remedy)
        self.line.checkpoint_damaged(step, damage)

    def _begin_attempt(self, found: Restored | None) -> tuple[int, list[SkippedSteps]]:
        """The attempt's number, and the steps that earlier ones rolled back."""
        begun: list[Any] = [0, []]
        compute = group_compute(self.recipe, self._group, self.schedule.steps_per_epoch)
        if self.place.rank == 0:
            number = self.line.begin_attempt(
                world_size=self.place.world_size,
                resume_step=self.done_steps,
                source=found.source if found else None,
                counters=dict(found.commit.counters) if found else {},
                started_at_seconds=self._started_at_seconds,
                compute=compute,
            )
            begun = [number, [SkippedSteps.from_json(row) for row in self.run_directory.read_left_out()]]
        dist.broadcast_object_list(begun, src=0)
        return begun[0], begun[1]
