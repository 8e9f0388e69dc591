"""Features of a dataset's samples: by hand, by any number of tasks, and refused where a sample is damaged."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_data import STORAGE, labelled_dataset

from jobs.cluster.fan_out import Progress
from jobs.errors import EvaluationError, WeightsFileError
from jobs.evaluate.encoder import Float32s, FrozenEncoder, chosen_device
from jobs.evaluate.features import FeaturePlan, Runner, features, here
from jobs.evaluate.subject import Subject
from jobs.weights.file_statistics import IMAGENET
from model import ConvMAE, ConvMAEConfig, normalise
from pipeline.errors import DatasetError
from pipeline.image.augment import center_crop
from pipeline.image.decode import decode
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

PLAN = FeaturePlan(batch_size=4, task_batches=2)


@pytest.fixture(scope="module")
def encoder(small: ConvMAEConfig) -> FrozenEncoder:
    return Subject.of_seed(small, 3, "small").encoder()


def found(
    dataset: Dataset,
    encoder: FrozenEncoder,
    ids: np.ndarray[Any, np.dtype[np.int64]] | None = None,
    *,
    runner: Runner | None = None,
    plan: FeaturePlan = PLAN,
    shows: list[Progress] | None = None,
) -> Float32s:
    ids = np.arange(dataset.samples) if ids is None else ids
    return features(
        STORAGE,
        dataset.url,
        ids,
        encoder,
        dataset_digest=dataset.digest,
        plan=plan,
        runner=runner or here(width=1),
        on_progress=(shows if shows is not None else []).append,
    )


def reversed_tasks(
    work: Callable[[Storage, str, Any], Any],
    storage: Storage,
    url: str,
    tasks: Iterable[Any],
    *,
    on_tick: Callable[[], None],
) -> Iterator[Any]:
    """All tasks, the last first."""
    on_tick()
    for task in list(tasks)[::-1]:
        yield work(storage, url, task)


def test_features_are_those_of_a_forward_by_hand(dataset: Dataset, encoder: FrozenEncoder) -> None:
    torch.manual_seed(3)
    model = ConvMAE(encoder.config).eval()
    crops = [center_crop(decode(sample.data), (32, 32)) for sample in dataset.read(np.arange(dataset.samples))]
    with torch.no_grad():
        maps = model.encode_dense(normalise(torch.from_numpy(np.stack(crops)), IMAGENET)).stage3
    mean = maps.double().mean((2, 3))
    variance = mean.var(1, unbiased=False, keepdim=True)
    expected = (mean - mean.mean(1, keepdim=True)) / (variance + 1e-6).sqrt()

    np.testing.assert_allclose(found(dataset, encoder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task_batches", [1, 3, 100])
def test_the_bits_do_not_depend_on_tasks_their_order_or_threads(
    dataset: Dataset, encoder: FrozenEncoder, task_batches: int
) -> None:
    expected = found(dataset, encoder)
    plan = FeaturePlan(batch_size=4, task_batches=task_batches)

    for runner in (here(width=1), here(width=3), Runner(reversed_tasks, lambda shared: shared, 2)):
        assert found(dataset, encoder, runner=runner, plan=plan).tobytes() == expected.tobytes()


def test_the_bits_do_not_depend_on_the_threads_of_the_process(dataset: Dataset, encoder: FrozenEncoder) -> None:
    expected = found(dataset, encoder)
    torch.set_num_threads(2)
    try:
        again = found(dataset, encoder, runner=here(width=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)

    assert again.tobytes() == expected.tobytes()


def test_some_samples_have_the_features_that_they_have_among_all(dataset: Dataset, encoder: FrozenEncoder) -> None:
    ids = np.array([0, 7, 8, 30, 60])

    some = found(dataset, encoder, ids, plan=FeaturePlan(batch_size=2))

    np.testing.assert_allclose(some, found(dataset, encoder)[ids], rtol=1e-4, atol=1e-5)


def test_progress_counts_samples_and_no_thread_is_left(dataset: Dataset, encoder: FrozenEncoder) -> None:
    shows: list[Progress] = []
    before = set(threading.enumerate())

    found(dataset, encoder, shows=shows)

    assert shows[0].samples == 0
    assert (shows[-1].samples, shows[-1].done, shows[-1].total) == (61, 8, 8)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("convmae-")]


def test_positions_are_interpolated_to_another_image_size(dataset: Dataset, small: ConvMAEConfig) -> None:
    large = Subject.of_seed(small, 3, "small").encoder("64x48")

    assert large.image_shape == (64, 48)
    assert np.isfinite(found(dataset, large)).all()


def test_a_damaged_sample_is_named(tmp_path: Path, encoder: FrozenEncoder) -> None:
    dataset = labelled_dataset(tmp_path, {"ant": 5, "bee": 5})
    row = dataset.rows([6])[0].row
    tar = Path(dataset.url, "shard-000000.tar")
    data = bytearray(tar.read_bytes())
    data[row.offset + 200] ^= 1
    tar.write_bytes(data)

    with pytest.raises(DatasetError, match=rf"must be as it was ingested.*{row.member}.*an accuracy without it"):
        found(dataset, encoder)


def test_a_dataset_that_was_replaced_is_refused(dataset: Dataset, encoder: FrozenEncoder) -> None:
    with pytest.raises(DatasetError, match="must stay as it is while it is evaluated"):
        features(
            STORAGE,
            dataset.url,
            np.arange(3),
            encoder,
            dataset_digest="another",
            plan=FeaturePlan(),
            runner=here(width=1),
            on_progress=lambda _: None,
        )


def test_weights_that_are_not_finite_or_give_no_finite_features_are_refused(
    dataset: Dataset, small: ConvMAEConfig
) -> None:
    subject = Subject.of_seed(small, 3, "small")
    name = "encoder.patch_embed1.proj.weight"
    broken = dataclasses.replace(subject, tensors={**subject.tensors, name: subject.tensors[name] * float("nan")})
    huge = {key: value * 1e30 for key, value in subject.tensors.items() if key.startswith("encoder.blocks3")}

    with pytest.raises(WeightsFileError, match=r"must be finite in fp32 \(encoder.patch_embed1"):
        broken.encoder()
    with pytest.raises(EvaluationError, match="weights: must give finite values in fp32"):
        found(dataset, dataclasses.replace(subject, tensors={**subject.tensors, **huge}).encoder())


def test_the_digest_is_of_weights_model_and_image_size(small: ConvMAEConfig) -> None:
    subject = Subject.of_seed(small, 3, "small")
    digests = {
        subject.encoder().digest,
        subject.encoder("64").digest,
        Subject.of_seed(small, 4, "small").encoder().digest,
        Subject.of_seed(dataclasses.replace(small, num_heads=2), 3, "small").encoder().digest,
    }

    assert len(digests) == 4
    assert subject.encoder().digest == Subject.of_seed(small, 3, "again").encoder().digest


def test_a_device_is_chosen_by_what_is_there() -> None:
    assert [chosen_device("auto", has_gpu=has_gpu) for has_gpu in (False, True)] == ["cpu", "cuda"]
    assert chosen_device("cpu", has_gpu=True) == "cpu"
    for name, has_gpu in (("cuda", False), ("gpu", True)):
        with pytest.raises(EvaluationError, match="--device: must be"):
            chosen_device(name, has_gpu=has_gpu)
