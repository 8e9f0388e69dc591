"""Training that both examples share: order, optimizer, steps, checkpoints, on one process or under torchrun.

What a step does is a function of (seed, step) and of the weights and moments before it: samples are chosen by position,
draws of augmentation are keyed by (seed, epoch, sample), and PyTorch's generator is seeded anew in each step for
drop path, dropout and Mask R-CNN's choice of regions. So no state of a generator is saved, and on CPUs a resumed
training has the bits of one that was not interrupted, with as many processes. On GPUs some of PyTorch's kernels add in
no fixed order.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from schedule import Schedule, learning_rate_factor
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from model.layer_decay import layer_scales
from pipeline.errors import UserError
from pipeline.order import hashing

Sample = TypeVar("Sample")

LAST = "last.pt"
LOG = "metrics.jsonl"

_ORDER, _STEP = 0x4F524445, 0x53544550  # keep apart what else is keyed by the seed
_AHEAD = 2
"""Steps whose samples are read before they are needed."""


class TrainingError(UserError):
    """A training that cannot begin, resume or go on."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and on what it computes."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def joined(cls, environment: Mapping[str, str]) -> Ranks:
        """Join the processes of torchrun, or stand alone."""
        local, on_gpu = int(environment.get("LOCAL_RANK", 0)), torch.cuda.is_available()
        device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        if "RANK" not in environment:
            return cls(0, 1, device)
        distributed.init_process_group("nccl" if on_gpu else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size(), device)


@dataclass(frozen=True)
class Job(Generic[Sample]):
    """What is trained, on what, and where it is written."""

    schedule: Schedule
    seed: int
    out: Path
    size: int
    """Samples of the data set."""
    load: Callable[[int, int], Sample]
    """(epoch, sample) -> what one picture is trained on; called in threads."""
    losses: Callable[[nn.Module, list[Sample]], dict[str, Tensor]]
    """(model, micro-batch) -> losses, whose sum is minimised."""
    micro_batch: int
    """Samples that a process computes at once; its part of a batch is several of them."""
    threads: int
    save_every_steps: int
    identity: Mapping[str, Any]
    """What a checkpoint must agree with besides the schedule and the seed, such as the names of classes."""


def places_of_step(seed: int, size: int, batch_size: int, step: int) -> list[tuple[int, int]]:
    """(epoch, sample) of a batch: epochs follow each other without a gap, each a permutation of its own."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    places = []
    for epoch in np.unique(positions // size).tolist():
        inside = positions[positions // size == epoch] % size
        samples = hashing.permuted(hashing.key(_ORDER, seed, epoch), size, inside)
        places += [(epoch, sample) for sample in samples.tolist()]
    return places


def made_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW in which each group has its layer's factor as `scale`; biases, norms and positions do not decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    scales = layer_scales(model, schedule.layer_decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("pos_embed")
            groups.setdefault((scales[name], decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "scale": scale, "weight_decay": schedule.weight_decay if decays else 0.0}
            for (scale, decays), parameters in groups.items()
        ],
        lr=schedule.learning_rate,
    )


def train(model: nn.Module, job: Job[Sample], ranks: Ranks, say: Callable[[str], None]) -> None:
    """Train to the schedule's last step, from the last checkpoint in `out` where there is one.

    Args:
        model: On the device.
        job: What and where.
        ranks: Which process this is.
        say: Takes a line for the user; called by the first process.

    Raises:
        TrainingError: If a checkpoint is of another training, the batch cannot be divided, or a loss is not finite.
    """
    part = _part_of_batch(job, ranks)
    optimizer = made_optimizer(model, job.schedule)
    first = _restored(model, optimizer, job, ranks)
    if ranks.rank == 0:
        _keep_rows(job.out / LOG, first)
        if first:
            say(f"resumed after step {first} of {job.schedule.steps}")
    wrapped = DistributedDataParallel(model) if ranks.world > 1 else model
    for step, samples in _read_ahead(job, ranks, part, first):
        torch.manual_seed(hashing.key(_STEP, job.seed, step, ranks.rank))
        factor = learning_rate_factor(job.schedule, step)
        for group in optimizer.param_groups:
            group["lr"] = job.schedule.learning_rate * factor * group["scale"]
        losses = _updated(wrapped.train(), optimizer, job, samples)
        done = step + 1
        if ranks.rank == 0:
            _log(job, done, factor, losses, say)
        if not all(math.isfinite(loss) for loss in losses.values()):
            remedy = "lower the learning rate by --set learning_rate=..., in another --out"
            raise TrainingError(f"losses of step {done}", "must be finite", losses, remedy)
        if ranks.rank == 0 and (done % job.save_every_steps == 0 or done == job.schedule.steps):
            _save(model, optimizer, job, ranks, done)
    if ranks.world > 1:
        distributed.barrier()


def load_trained(model: nn.Module, out: Path, identity: Mapping[str, Any]) -> int:
    """The weights of the last checkpoint, for testing; returns the step after which it was written.

    Raises:
        TrainingError: If there is none, or it is of other classes or another shape of the model.
    """
    saved = _read(out / LAST)
    if saved is None:
        raise TrainingError("--out", f"must have a {LAST}", str(out), "train first")
    _check_same(saved["identity"], dict(identity), out)
    _load_weights(model, saved["model"], out)
    return int(saved["step"])


def _part_of_batch(job: Job[Sample], ranks: Ranks) -> int:
    part, rest = divmod(job.schedule.batch_size, ranks.world)
    if rest or part % job.micro_batch:
        rule = f"must be a multiple of {ranks.world} processes x micro-batches of {job.micro_batch}"
        raise TrainingError("batch_size", rule, job.schedule.batch_size, "change --micro-batch or the processes")
    return part


def _read_ahead(job: Job[Sample], ranks: Ranks, part: int, first: int) -> Iterator[tuple[int, list[Sample]]]:
    pending: deque[tuple[int, list[Future[Sample]]]] = deque()
    threads = ThreadPoolExecutor(job.threads)
    try:
        for step in range(first, job.schedule.steps + _AHEAD):
            if step < job.schedule.steps:
                places = places_of_step(job.seed, job.size, job.schedule.batch_size, step)
                mine = places[ranks.rank * part : (ranks.rank + 1) * part]
                pending.append((step, [threads.submit(job.load, *place) for place in mine]))
            if pending and step >= pending[0][0] + _AHEAD:
                number, futures = pending.popleft()
                yield number, [future.result() for future in futures]
    finally:
        threads.shutdown(cancel_futures=True)


def _updated(
    model: nn.Module, optimizer: torch.optim.Optimizer, job: Job[Sample], samples: list[Sample]
) -> dict[str, float]:
    """One update; the mean of each loss over this process's micro-batches."""
    optimizer.zero_grad()
    count = len(samples) // job.micro_batch
    sums: dict[str, Tensor] = {}
    for number in range(count):
        with ExitStack() as stack:
            if isinstance(model, DistributedDataParallel) and number + 1 < count:
                stack.enter_context(model.no_sync())
            losses = job.losses(model, samples[number * job.micro_batch : (number + 1) * job.micro_batch])
            whole = torch.stack(list(losses.values())).sum() / count
            whole.backward()  # type: ignore[no-untyped-call]
        for name, loss in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(loss)) + loss.detach() / count
    optimizer.step()
    return {name: value.item() for name, value in sums.items()}


def _log(job: Job[Sample], done: int, factor: float, losses: Mapping[str, float], say: Callable[[str], None]) -> None:
    row = {"step": done, "learning_rate": job.schedule.learning_rate * factor, **losses}
    with (job.out / LOG).open("a") as file:
        file.write(json.dumps(row) + "\n")
    if done % max(1, job.schedule.steps // 20) == 0 or done == 1:
        say(f"step {done}  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))


def _keep_rows(path: Path, steps: int) -> None:
    """Take the rows of steps that are done again out of the log, which has one a step."""
    if path.exists():
        rows = path.read_text().splitlines()[:steps]
        path.write_text("".join(f"{row}\n" for row in rows))


def _agreed(job: Job[Sample], ranks: Ranks) -> dict[str, Any]:
    return {"seed": job.seed, "processes": ranks.world, "micro_batch": job.micro_batch, **_plain(job.schedule)}


def _plain(schedule: Schedule) -> dict[str, Any]:
    return schedule.model_dump(mode="json")


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job[Sample], ranks: Ranks, done: int) -> None:
    """Replace the last checkpoint at once, so that whoever is killed leaves a whole one."""
    part = job.out / f"{LAST}.part"
    with part.open("wb") as file:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "agreed": _agreed(job, ranks),
                "identity": dict(job.identity),
            },
            file,
        )
        file.flush()
        os.fsync(file.fileno())
    part.replace(job.out / LAST)


def _restored(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job[Sample], ranks: Ranks) -> int:
    saved = _read(job.out / LAST)
    if saved is None:
        return 0
    _check_same(saved["agreed"] | saved["identity"], _agreed(job, ranks) | dict(job.identity), job.out)
    _load_weights(model, saved["model"], job.out)
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("model", "optimizer", "step", "agreed", "identity")}
    except Exception as error:  # whatever a file that is not ours makes unpickling raise
        rule = f"must be a checkpoint of this example ({type(error).__name__})"
        raise TrainingError("--out", rule, str(path), "remove the file, or give another --out") from None


def _check_same(saved: Mapping[str, Any], ours: Mapping[str, Any], out: Path) -> None:
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            rule = f"must be {saved.get(name)!r}, as in the training in {out}"
            raise TrainingError(name, rule, ours.get(name), "change it back, or give another --out")


def _load_weights(model: nn.Module, state: Mapping[str, Tensor], out: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError:
        rule = "must be of the architecture of the training that it holds"
        remedy = "give the weights that it began with, or another --out"
        raise TrainingError("--weights", rule, str(out), remedy) from None
