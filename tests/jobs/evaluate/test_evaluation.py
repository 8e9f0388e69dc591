"""A whole evaluation: its result, its page, and what it refuses before anything is computed."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_data import STORAGE, labelled_dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jobs.errors import EvaluationError
from jobs.evaluate.evaluation import (
    Evaluation,
    ProbePlan,
    ProbeSamples,
    SamplePlan,
    check_probes,
    probe,
    probe_features,
)
from jobs.evaluate.evaluation_page import MOST_MATRIX_CLASSES, evaluation_html
from jobs.evaluate.features import FeaturePlan, features, here
from jobs.evaluate.scores import Scores
from jobs.evaluate.subject import Subject
from model import ConvMAEConfig
from pipeline.load.dataset import Dataset

PLAN = FeaturePlan(batch_size=8)


def evaluated(config: ConvMAEConfig, sample_plan: SamplePlan, plan: ProbePlan) -> Evaluation:
    subject = Subject.of_seed(config, 0, "small")
    encoder, samples = subject.encoder(), ProbeSamples.of(STORAGE, sample_plan)
    check_probes(samples, plan)
    found = probe_features(STORAGE, samples, encoder, plan=PLAN, runner=here(width=2), on_progress=lambda _: None)
    return Evaluation(subject, encoder, samples, sample_plan, PLAN, probe(samples, found, plan))


@pytest.fixture(scope="module")
def evaluation(dataset: Dataset, small: ConvMAEConfig) -> Evaluation:
    return evaluated(small, SamplePlan(dataset.url, test_ratio=0.4), ProbePlan((3, 10)))


def test_figures_are_those_of_scikit_learn_on_the_same_features(dataset: Dataset, evaluation: Evaluation) -> None:
    whole = features(
        STORAGE,
        dataset.url,
        np.arange(dataset.samples),
        evaluation.encoder,
        dataset_digest=dataset.digest,
        plan=PLAN,
        runner=here(width=1),
        on_progress=lambda _: None,
    ).astype(np.float64)
    train, test = evaluation.samples.train, evaluation.samples.test
    labels = np.array([sample.label for sample in dataset.read(np.arange(dataset.samples))])
    nearest = [KNeighborsClassifier(k, weights=lambda far: np.exp((1 - far) / 0.07), metric="cosine") for k in (3, 10)]
    linear = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000))

    for scores, classifier in zip(evaluation.scores, [*nearest, linear], strict=True):
        predicted = classifier.fit(whole[train.sample_ids], labels[train.sample_ids]).predict(whole[test.sample_ids])
        assert (scores.confusion == confusion_matrix(labels[test.sample_ids], predicted)).all()
        assert scores.top1.ratio == (predicted == labels[test.sample_ids]).mean()
    assert evaluation.scores[-1].top1.ratio > 0.6, "brighter quarters are easy to tell"


def test_two_datasets_are_learned_from_and_tested_on_apart(
    dataset: Dataset, small: ConvMAEConfig, tmp_path: Path
) -> None:
    other = labelled_dataset(tmp_path, {"ant": 4, "bee": 4, "cat": 4, "dog": 4}, first=500)

    found = evaluated(small, SamplePlan(other.url, dataset.url), ProbePlan((5,), is_linear=False))

    report = found.to_json()
    assert (report["train"]["url"], report["train"]["samples"]) == (dataset.url, 61)
    assert (report["test"]["url"], report["test"]["samples"]) == (other.url, 16)
    assert "test_ratio" not in report["choice"]
    assert [result["method"] for result in report["results"]] == ["knn"]


def test_the_same_evaluation_gives_the_same_json(evaluation: Evaluation, small: ConvMAEConfig) -> None:
    again = evaluated(small, evaluation.sample_plan, ProbePlan((3, 10)))

    assert json.dumps(again.to_json()) == json.dumps(evaluation.to_json())
    assert evaluation_html(again) == evaluation_html(evaluation)


def test_json_says_what_was_evaluated_and_how(dataset: Dataset, evaluation: Evaluation) -> None:
    report = json.loads(json.dumps(evaluation.to_json()))

    assert report["weights"] | {"encoder_sha256": ""} == {
        "name": "random weights of small, seed 0", "kind": "random", "recipe": "small", "seed": 0, "encoder_sha256": ""
    }  # fmt: skip
    assert report["train"]["samples"] + report["test"]["samples"] == 61
    assert report["test"]["dataset_digest"] == dataset.digest
    assert report["features"]["image_size"] == [32, 32]
    assert [result["settings"].get("k") for result in report["results"]] == [3, 10, None]
    for result in report["results"]:
        assert result["top5"] is None, "of four classes five are all"
        assert sum(row["samples"] for row in result["per_class"]) == report["test"]["samples"]
        low, high = result["top1"]["interval"]
        assert low <= result["top1"]["accuracy"] <= high


class Texts(HTMLParser):
    """Cells and headings of a page, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["td"], ["th"], ["dd"], ["h1"], ["h2"]):
            self.cells.append(data)


def read(html: str) -> list[str]:
    texts = Texts()
    texts.feed(html)
    assert texts.open == []
    return texts.cells


def test_the_page_has_every_figure_and_nothing_from_elsewhere(evaluation: Evaluation) -> None:
    html = evaluation_html(evaluation)
    cells = read(html)

    for scores in evaluation.scores:
        assert scores.name in cells and f"{scores.top1.ratio:.1%}" in cells
        matrix = [str(count) for count in scores.confusion.ravel()]
        assert all(count in cells for count in matrix)
    assert "http" not in html.replace("Content-Security-Policy", "").replace("http-equiv", "")


def test_names_of_classes_are_escaped_and_many_classes_are_listed_by_their_confusions(evaluation: Evaluation) -> None:
    classes = ("<b>bold</b>", *(f"class {number}" for number in range(1, MOST_MATRIX_CLASSES + 5)))
    labels, ranking = np.array([0, 0, 1, 2]), np.full((4, 5), -1)
    ranking[:, 0] = [3, 3, 1, 0]
    scores = Scores("knn", {"k": 3}, classes, labels, ranking)

    html = evaluation_html(dataclasses.replace(evaluation, scores=(scores,)))

    assert "<b>bold" not in html
    cells = read(html)
    place = cells.index("taken for")
    assert cells[place + 2 : place + 8] == ["<b>bold</b>", "class 3", "2", "class 2", "<b>bold</b>", "1"]


@pytest.mark.parametrize(
    ("change", "probes", "why"),
    [
        ({"test_ratio": 1.5}, ProbePlan(), "--test-ratio"),
        ({"train_labels": "s3://b/list"}, ProbePlan(), "--train-labels: must be given with --train-data"),
        ({"most_samples": -1}, ProbePlan(), "--samples: must be at least 1"),
        ({}, ProbePlan((10, 70)), r"--k: must be from 1 to the 49 train samples, got 70"),
        ({"most_samples": 12, "test_ratio": 0.6}, ProbePlan((10,)), "--k: must be from 1 to the"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    dataset: Dataset, change: dict[str, Any], probes: ProbePlan, why: str
) -> None:
    with pytest.raises(EvaluationError, match=why):
        check_probes(ProbeSamples.of(STORAGE, SamplePlan(dataset.url, **change)), probes)


def test_a_dataset_is_not_tested_on_what_was_learned(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--train-data: must not hold what is tested on.*61 samples are in both"):
        ProbeSamples.of(STORAGE, SamplePlan(dataset.url, dataset.url))

    keys = [sample.key for sample in dataset.read(np.arange(61))]
    for name, chosen in (("train", keys[:40]), ("test", keys[40:])):
        lines = [f"{key}\t{number % 2}\n" for number, key in enumerate(chosen)]
        STORAGE.write(str(tmp_path / name), "".join(lines).encode())
    lists = SamplePlan(dataset.url, dataset.url, str(tmp_path / "test"), str(tmp_path / "train"))
    samples = ProbeSamples.of(STORAGE, lists)
    assert (len(samples.train), len(samples.test)) == (40, 21)


def test_a_test_of_one_class_is_refused(dataset: Dataset) -> None:
    samples = ProbeSamples.of(STORAGE, SamplePlan(dataset.url))
    one = dataclasses.replace(samples, test=samples.test.only(samples.test.labels == 1))

    with pytest.raises(EvaluationError, match="test: must have samples of at least two classes"):
        check_probes(one, ProbePlan())
