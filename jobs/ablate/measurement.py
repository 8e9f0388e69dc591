"""How finished runs are measured, each once: an evaluation that exists for the same weights and samples is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.ablate.spec import EvaluationPart, Trial
from jobs.cluster.fan_out import offered
from jobs.cluster.session import Session
from jobs.consolidation.target import recorded_sha256
from jobs.errors import CheckpointError
from jobs.evaluate.encoder import chosen_device
from jobs.evaluate.evaluation import (
    Evaluation,
    ProbePlan,
    ProbeSamples,
    SamplePlan,
    check_probes,
    probe,
    probe_features,
)
from jobs.evaluate.features import FeaturePlan, on_cluster
from jobs.evaluate.labels import InputNames
from jobs.evaluate.subject import Subject
from jobs.recipe.image_statistics import recorded_statistics
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from jobs.run.evaluations import key_of, read_evaluation, url_of
from jobs.weights import consolidated
from model import ChannelStatistics, ConvMAEConfig
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

_NAMES = InputNames(
    *(f"evaluation.{field}" for field in ("data", "labels", "test_ratio", "train_data", "train_labels"))
)


@dataclass(frozen=True)
class Measurement:
    """How the runs of one ablation are measured, and where the figures are kept."""

    storage: Storage
    part: EvaluationPart
    folder: str
    """Of the ablation, for the controls, which several variants may share."""
    _samples: dict[SamplePlan, ProbeSamples] = field(default_factory=dict, compare=False)
    _controls: dict[tuple[ConvMAEConfig, ChannelStatistics, int], str] = field(default_factory=dict, compare=False)

    def check(self, trial: Trial) -> None:
        """Refuse what cannot be measured, before anything is trained.

        Raises:
            UserError: No labels, one class, too few samples, a size that is invalid.
        """
        check_probes(self._samples_of(trial), self._probes)

    def of_run(self, trial: Trial, run: RunDirectory) -> dict[str, Any] | None:
        """The evaluation of a finished run; None if there is none yet."""
        if (step := newest_step(run)) is None:
            return None
        return read_evaluation(self.storage, url_of(run.url, self._key(trial, _weights_digest(run, step))))

    def of_control(self, trial: Trial) -> dict[str, Any] | None:
        """The evaluation of random weights of the same model and seed; None if there is none yet."""
        return read_evaluation(self.storage, url_of(self.folder, self._control_key(trial)))

    def make(self, session: Session, trial: Trial, run: RunDirectory) -> None:
        """Measure a finished run, and random weights of its model and seed, unless both exist.

        Raises:
            CheckpointError: The run has no weights.
            UserError, RunFailedError, OSError: As `convmae evaluate`.
        """
        step = newest_step(run)
        if step is None:
            raise CheckpointError("run", "must have a committed checkpoint", run.name, "resume it")
        places: list[tuple[str, Callable[[], Subject]]] = [
            (url_of(run.url, self._key(trial, _weights_digest(run, step))), lambda: Subject.of_run(run, step)),
            (url_of(self.folder, self._control_key(trial)), lambda: self._control(trial)),
        ]
        for url, subject in places:
            if read_evaluation(self.storage, url) is None:
                report = self._evaluated(session, trial, subject()).to_json()
                self.storage.write(url, json.dumps(report, indent=1).encode() + b"\n")

    def _evaluated(self, session: Session, trial: Trial, subject: Subject) -> Evaluation:
        samples, plan = self._samples_of(trial), self._plan(trial)
        device = chosen_device(self.part.device, has_gpu=offered("GPU") > 0)
        runner = on_cluster(session.storage, [samples.train.url, samples.test.url], on_gpu=device == "cuda")
        features, encoder = FeaturePlan(device=device), subject.encoder(self.part.image_size)
        found = probe_features(self.storage, samples, encoder, plan=features, runner=runner, on_progress=lambda _: None)
        return Evaluation(subject, encoder, samples, plan, features, probe(samples, found, self._probes))

    @property
    def _probes(self) -> ProbePlan:
        return ProbePlan(tuple(sorted(set(self.part.k))), self.part.linear, self.part.l2)

    def _plan(self, trial: Trial) -> SamplePlan:
        part = self.part
        return SamplePlan(
            data=part.data or trial.recipe.data,
            train_data=part.train_data,
            labels=part.labels,
            train_labels=part.train_labels,
            test_ratio=part.test_ratio,
            most_samples=part.samples,
            seed=part.split_seed,
        )

    def _samples_of(self, trial: Trial) -> ProbeSamples:
        plan = self._plan(trial)
        if plan not in self._samples:
            self._samples[plan] = ProbeSamples.of(self.storage, plan, _NAMES)
        return self._samples[plan]

    def _control_key(self, trial: Trial) -> str:
        """One for variants that begin with the same encoder, as those that differ in mask or loss."""
        recipe = self._begun(trial)
        known = recipe.model, recipe.statistics, trial.seed
        if known not in self._controls:
            self._controls[known] = self._control(trial).encoder(self.part.image_size).digest
        return self._key(trial, f"random weights {self._controls[known]}")

    def _control(self, trial: Trial) -> Subject:
        recipe = self._begun(trial)
        return Subject.of_seed(recipe.model, trial.seed, "random", recipe.statistics)

    def _begun(self, trial: Trial) -> Recipe:
        """The recipe of a trial with what its images are normalised by."""
        recipe = trial.recipe
        return recipe.with_statistics(*recorded_statistics(Manifest.load(self.storage, recipe.data)))

    def _key(self, trial: Trial, weights: str) -> str:
        """Of all that decides the figures but the device, which may change their last bits."""
        samples = self._samples_of(trial)
        return key_of(
            {
                "weights": weights,
                "samples": [part.digest for part in (samples.train, samples.test)],
                "probes": asdict(self._probes),
                "image_size": self.part.image_size,
            }
        )


def newest_step(run: RunDirectory) -> int | None:
    """The newest step whose weights can be read."""
    from jobs.checkpoint import checkpoint

    return max([*consolidated.urls_by_step(run), *checkpoint.committed_steps(run)], default=None)


def _weights_digest(run: RunDirectory, step: int) -> str:
    """Of a run's weights at a step: that of the consolidated file, else of the commit, which has its files'."""
    from jobs.checkpoint import checkpoint

    if (url := consolidated.urls_by_step(run).get(step)) and (sha256 := recorded_sha256(run.storage, url)):
        return sha256
    return hashlib.sha256(run.storage.read(checkpoint.commit_url(run, step))).hexdigest()
