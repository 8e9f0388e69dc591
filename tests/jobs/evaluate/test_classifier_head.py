"""A fine-tuned classifier, measured by its own head: from our files and from official ones."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_data import STORAGE

from jobs.errors import EvaluationError, WeightsFileError
from jobs.evaluate.classifier_head import MeasuredHead
from jobs.evaluate.evaluation import ProbePlan, ProbeSamples, SamplePlan, check_probes
from jobs.evaluate.features import FeaturePlan, here
from jobs.evaluate.labels import LabelledSamples
from jobs.evaluate.scores import Scores
from jobs.evaluate.subject import Subject
from jobs.weights.consolidated import ClassifierHead
from jobs.weights.file_statistics import IMAGENET
from jobs.weights.weight_files import model_json, write_tensors
from model import Classifier, ConvMAEConfig, normalise
from pipeline.load.center_crops import center_crops
from pipeline.load.dataset import Dataset

CLASSES = ("ant", "bee", "cat", "dog")


def classifier(config: ConvMAEConfig, classes: int, kind: str = "full") -> Classifier:
    """One that tells classes apart by chance, not always the same one."""
    torch.manual_seed(3)
    model = Classifier(config, classes, kind=kind)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(("fc_norm", "head")):
                value.normal_()
        for name, value in model.named_buffers():
            if "running" in name:
                value.uniform_(0.5, 2.0)
    return model.eval()


def own_file(folder: Path, model: Classifier, classes: tuple[str, ...]) -> str:
    path = folder / "tuned.safetensors"
    about = f'{{"kind": "{model.kind}", "classes": {list(classes)}}}'.replace("'", '"')
    write_tensors(model.state_dict(), path, {"format": "pt", "model": model_json(model.config), "classifier": about})
    return str(path)


def official_file(folder: Path, model: Classifier, prefix: str = "") -> str:
    path = folder / "tuned.pth"
    torch.save({"model": {f"{prefix}{name}": value for name, value in model.to_official().items()}}, path)
    return str(path)


def all_samples(dataset: Dataset) -> LabelledSamples:
    samples = ProbeSamples.of(STORAGE, SamplePlan(dataset.url, learns=False))
    assert not len(samples.train)
    check_probes(samples, ProbePlan((), is_linear=False, has_head=True))
    return samples.test


def scored(subject: Subject, test: LabelledSamples) -> Scores:
    head = MeasuredHead.of(subject, test, "")
    return head.scores(
        STORAGE, method="head", settings={}, plan=FeaturePlan(), runner=here(width=1), on_progress=lambda _: None
    )


def predicted(model: Classifier, dataset: Dataset) -> np.ndarray:
    """The class of each image, by a forward pass of all of them at once."""
    [pixels] = center_crops(dataset, [np.arange(dataset.samples)], model.config.image_shape, threads=1)
    with torch.no_grad():
        return model(normalise(torch.from_numpy(pixels), IMAGENET)).argmax(1).numpy()


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_a_head_is_measured_on_every_sample(tmp_path: Path, dataset: Dataset, small: ConvMAEConfig, kind: str) -> None:
    model = classifier(small, 4, kind)
    expected = predicted(model, dataset)
    assert len(set(expected.tolist())) > 1, "else the test shows little"

    for url in (own_file(tmp_path, model, CLASSES), official_file(tmp_path, model)):
        subject = Subject.of_file(STORAGE, url, None if url.endswith("safetensors") else small, encoder_alone=True)
        scores = scored(subject, all_samples(dataset))

        assert scores.classes == CLASSES
        assert scores.ranking[:, 0].tolist() == expected.tolist()
        assert scores.name == "own head"
        assert scores.top1.correct == int((expected == scores.labels).sum())


def test_classes_are_known_by_their_names(tmp_path: Path, dataset: Dataset, small: ConvMAEConfig) -> None:
    model = classifier(small, 5)
    classes = ("zebu", "dog", "cat", "bee", "ant")
    subject = Subject.of_file(STORAGE, own_file(tmp_path, model, classes), encoder_alone=True)

    scores = scored(subject, all_samples(dataset))

    assert [scores.classes[label] for label in scores.labels] == [
        CLASSES[label] for label in all_samples(dataset).labels
    ]
    assert scores.ranking[:, 0].tolist() == predicted(model, dataset).tolist()


def test_features_of_a_classifier_are_those_that_its_head_sees(
    tmp_path: Path, dataset: Dataset, small: ConvMAEConfig
) -> None:
    model = classifier(small, 4)
    subject = Subject.of_file(STORAGE, official_file(tmp_path, model, "module."), small, encoder_alone=True)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)

    found = subject.encoder().built("cpu")(normalise(pixels, IMAGENET))

    assert torch.equal(found, model.features(normalise(pixels, IMAGENET)))


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, dataset: Dataset, small: ConvMAEConfig) -> None:
    test = all_samples(dataset)
    known = Subject("x", small, classifier(small, 3).state_dict(), {}, ClassifierHead("full", ("ant", "bee", "cat")))
    numbered = Subject.of_file(STORAGE, official_file(tmp_path, classifier(small, 7)), small, encoder_alone=True)
    for subject, message in (
        (known, "classes: must be those of the head, got '1 of 4 are not'; it was not trained with dog"),
        (numbered, "classes: must be as many as the head has outputs, got '7 in the head, 4 in the data set'"),
        (Subject.of_seed(small, 0, "small"), "--head: must be of a fine-tuned classifier"),
    ):
        with pytest.raises(EvaluationError, match=re.escape(message)):
            MeasuredHead.of(subject, test, "")

    other = dataclasses.replace(small, depth=(1, 1, 3))
    with pytest.raises(WeightsFileError, match=r"must be those of a classifier .*missing blocks3\.2"):
        Subject.of_file(STORAGE, official_file(tmp_path, classifier(small, 4)), other, encoder_alone=True)


def test_what_a_head_was_trained_with_is_not_tested_on(dataset: Dataset) -> None:
    samples = ProbeSamples.of(STORAGE, SamplePlan(dataset.url, learns=False))
    used = samples.test.only(np.arange(dataset.samples) < 40)

    left = samples.tested_without(used)

    assert left.test.sample_ids.tolist() == list(range(40, dataset.samples))
    with pytest.raises(EvaluationError, match="--data: must hold images that it was not trained with"):
        samples.tested_without(samples.test)
    elsewhere = dataclasses.replace(used, dataset_digest="another")
    assert samples.tested_without(elsewhere) is samples
