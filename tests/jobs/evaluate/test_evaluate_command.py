"""`convmae evaluate` as a user types it, on real S3 and a real cluster."""

from __future__ import annotations

import json

import pytest
from testbed import Command

from jobs.evaluate.evaluation import Evaluation, ProbePlan, ProbeSamples, SamplePlan, probe, probe_features
from jobs.evaluate.features import FeaturePlan, here
from jobs.evaluate.subject import Subject
from jobs.recipe.named_recipes import named_recipe
from pipeline.store.storage import Storage


@pytest.mark.slow
def test_tasks_on_a_cluster_give_the_figures_of_this_process(convmae: Command, data: str) -> None:
    out = "s3://convmae/evaluations/random.json"

    printed, _ = convmae(
        "evaluate", "random", "--recipe", "tiny", "model.image_size=32", "--data", data, "--json", out, "--k", "5"
    )

    storage = Storage.from_environment(convmae.stack.environment())
    assert out in printed
    recipe = named_recipe("tiny").amended({"model.image_size": 32})
    subject, plan, probes = Subject.of_seed(recipe.model, 0, "tiny"), SamplePlan(data), ProbePlan((5,))
    encoder, samples, features = subject.encoder(), ProbeSamples.of(storage, plan), FeaturePlan()
    found = probe_features(storage, samples, encoder, plan=features, runner=here(width=1), on_progress=lambda _: None)
    expected = Evaluation(subject, encoder, samples, plan, features, probe(samples, found, probes)).to_json()
    assert json.loads(storage.read(out)) == json.loads(json.dumps(expected))
