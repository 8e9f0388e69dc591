"""What a run is probed on, decided when it is planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_data import STORAGE, labelled_dataset

from jobs.evaluate.evaluation import ProbePlan, ProbeSamples, SamplePlan, probe, probe_features
from jobs.evaluate.features import FeaturePlan, here
from jobs.evaluate.subject import Subject
from jobs.probes.probe_plan import RunProbes, planned_probes
from jobs.probes.run_probe import ProbedData, ProbedWeights, probed
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule
from jobs.weights.weight_files import model_json
from pipeline.errors import UserError

FOUR = {"ant": 12, "bee": 12, "cat": 8, "dog": 8}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labelled_dataset(tmp_path_factory.mktemp("labelled"), FOUR).url


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labelled_dataset(tmp_path_factory.mktemp("flat"), FOUR, has_labels=False).url


def recipe(**fields: object) -> Recipe:
    small = {"model.image_size": 32, "model.embed_dim": [16, 24, 32], "model.depth": [1, 1, 1], "model.num_heads": 2}
    return named_recipe("tiny").amended({**small, **fields})


def planned(given: Recipe, *, is_known: bool = False) -> tuple[RunProbes | None, str]:
    return planned_probes(STORAGE, given, Schedule.of(given, 4), is_known=is_known)


def test_the_data_itself_is_taken_if_it_has_labels(labelled: str) -> None:
    probes, note = planned(recipe(data=labelled))

    assert probes and note == ""
    assert probes.data == ProbedData(labelled, "", 10_000)
    assert planned(recipe(data=labelled, probe_samples=30))[0] != probes
    assert planned(recipe(data=labelled, probes=False)) == (None, "")


def test_data_without_labels_means_no_probes_and_one_line(flat: str, labelled: str, tmp_path: Path) -> None:
    probes, note = planned(recipe(data=flat, probe_epochs=1))

    assert probes is None
    assert note.startswith("no accuracies will be measured: the images of data have no labels")
    one = labelled_dataset(tmp_path / "one", {"ant": 30}).url
    few = labelled_dataset(tmp_path / "few", {"ant": 5, "bee": 5}).url
    for url in (one, few):
        probes, note = planned(recipe(data=url))
        assert probes is None and "no accuracies will be measured" in note
    probes, note = planned(recipe(data=flat, probe_data=labelled))
    assert probes and probes.data.url == labelled and note == ""


def test_what_cannot_be_probed_is_refused_when_a_run_is_planned(flat: str, labelled: str, tmp_path: Path) -> None:
    one = labelled_dataset(tmp_path / "one", {"ant": 30}).url
    few = labelled_dataset(tmp_path / "few", {"ant": 5, "bee": 5}).url
    pairs = labelled_dataset(tmp_path / "pairs", {"ant": 1, "bee": 1}).url
    (tmp_path / "odd.txt").write_text("nobody\tant\n")
    for fields, told in (
        ({"probe_data": flat}, "probe_data: must have labels"),
        ({"probe_data": one}, "probe_data: must have at least two classes"),
        ({"probe_data": few}, "probe_data: must leave at least 20 samples to learn from"),
        ({"probe_data": pairs}, "probe_data: must leave samples to test on, got '2 samples'; give more samples"),
        ({"probe_data": f"{tmp_path}/nothing"}, "nothing"),
        ({"probe_labels": f"{tmp_path}/odd.txt"}, "probe_labels: must be a list of keys"),
        ({"probe_labels": f"{tmp_path}/none.txt"}, "probe_labels: must exist"),
        ({"probe_samples": 10, "probe_data": labelled}, "at least 20 samples"),
    ):
        with pytest.raises(UserError) as caught:
            planned(recipe(data=labelled, **fields))
        assert told in str(caught.value), fields
        assert "--" not in str(caught.value), "options are those of another command"
        probes, note = planned(recipe(data=labelled, **fields), is_known=True)  # a run that began is not kept from it
        assert probes is None if fields.keys() == {"probe_samples"} else probes and probes.plan == "", note


def test_figures_are_those_of_the_evaluation_with_the_same_plan(labelled: str) -> None:
    config = recipe().model
    data = ProbedData(labelled, most_samples=36)

    found = probed(STORAGE, data, ProbedWeights("", model_json(config), 5), threads=2)

    subject, samples = (
        Subject.of_seed(config, 5, "tiny"),
        ProbeSamples.of(STORAGE, SamplePlan(labelled, most_samples=36)),
    )
    features = probe_features(
        STORAGE, samples, subject.encoder(), plan=FeaturePlan(), runner=here(width=1), on_progress=lambda _: None
    )
    scores = probe(samples, features, ProbePlan())
    assert [found[name] for name in ("knn_10", "knn_20", "linear")] == [each.top1.ratio for each in scores]
    assert (found["tested"], found["learned"], found["classes"]) == (len(samples.test), len(samples.train), 4)
    assert found["tested"] + found["learned"] == 36
    again = probed(STORAGE, data, ProbedWeights("", model_json(config), 5), threads=1)
    assert {**found, "duration_seconds": 0} == {**again, "duration_seconds": 0}
