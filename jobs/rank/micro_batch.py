"""The largest micro-batch whose images go through the model at once within this device's memory, by trying some.

The most that a forward and a backward pass hold grows with the images in a straight line. Two or more sizes that
certainly fit give the line; on a GPU the size that it leads to is tried as well.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jobs.errors import RecipeError
from jobs.finetune.classification import Classification
from jobs.recipe.recipe import Recipe
from jobs.recipe.resolution import largest_resolution
from jobs.step.engine import build_model
from jobs.step.objective import Objective, Reconstruction
from model import Classifier
from pipeline.host.free_memory import free_memory_bytes
from pipeline.image.channels import PHOTOGRAPH_BITS
from pipeline.load.batch import Batch

SAFE_SHARE = {"cpu": 0.6, "cuda": 0.9}
"""Of the memory that is there, what a micro-batch may lead to: a CPU's is shared with all else on the node."""
STATE_BYTES = 16
"""Of a trained parameter, divided by the ranks: AdamW's moments, a master, and a copy that is saved."""
TREE_BYTES = 8
"""Of a trained parameter on each rank: gradients that are added up."""
TRIAL_SECONDS = 20.0
"""A size that takes longer is the last that is tried on a CPU."""


class Trial(NamedTuple):
    """A size that was tried."""

    images: int
    bytes: int
    """The most that was held, beside what the process held before."""


class Fitting(NamedTuple):
    """What was found."""

    images: int
    trials: tuple[Trial, ...]
    limit_bytes: int


def largest_micro_batch(recipe: Recipe, ranks_here: int) -> Fitting:
    """Try sizes on this device, in this process, until it is known how many images fit.

    Args:
        recipe: Of the run.
        ranks_here: That share the memory of this node with a CPU; those on GPUs have one each.

    Raises:
        RecipeError: Not even one image fits.
    """
    device = torch.device(recipe.device)
    model = build_model(recipe).to(device)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    needed = trained * (STATE_BYTES // recipe.min_workers + TREE_BYTES)
    limit = int(_memory_bytes(device, ranks_here) * SAFE_SHARE[device.type]) - needed
    objective: Objective = Reconstruction(recipe, device)
    if isinstance(model, Classifier):
        objective = Classification(recipe, np.zeros(recipe.global_batch_size, np.int64), model, device)

    meter, largest = _Meter(device), largest_resolution(recipe.resolutions)
    shape, epoch = (recipe.model.in_channels, *largest.model.image_shape), largest.first_epoch

    def attempt(images: int) -> int:
        dtype = torch.uint8 if recipe.image_bits == PHOTOGRAPH_BITS else torch.uint16
        pixels = torch.zeros(images, *shape, dtype=dtype, device=device)
        batch = Batch(0, epoch, torch.arange(images, device="cpu"), pixels, 0.0, np.zeros((images, 5), np.int32))

        def passes() -> None:
            torch.autograd.backward(objective.output(model, batch, slice(None)).loss)

        try:
            return meter.most_bytes(passes)
        except torch.OutOfMemoryError:
            return limit + 1

    most = math.ceil(recipe.global_batch_size / recipe.min_workers)
    least = min(most, 2 if recipe.finetune else 1)  # mixing takes two, and so does a batch norm
    found = fitted(attempt, limit, least=least, most=most, tries_result=device.type == "cuda")
    if found.images < least:
        rule = (
            f"must leave room for {least} image{'s' if least > 1 else ''} at once in {limit:,} bytes beside the state"
        )
        remedy = "train on more workers or larger ones, with recompute, or a smaller model"
        raise RecipeError("micro_batch_size", rule, f"{found.trials[0].bytes:,} bytes", remedy)
    return found


def fitted(
    attempt: Callable[[int], int],
    limit: int,
    *,
    least: int,
    most: int,
    tries_result: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Fitting:
    """How many images fit into `limit` bytes.

    Args:
        attempt: Tries a size; returns the bytes that it took, more than `limit` if it did not fit.
        limit: In bytes.
        least: The first size that is tried.
        most: More are of no use.
        tries_result: Whether to try the size that the line leads to, and smaller ones if it does not fit.
        clock: Monotonic seconds.
    """
    trials: list[Trial] = []
    size = least
    attempt(least)  # what is allocated once, and kept
    while True:
        began = clock()
        trials.append(Trial(size, attempt(size)))
        if trials[-1].bytes > limit:
            break
        is_slow = not tries_result and clock() - began > TRIAL_SECONDS
        if size >= most or (len(trials) > 1 and (is_slow or _on_line(trials, min(2 * size, most)) > limit)):
            break
        size = min(2 * size, most)
    whole = [trial for trial in trials if trial.bytes <= limit]
    if not whole:
        return Fitting(0, tuple(trials), limit)
    best = whole[-1].images
    if len(whole) > 1 and best < most:
        each = max(1.0, (whole[-1].bytes - whole[-2].bytes) / (whole[-1].images - whole[-2].images))
        best = min(most, best + int((limit - whole[-1].bytes) / each))
        while tries_result and best > whole[-1].images:
            trials.append(Trial(best, attempt(best)))
            if trials[-1].bytes <= limit:
                break
            best = max(whole[-1].images, int(0.9 * best))
    return Fitting(best, tuple(trials), limit)


def _on_line(trials: list[Trial], images: int) -> float:
    first, second = trials[-2:]
    return second.bytes + (second.bytes - first.bytes) / (second.images - first.images) * (images - second.images)


def _memory_bytes(device: torch.device, ranks_here: int) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory_bytes() // ranks_here


class _Meter:
    """The most memory that some work holds, beside what is held now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _forget_peak()

    def most_bytes(self, work: Callable[[], object]) -> int:
        """Do it. On a CPU what earlier work has given back may still count, so sizes must grow."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            work()
            return torch.cuda.max_memory_reserved(self._device) - self._before
        _forget_peak()
        work()
        return max(0, _peak_bytes() - self._before)


def _forget_peak() -> int:
    """Have the kernel forget the most memory that this process had; returns what counts from now on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    return _peak_bytes()


def _peak_bytes() -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
