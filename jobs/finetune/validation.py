"""The accuracy of a fine-tuning while it trains, by the ranks themselves: each a share of the batches.

Samples are cut into batches as `convmae evaluate` cuts them, and each is computed in fp32 by one thread, so that the
figures are the same at any world size, and those of an evaluation of the consolidated weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.evaluate.encoder import exactly, one_thread
from jobs.evaluate.features import BATCH_SIZE
from jobs.evaluate.labels import LabelledSamples
from jobs.evaluate.scores import RANKS, ranked
from jobs.recipe.recipe import Recipe
from model.pixels import normalise
from pipeline.load.center_crops import center_crops
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage


class Validation:
    """What one rank measures on."""

    def __init__(self, storage: Storage, recipe: Recipe, samples: LabelledSamples, rank: int, world_size: int) -> None:
        """Deal out the batches; does no I/O but on the manifest.

        Args:
            storage: Reaches the samples.
            recipe: Of a fine-tuning.
            samples: To measure on.
            rank: Of this process.
            world_size: Ranks that measure together.
        """
        places = [
            np.arange(start, min(start + BATCH_SIZE, len(samples))) for start in range(0, len(samples), BATCH_SIZE)
        ]
        self._mine, self._samples, self._recipe = places[rank::world_size], samples, recipe
        # As many forward passes on every rank, which ZeRO 3 does together.
        self._idle = -(-len(places) // world_size) - len(self._mine)
        self._dataset = Dataset.open(storage, samples.url, check_etags=recipe.check_etags)

    def measure(self, model: nn.Module, device: torch.device, on_batch: Callable[[], None]) -> dict[str, Any]:
        """Shares of samples whose class is the first, or among the first five. Collective; waits.

        Args:
            model: Gives logits; in training, and left so.
            device: Of the rank.
            on_batch: Called before each batch.
        """
        model.eval()
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        groups = [self._samples.sample_ids[places] for places in self._mine]
        config, threads = self._recipe.model, self._recipe.loader_threads
        crops = center_crops(self._dataset, groups, config.image_shape, threads=threads, channels=config.in_channels)
        with one_thread(), torch.no_grad(), exactly(device.type):
            for places, pixels in zip(self._mine, crops, strict=True):
                on_batch()
                logits = self._logits(model, torch.from_numpy(pixels).to(device))
                ranking = ranked(logits.double().cpu().numpy())
                hits = ranking == self._samples.labels[places][:, None]
                counts += torch.tensor([hits[:, 0].sum(), hits.any(1).sum(), len(places)], device=device)
            for _ in range(self._idle):
                on_batch()
                self._logits(
                    model, torch.zeros(1, config.in_channels, *config.image_shape, dtype=torch.uint8, device=device)
                )
        model.train()
        dist.all_reduce(counts)
        first, among, samples = counts.tolist()
        top5 = {"validation_top5": among / samples} if len(self._samples.classes) > RANKS else {}
        about = {"validation_samples": samples, "validation_plan": self._samples.digest}
        return {"validation_top1": first / samples, **top5, **about}

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self._recipe.precision == "bf16_pure" else torch.float32
        logits: Tensor = model(normalise(images, self._recipe.statistics).to(dtype))
        return logits
