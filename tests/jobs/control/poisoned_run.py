"""The command, with a loss that is NaN on one rank at the steps (from 1) that POISON lists: `POISON=7,8 python ...`.

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

STEPS = frozenset(int(step) for step in os.environ["POISON"].split(","))


def poisoned(job: TrainJob) -> None:
    """What a worker does, on the last rank with a NaN now and then."""
    from jobs.rank import trainer  # the worker's own, in which `train_worker` is what it was
    from jobs.rank.training_step import TrainingStep

    class PoisonedStep(TrainingStep):
        def forward(self, batch: Batch, chosen: slice) -> Output:
            output = super().forward(batch, chosen)
            if batch.step + 1 in STEPS and self.place.rank == self.place.world_size - 1:
                return output._replace(loss=output.loss * math.nan)
            return output

    trainer.train_worker(job, PoisonedStep)


if __name__ == "__main__":
    trainer.train_worker = poisoned  # before jobs.control.worker_group takes it from there
    main.main()
