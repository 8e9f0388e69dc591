"""The command, with faults on the last rank at the steps (from 1) that a variable lists: `POISON=7,8 python ...`.

POISON: its loss is NaN. FLIP: after the update one bit of a weight of its is another.

Ray sends functions of the main module by value, so the workers run `poisoned` as it stands here.
"""

from __future__ import annotations

import math
import os

from jobs.cli import main
from jobs.rank import trainer
from jobs.rank.trainer import TrainJob
from model.convmae import Output
from pipeline.load.batch import Batch

POISONED, FLIPPED = (
    frozenset(int(step) for step in os.environ.get(name, "0").split(",")) for name in ("POISON", "FLIP")
)


def poisoned(job: TrainJob) -> None:
    """What a worker does, on the last rank with a fault now and then."""
    import torch

    from jobs.rank import trainer  # the worker's own, in which `train_worker` is what it was
    from jobs.step.training_step import TrainingStep

    class PoisonedStep(TrainingStep):
        def forward(self, batch: Batch, chosen: slice) -> Output:
            output = super().forward(batch, chosen)
            if batch.step + 1 in POISONED and self.place.rank == self.place.world_size - 1:
                return output._replace(loss=output.loss * math.nan)
            return output

        def update(self, step: int) -> None:
            super().update(step)
            if step in FLIPPED and self.place.rank == self.place.world_size - 1:
                trained = next(each for each in self.engine.module.parameters() if each.requires_grad)
                weight = trained.data.view(-1)[:1].view(torch.int32)
                weight.bitwise_xor_(1)

    trainer.train_worker(job, PoisonedStep)


if __name__ == "__main__":
    trainer.train_worker = poisoned  # before jobs.control.worker_group takes it from there
    main.main()
