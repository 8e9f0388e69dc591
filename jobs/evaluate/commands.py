"""`convmae evaluate`, `embed` and `reconstruct`, with their output: checks, then progress, then the result."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jobs.cluster.session import Session
from jobs.errors import EvaluationError
from jobs.evaluate.classifier_head import MeasuredHead
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
from jobs.evaluate.evaluation_page import ACCURACY_COLUMNS, accuracy_rows, evaluation_html
from jobs.evaluate.feature_files import FeatureTable, keys_and_labels, write_features
from jobs.evaluate.features import FeaturePlan, Runner, features, here, on_cluster
from jobs.evaluate.labels import LabelledSamples, class_names
from jobs.evaluate.pictures import found_pictures, png, reconstructed
from jobs.evaluate.scores import Scores
from jobs.evaluate.subject import Subject
from jobs.terminal import bytes_text, duration_text, print_json, print_table, progress_bar, say
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

if TYPE_CHECKING:
    from jobs.cluster.fan_out import Progress
    from jobs.evaluate.evaluation import Show

STANDARD_OUTPUT = "-"


@dataclass(frozen=True)
class Outputs:
    """Files of an evaluation."""

    json: str = ""
    """URL, or STANDARD_OUTPUT; empty: none."""
    page: str = ""
    """URL; empty: none."""

    def __post_init__(self) -> None:
        check_suffix("--page", self.page, ".html")

    @property
    def files(self) -> list[str]:
        """URLs of those that are written."""
        return [url for url in (self.json, self.page) if url and url != STANDARD_OUTPUT]


def check_suffix(field: str, url: str, suffix: str) -> None:
    """Refuse the name of another kind of file.

    Raises:
        EvaluationError: It is one.
    """
    if url and not url.endswith(suffix):
        raise EvaluationError(field, f"must end in {suffix}", url, f"write it like evaluation{suffix}")


def _check_writable(storage: Storage, url: str) -> None:
    """Fail if a file cannot be written.

    Raises:
        StorageError: It cannot.
    """
    storage.check(url.rpartition("/")[0] or "/", write=True)


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning made of the weights that are evaluated."""

    subject: Subject
    """The classifier."""
    settings: Mapping[str, Any]
    """How it was trained."""


def evaluate_and_say(
    session: Session,
    subject: Subject,
    sample_plan: SamplePlan,
    probe_plan: ProbePlan,
    outputs: Outputs,
    *,
    image_size: str,
    device: str,
    used: LabelledSamples | None = None,
    finetune: Callable[[TextIO], Finetuned] | None = None,
) -> None:
    """Evaluate weights on labelled samples, and print the accuracies.

    Args:
        session: Says which store and cluster.
        subject: What is evaluated.
        sample_plan: On what.
        probe_plan: How.
        outputs: Files to write.
        image_size: As written on the command line.
        device: One of DEVICES.
        used: Samples that a head was trained with, which are not tested on.
        finetune: Makes a classifier of the weights, showing how it goes; None: none is made.

    Raises:
        UserError: Bad input, found before a feature is computed if possible.
    """
    storage, quiet = session.storage, outputs.json == STANDARD_OUTPUT
    stream = sys.stderr if quiet else sys.stdout
    encoder = subject.encoder(image_size)
    samples = ProbeSamples.of(storage, sample_plan)
    if used is not None:
        samples = samples.tested_without(used)
    check_probes(samples, probe_plan)
    heads: list[tuple[MeasuredHead, str, Mapping[str, Any]]] = []
    if probe_plan.has_head:
        heads.append((MeasuredHead.of(subject, samples.test, image_size), "head", {}))
    for url in outputs.files:
        _check_writable(storage, url)
    runner, feature_plan = _runner(session, [samples.train.url, samples.test.url], device)
    began, scores = time.monotonic(), tuple[Scores, ...]()
    if probe_plan.has_probes:
        with _shown("features", stream) as show:
            found = probe_features(storage, samples, encoder, plan=feature_plan, runner=runner, on_progress=show)
        scores = probe(samples, found, probe_plan)
    if finetune:
        made = finetune(stream)
        heads.append((MeasuredHead.of(made.subject, samples.test, image_size), "finetune", made.settings))
    for head, method, settings in heads:
        with _shown("head", stream) as show:
            scores += (
                head.scores(
                    storage, method=method, settings=settings, plan=feature_plan, runner=runner, on_progress=show
                ),
            )
    evaluation = Evaluation(subject, encoder, samples, sample_plan, feature_plan, scores)
    _write(storage, evaluation, outputs)
    if quiet:
        print_json(evaluation.to_json())
        return
    _say_accuracies(evaluation, time.monotonic() - began)
    for url in outputs.files:
        say(url)


def _say_accuracies(evaluation: Evaluation, seconds: float) -> None:
    samples = evaluation.samples
    learned = f", {len(samples.train)} to learn from" if len(samples.train) else ""
    counts = f"{len(samples.test)} test samples of {len(samples.test.present)} classes{learned}"
    say(f"{evaluation.subject.name}: {counts}, in {duration_text(seconds)}")
    print_table(ACCURACY_COLUMNS, accuracy_rows(evaluation.scores))


def embed_and_say(session: Session, subject: Subject, data: str, out: str, *, image_size: str, device: str) -> None:
    """Write the features of all samples of a dataset, and print what was written.

    Raises:
        UserError: Bad input, found before a feature is computed if possible.
    """
    storage = session.storage
    encoder = subject.encoder(image_size)
    dataset = Dataset.open(storage, data)
    if not dataset.samples:
        raise EvaluationError("DATASET", "must hold samples", data, "give another one")
    keys, labels = keys_and_labels(dataset)
    _check_writable(storage, out)
    runner, plan = _runner(session, [data], device)
    import numpy as np

    ids, digest = np.arange(dataset.samples), dataset.digest
    with _shown("features", sys.stdout) as show:
        found = features(storage, data, ids, encoder, dataset_digest=digest, plan=plan, runner=runner, on_progress=show)
    about = {
        "weights": {"name": subject.name, **subject.origin, "encoder_sha256": encoder.digest},
        "model": asdict(subject.config),
        "image_size": list(encoder.image_shape),
        "data": {"url": data, "dataset_digest": digest},
    }
    size = write_features(storage, out, FeatureTable(keys, labels, class_names(dataset), found, about))
    say(f"{out}: {len(found)} samples, {encoder.channels} features each ({bytes_text(size)}), by {subject.name}")


def reconstruct_and_say(session: Session, subject: Subject, pictures: Sequence[str], out: str, *, seed: int) -> None:
    """Draw reconstructions of pictures, and print where.

    Raises:
        UserError: Bad input.
    """
    storage = session.storage
    urls = found_pictures(storage, pictures, str(Path.cwd()))
    storage.write(out, png(reconstructed(storage, urls, subject.model(), subject.statistics, seed=seed)))
    say(f"{out}: {len(urls)} pictures, by {subject.name}")


def _runner(session: Session, urls: Sequence[str], device: str) -> tuple[Runner, FeaturePlan]:
    """The cluster where there is one, else this process."""
    is_on_cluster = "RAY_ADDRESS" in session.environ
    for url in urls:
        session.storage.check(url, write=False, shared=is_on_cluster)
    if not is_on_cluster:
        import torch

        device = chosen_device(device, has_gpu=torch.cuda.is_available())
        return here(on_gpu=device == "cuda"), FeaturePlan(device=device)
    session.connect()
    from jobs.cluster.fan_out import offered

    device = chosen_device(device, has_gpu=offered("GPU") > 0)
    return on_cluster(session.storage, urls, on_gpu=device == "cuda"), FeaturePlan(device=device)


def _write(storage: Storage, evaluation: Evaluation, outputs: Outputs) -> None:
    if outputs.json and outputs.json != STANDARD_OUTPUT:
        storage.write(outputs.json, json.dumps(evaluation.to_json(), indent=1).encode() + b"\n")
    if outputs.page:
        storage.write(outputs.page, evaluation_html(evaluation).encode())


@contextlib.contextmanager
def _shown(title: str, stream: TextIO) -> Iterator[Show]:
    began = time.monotonic()
    with progress_bar(title, stream) as draw:

        def show(now: Progress) -> None:
            seconds = time.monotonic() - began
            remaining = seconds / now.done * (now.total - now.done) if now.done else None
            rate = now.samples / seconds if seconds else 0.0
            draw(now.done, now.total, f"{now.samples} images · {rate:.0f} images/s · ETA {duration_text(remaining)}")

        yield show
