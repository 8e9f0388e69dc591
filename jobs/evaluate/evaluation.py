"""An evaluation: which samples are learned from and tested on, the probes on their features, and the result.

`convmae evaluate` calls this with the weights that it was given; a probe of a run that trains can call it with those
of a milestone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.cluster.fan_out import Progress
from jobs.errors import EvaluationError
from jobs.evaluate.encoder import Float32s, FrozenEncoder
from jobs.evaluate.features import FeaturePlan, Runner, features
from jobs.evaluate.knn import NEIGHBOURS, TEMPERATURE, check_neighbours, knn_rankings
from jobs.evaluate.labels import (
    OPTIONS,
    TEST_RATIO,
    InputNames,
    LabelledSamples,
    divided,
    labelled_samples,
    matched,
    refuse_overlap,
)
from jobs.evaluate.linear import L2, check_l2, fitted_probe
from jobs.evaluate.scores import Scores
from jobs.evaluate.subject import Subject
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

FORMAT_VERSION = 1
"""Of the JSON."""
Show = Callable[[Progress], None]


@dataclass(frozen=True)
class SamplePlan:
    """Which samples are used."""

    data: str
    """URL of the dataset that is tested on, and learned from where there is no other."""
    train_data: str = ""
    """URL of the dataset that is learned from; empty: a part of `data`."""
    labels: str = ""
    """URL of a list of labels for `data`; empty: its own."""
    train_labels: str = ""
    """URL of a list of labels for `train_data`; empty: its own."""
    test_ratio: float = TEST_RATIO
    """Share of `data` that is tested on where there is no `train_data`."""
    most_samples: int = 0
    """Of each dataset, chosen by a hash of their ids; 0: all."""
    seed: int = 0
    """Of the choice and the division."""
    learns: bool = True
    """Whether there is something to learn; else all of `data` is tested on."""


@dataclass(frozen=True)
class ProbePlan:
    """What is measured."""

    neighbours: tuple[int, ...] = NEIGHBOURS
    """Each k of kNN; empty: none."""
    is_linear: bool = True
    l2: float = L2
    """Of the linear probe."""
    has_head: bool = False
    """Whether a fine-tuned classifier's own head is measured, too."""

    @property
    def has_probes(self) -> bool:
        """Whether something learns from features."""
        return bool(self.neighbours) or self.is_linear


@dataclass(frozen=True)
class ProbeSamples:
    """Labelled samples to learn from, of which there may be none, and to test on, with the same classes."""

    train: LabelledSamples
    test: LabelledSamples

    def tested_without(self, used: LabelledSamples) -> ProbeSamples:
        """The same, tested on no sample that a classifier was trained with.

        Raises:
            EvaluationError: None is left.
        """
        if used.dataset_digest != self.test.dataset_digest:
            return self
        test = self.test.only(~np.isin(self.test.sample_ids, used.sample_ids))
        if not len(test):
            remedy = "give other data: on these the accuracy of a head says nothing"
            raise EvaluationError("--data", "must hold images that it was not trained with", self.test.url, remedy)
        return ProbeSamples(self.train, test)

    @property
    def digest(self) -> str:
        """Of which samples there are, and of which classes."""
        content = hashlib.sha256()
        for part in (self.train, self.test):
            content.update(json.dumps([part.dataset_digest, part.classes]).encode())
            content.update(part.sample_ids.tobytes() + part.labels.tobytes())
        return content.hexdigest()[:16]

    @classmethod
    def of(cls, storage: Storage, plan: SamplePlan, names: InputNames = OPTIONS) -> ProbeSamples:
        """Read labels, choose samples and divide them; messages call what is given by `names`.

        Raises:
            EvaluationError: No labels, one class, classes that differ, too few samples.
            DatasetError: There is no dataset, or it is damaged.
        """
        if plan.train_labels and not plan.train_data:
            rule = f"must be given with {names.other_data}"
            raise EvaluationError(names.other_labels, rule, plan.train_labels, "give both")
        if plan.most_samples < 0:
            raise EvaluationError("--samples", "must be at least 1, or 0 for all", plan.most_samples, "use 0")
        test = _chosen(storage, plan.data, plan.labels, names, plan)
        if not plan.learns:
            return cls(test.only(np.zeros(len(test), bool)), test)
        if not plan.train_data:
            return cls(*divided(test, plan.test_ratio, plan.seed, names))
        train = _chosen(storage, plan.train_data, plan.train_labels, names.other, plan)
        refuse_overlap(train, test, names.other_data)
        return cls(train, matched(train, test))


def _chosen(storage: Storage, url: str, labels: str, names: InputNames, plan: SamplePlan) -> LabelledSamples:
    found = labelled_samples(Dataset.open(storage, url), storage, labels, names)
    return found.at_most(plan.most_samples, plan.seed) if plan.most_samples else found


@dataclass(frozen=True, eq=False)
class ProbeFeatures:
    """Features of the samples."""

    train: Float32s
    test: Float32s


def probe_features(
    storage: Storage,
    samples: ProbeSamples,
    encoder: FrozenEncoder,
    *,
    plan: FeaturePlan,
    runner: Runner,
    on_progress: Show,
) -> ProbeFeatures:
    """Features to learn from and to test on; of one dataset in one go, since neighbours there share requests."""

    def computed(chosen: LabelledSamples, ids: np.ndarray[Any, np.dtype[np.int64]]) -> Float32s:
        digest = chosen.dataset_digest
        return features(
            storage, chosen.url, ids, encoder, dataset_digest=digest, plan=plan, runner=runner, on_progress=on_progress
        )

    train, test = samples.train, samples.test
    if train.dataset_digest != test.dataset_digest:
        return ProbeFeatures(computed(train, train.sample_ids), computed(test, test.sample_ids))
    ids = np.union1d(train.sample_ids, test.sample_ids)
    found = computed(test, ids)
    return ProbeFeatures(*(found[np.searchsorted(ids, part.sample_ids)] for part in (train, test)))


def check_probes(samples: ProbeSamples, plan: ProbePlan) -> None:
    """Refuse what cannot be probed, before features are computed.

    Raises:
        EvaluationError: There are fewer train samples than neighbours, one part is of one class, or `l2` is impossible.
    """
    check_neighbours(plan.neighbours, len(samples.train))
    check_l2(plan.l2)
    parts = [("train", samples.train)] if plan.has_probes else []
    for name, part in (*parts, ("test", samples.test)):
        if len(part.present) < 2:
            remedy = "use more of them: --samples 0 takes all"
            raise EvaluationError(name, "must have samples of at least two classes", f"{len(part)} samples", remedy)


def probe(samples: ProbeSamples, found: ProbeFeatures, plan: ProbePlan) -> tuple[Scores, ...]:
    """Scores of each probe: kNN by number of neighbours, then the linear one.

    Raises:
        EvaluationError: There are fewer train samples than neighbours.
    """
    classes, truth, train_labels = samples.train.classes, samples.test.labels, samples.train.labels
    scores = []
    if plan.neighbours:
        rankings = knn_rankings(found.train, train_labels, found.test, len(classes), plan.neighbours)
        for k, ranking in zip(plan.neighbours, rankings, strict=True):
            scores.append(Scores("knn", {"k": k, "temperature": TEMPERATURE}, classes, truth, ranking))
    if plan.is_linear:
        fitted = fitted_probe(found.train, train_labels, len(classes), plan.l2)
        settings = {"l2": plan.l2, "iterations": fitted.iterations, "has_converged": fitted.has_converged}
        scores.append(Scores("linear", settings, classes, truth, fitted.ranking(found.test)))
    return tuple(scores)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of an evaluation."""

    subject: Subject
    encoder: FrozenEncoder
    samples: ProbeSamples
    sample_plan: SamplePlan
    feature_plan: FeaturePlan
    scores: tuple[Scores, ...]

    def to_json(self) -> dict[str, Any]:
        """All that it says, as plain values; nothing in it changes when the same is evaluated again."""
        plan, train, test = self.sample_plan, self.samples.train, self.samples.test
        division = {"test_ratio": plan.test_ratio} if not plan.train_data else {}
        return {
            "format_version": FORMAT_VERSION,
            "weights": {"name": self.subject.name, **self.subject.origin, "encoder_sha256": self.encoder.digest},
            "model": asdict(self.subject.config),
            "train": _described(train),
            "test": _described(test),
            "choice": {"seed": plan.seed, "most_samples": plan.most_samples, **division},
            "features": {
                "pooling": "mean over the patches of the last stage, then a LayerNorm",
                "channels": self.encoder.channels,
                "image_size": list(self.encoder.image_shape),
                "batch_size": self.feature_plan.batch_size,
                "device": self.feature_plan.device,
            },
            "results": [scores.to_json() for scores in self.scores],
        }


def _described(samples: LabelledSamples) -> dict[str, Any]:
    return {
        "url": samples.url,
        "dataset_digest": samples.dataset_digest,
        "samples": len(samples),
        "classes": len(samples.present),
        "unlabelled": samples.unlabelled,
    }
