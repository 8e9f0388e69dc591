"""Features by tasks of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from labelled_data import STORAGE
from ray_here import ray_here

from jobs.evaluate.features import FeaturePlan, Runner, features, here, on_cluster
from jobs.evaluate.subject import Subject
from model import ConvMAEConfig
from pipeline.load.dataset import Dataset


@pytest.fixture(scope="module")
def cluster(token_of_this_process: str) -> Iterator[None]:
    with ray_here(token_of_this_process, num_cpus=4, num_gpus=1):
        yield


@pytest.mark.parametrize(
    ("task_batches", "on_gpu"),
    [pytest.param(1, False, marks=pytest.mark.slow), pytest.param(5, False, marks=pytest.mark.slow), (5, True)],
)
def test_tasks_of_a_cluster_give_the_bits_of_this_process(
    cluster: None, dataset: Dataset, small: ConvMAEConfig, task_batches: int, on_gpu: bool
) -> None:
    encoder = Subject.of_seed(small, 3, "small").encoder()
    plan = FeaturePlan(batch_size=4, task_batches=task_batches)
    counts: list[int] = []

    def found(runner: Runner) -> bytes:
        return features(
            STORAGE,
            dataset.url,
            np.arange(dataset.samples),
            encoder,
            dataset_digest=dataset.digest,
            plan=plan,
            runner=runner,
            on_progress=lambda now: counts.append(now.samples),
        ).tobytes()

    assert found(on_cluster(STORAGE, [dataset.url], on_gpu=on_gpu)) == found(here(width=1))
    assert counts[-1] == dataset.samples
