"""Steps of a run computed again, by one process from a checkpoint, and compared with what the run noted of them.

Where a run's gradients are exact (jobs.step.exact_gradients) every step can be checked anywhere: a loss or a digest
that is not the run's own says that one of the two computed something else, for example on memory that lost a bit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from jobs.checkpoint import checkpoint
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.restore import restore_step
from jobs.errors import CheckpointError, RecipeError, RunError
from jobs.rank.gpu import compute_as
from jobs.rank.rank_data import RankData
from jobs.rank.rank_loader import rank_loader
from jobs.rank.restored_engine import restored_engine, values_of_rank
from jobs.rank.resumable import check_resumable
from jobs.rank.trainer import objective_of
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule
from jobs.run.directory import RunDirectory
from jobs.step.engine import build_model, initialize_deepspeed
from jobs.step.non_finite import SkippedSteps, stretches
from jobs.step.step_reading import RankReading
from jobs.step.training_step import RankPlace, TrainingStep


@dataclass(frozen=True)
class ReplayedStep:
    """What one step gave, now and in the run."""

    kind: Literal["checkpoint", "step"]
    """The checkpoint comes first, before any step is computed."""
    step: int
    """Steps done with it."""
    loss: float | None
    """None of the checkpoint, and where no update was made."""
    noted_loss: float | None
    digest: str
    """Of weights and moments after it; empty where the run noted none."""
    noted_digest: str

    @property
    def agrees(self) -> bool:
        """Whether all that the run noted is what was computed now, bit by bit."""
        return self.loss == self.noted_loss and self.digest == self.noted_digest

    def line(self) -> str:
        """For people."""
        done = self.kind if self.kind == "checkpoint" else _loss_text(self.loss)
        parts = [f"step {self.step:>8}", done]
        if self.digest:
            parts.append(f"digest {self.digest}")
        if self.loss != self.noted_loss:
            parts.append(f"DIFFERS from loss {self.noted_loss!r}, by {_apart(self.loss, self.noted_loss)}")
        if self.digest != self.noted_digest:
            parts.append(f"DIFFERS from digest {self.noted_digest}")
        return "  ".join(parts)


def _loss_text(loss: float | None) -> str:
    return "no update" if loss is None else f"loss {loss:.6f}"


def _apart(one: float | None, other: float | None) -> str:
    return f"{abs(one - other):.1e}" if one is not None and other is not None else "an update"


def replay(run: RunDirectory, first: int, steps: int, *, device: str, threads: int) -> Iterator[ReplayedStep]:
    """Compute steps again; the checkpoint comes first.

    Args:
        run: A run whose gradients are exact.
        first: Steps of the checkpoint to begin with; 0: the weights that the run began with.
        steps: How many to compute.
        device: `cpu` or `cuda`.
        threads: Of PyTorch, within an operation: as many as the run's workers had.

    Raises:
        RecipeError: The run's gradients are not exact.
        CheckpointError: There is no such checkpoint, or it cannot be resumed here.
        RunError: The run has not made that many steps.
    """
    recipe = run.read_recipe()
    if not recipe.is_exact:
        remedy = "only runs with reproducible=bits, and zero_stage 1 or 2, can be replayed"
        raise RecipeError("reproducible", "must be bits for a replay", recipe.reproducible, remedy)
    committed = checkpoint.committed_steps(run)
    if first and first not in committed:
        remedy = f"the run has those of steps {', '.join(map(str, committed)) or 'none'}, and its begin, 0"
        raise CheckpointError("--from", "must be a step with a checkpoint", first, remedy)
    history = run.read_latest_steps(("step", "loss", "digest"))
    if first + steps > (made := int(history.steps.max(initial=0))):
        remedy = f"lower --steps; the run has made {made} steps"
        raise RunError("--steps", f"must end within the run, from step {first}", steps, remedy)
    is_asked = (first < history.steps) & (history.steps <= first + steps)
    noted = {row["step"]: row for row in history.where(is_asked).rows()}
    torch.set_num_threads(threads)
    compute_as(recipe)
    with _group_of_one(device) as place:
        yield from _replayed(run, recipe, noted, range(first, first + steps), place)


def _replayed(
    run: RunDirectory, recipe: Recipe, noted: dict[int, dict[str, Any]], steps: range, place: RankPlace
) -> Iterator[ReplayedStep]:
    data = RankData.open(run.storage, recipe, RankGroup(device=place.device))
    dataset, order = data.dataset, data.order
    schedule = Schedule.of(recipe, order.steps_per_epoch)
    model = build_model(recipe)
    found = None
    if steps.start:
        group = RankGroup(device=place.device)
        found = restore_step(run, steps.start, values_of_rank(model, recipe, place), group)
        check_resumable(found.commit, dataset.manifest.digest)
    state = found.state if found else None
    engine = restored_engine(model, state, recipe=recipe, order=order, place=place, storage=run.storage)
    objective = objective_of(recipe, engine.module, data.labels, place.device)
    reading = RankReading(dataset, 0, device=place.device, folders=[Path(tempfile.gettempdir())])
    step = TrainingStep(engine, recipe, place, order, reading=reading, objective=objective)
    if found and found.commit.digest:
        yield ReplayedStep("checkpoint", steps.start, None, None, step.digest(), found.commit.digest)
    ledger = [SkippedSteps.from_json(row) for row in run.read_left_out()]
    for stretch in stretches(steps.start, steps.stop, ledger):
        if stretch.skipped:
            continue
        loader = rank_loader(dataset, order, recipe, place)
        with closing(loader.batches(stretch.steps.start, stretch.steps.stop)) as batches:
            for batch in batches:
                shared = step.gradients(batch, schedule.learning_rate(batch.step), instruction="")
                step.discard() if shared.fault else step.update(batch.step + 1)
                loss = None if shared.fault else shared.loss
                row = noted[batch.step + 1]
                digest = step.digest() if "digest" in row else ""
                yield ReplayedStep("step", batch.step + 1, loss, row["loss"], digest, row.get("digest", ""))


@contextmanager
def _group_of_one(device: str) -> Iterator[RankPlace]:
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "meeting-point").as_uri()
        backend = "nccl" if device == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, init_method=meeting_point, rank=0, world_size=1)
        try:
            initialize_deepspeed(device)
            yield RankPlace(0, 1, torch.device(device))
        finally:
            dist.destroy_process_group()
