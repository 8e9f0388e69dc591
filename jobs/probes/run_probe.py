"""A probe of a run's weights, as a process that has yet to import PyTorch is asked for it.

Nothing heavy is imported before the work begins, so that a process can first lower its priority.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.run.probe_rows import PROBE_NAMES
from pipeline.store.storage import Storage

if TYPE_CHECKING:
    from jobs.evaluate.evaluation import ProbeSamples
    from jobs.evaluate.subject import Subject


@dataclass(frozen=True)
class ProbedData:
    """The labelled samples on which a run is probed."""

    url: str
    labels: str = ""
    """URL of a list; empty: the dataset's own."""
    most_samples: int = 0


@dataclass(frozen=True)
class ProbedWeights:
    """Where the weights come from."""

    url: str = ""
    """Of consolidated weights; empty: those with which a run of this model and seed begins."""
    model: str = ""
    """JSON of the fields of ConvMAEConfig."""
    seed: int = 0
    mean: tuple[float, ...] = ()
    """With the model: what its images are normalised by; empty: ImageNet's."""
    std: tuple[float, ...] = ()


def probed(
    storage: Storage,
    data: ProbedData,
    weights: ProbedWeights,
    *,
    threads: int,
    pace: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The fields of a probe's event: accuracies, how many samples, the digest of which, and how long it took.

    The figures are those of `convmae evaluate` with the same weights, data, labels and number of samples.

    Args:
        storage: Reaches all.
        data: What is learned from and tested on.
        weights: What is probed.
        threads: Batches at once, each by one thread of PyTorch; they change no figure.
        pace: Returns when there is CPU time for more; called before PyTorch is imported, and between batches.

    Raises:
        UserError: Data or weights cannot be read, or the weights are not finite.
    """
    began = time.monotonic()
    pace()

    from jobs.evaluate.encoder import one_thread
    from jobs.evaluate.evaluation import ProbePlan, probe, probe_features
    from jobs.evaluate.features import FeaturePlan, here

    samples = probe_samples(storage, data)
    encoder = _subject(storage, weights).encoder()
    found = probe_features(
        storage, samples, encoder, plan=FeaturePlan(), runner=here(width=threads), on_progress=lambda _: pace()
    )
    pace()
    with one_thread():
        scores = probe(samples, found, ProbePlan())
    accuracies = {name: each.top1.ratio for name, each in zip(PROBE_NAMES, scores, strict=True)}
    counts = {"tested": len(samples.test), "learned": len(samples.train), "classes": len(samples.test.present)}
    return {**accuracies, **counts, "plan": samples.digest, "duration_seconds": round(time.monotonic() - began, 3)}


@functools.lru_cache(maxsize=1)
def probe_samples(storage: Storage, data: ProbedData) -> ProbeSamples:
    """The samples, read once in a process.

    Raises:
        EvaluationError: They cannot be probed: no labels, one class, too few.
        DatasetError: There is no dataset, or it is damaged.
    """
    from jobs.evaluate.evaluation import ProbePlan, ProbeSamples, SamplePlan, check_probes
    from jobs.evaluate.labels import InputNames

    names = InputNames("probe_data", "probe_labels", test_ratio="", other_data="")
    samples = ProbeSamples.of(storage, SamplePlan(data.url, labels=data.labels, most_samples=data.most_samples), names)
    check_probes(samples, ProbePlan())
    return samples


def _subject(storage: Storage, weights: ProbedWeights) -> Subject:
    from jobs.evaluate.subject import Subject
    from jobs.recipe.image_statistics import statistics_metadata
    from jobs.weights.file_statistics import image_statistics
    from jobs.weights.weight_files import model_config

    if weights.url:
        return Subject.of_file(storage, weights.url)
    statistics = image_statistics(statistics_metadata(weights.mean, weights.std), "recipe")
    return Subject.of_seed(model_config({"model": weights.model}, "recipe"), weights.seed, "recipe", statistics)
