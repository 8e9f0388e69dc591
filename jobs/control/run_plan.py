"""A run whose every input was found good, before anything is started or written."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jobs.cluster.session import Session
from jobs.errors import PortTakenError, RecipeError
from jobs.finetune.training_labels import TrainingLabels
from jobs.notices.webhook import Webhook
from jobs.probes.probe_plan import RunProbes, planned_probes
from jobs.recipe.image_statistics import recorded_statistics
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule, order_of
from jobs.run.directory import RunDirectory
from jobs.run.patience import persevere
from jobs.run.shared_folder import check_seen_by_all, input_landmarks, planted, rank_datasets, run_landmarks
from jobs.run.trace import check_trace
from jobs.trackers.trackers import check_trackers
from jobs.weights.initial import pinned
from pipeline.access.places import normal
from pipeline.image.channels import RGB_CHANNELS
from pipeline.shard.manifest import Manifest
from pipeline.store.lease import Lease
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class RunPlan:
    """A run whose every input was found good; nothing was started or written yet."""

    recipe: Recipe
    run: RunDirectory
    schedule: Schedule
    trace_url: str = ""
    """Where to write what each rank consumes (jobs.run.trace); empty: nowhere."""
    patience_seconds: float = 0.0
    """How long its driver waits for a cluster that does not answer."""
    first_tars: Mapping[str, str] = field(default_factory=dict)
    """URL of a tar of each data set that ranks read, by its field; it may lie elsewhere than the manifest."""
    probes: RunProbes | None = None
    """How its encoder is measured beside the training; None: not at all."""
    probe_note: str = ""
    """Why not, where that may surprise."""


def plan_run(
    session: Session, recipe: Recipe, name: str, trace_url: str = "", *, drives: bool = True, is_patient: bool = False
) -> RunPlan:
    """Check everything that can be checked before anything starts.

    Args:
        session: Says which store and cluster.
        recipe: What to train.
        name: Of the run.
        trace_url: Where to write what each rank consumes; empty: nowhere.
        drives: Whether this process will be the driver; only on its machine does it matter whether a port is free.
        is_patient: Wait for store, port and cluster as long as the run itself would, instead of a few seconds. For
            drivers that nobody has typed.

    Raises:
        UserError: The first thing that is wrong: URL, credentials, data set, batch arithmetic, port.
    """
    if not recipe.data:
        raise RecipeError("data", "must be the URL of a data set", "", "make one with `convmae shard SOURCE URL`")
    run = session.run(name, recipe.run_root)
    recipe = _with_found_size(run, recipe)
    check_trackers(recipe, session.environ, drives=drives or session.is_local)
    Webhook.of(recipe.to_json(), session.environ, run)
    patience_seconds = run.storage.retry_seconds if is_patient else 0.0
    session.storage.check(recipe.data, write=False, is_patient=is_patient)
    manifest = Manifest.load(session.storage, recipe.data)
    recipe = _with_pixels(recipe, manifest)
    _check_capacity(session, recipe)
    if drives or session.is_local:
        persevere(lambda: _check_port(recipe.metrics_port), PortTakenError, patience_seconds)
    session.storage.check(run.url, write=True, exclusive=True, is_patient=is_patient)
    session.remember_run_root(run.root)
    recipe, samples = _with_labels(session.storage, recipe, run, manifest.samples)
    order = order_of(recipe, samples)
    if not manifest.kind.is_photographic:  # a share of the largest value means something else in other data
        recipe = _with_statistics(recipe, run, manifest)
    recipe = _with_statistics(pinned(session.storage, recipe, run), run, manifest)
    recipe = begun_way(run, recipe)
    run.check_recipe(recipe)
    if trace_url:
        trace_url = normal(trace_url)
        check_trace(session.storage, trace_url, run.url)
    first_tars = _first_tars(session.storage, recipe, manifest)
    schedule = Schedule.of(recipe, order.steps_per_epoch)
    probes, note = planned_probes(session.storage, recipe, schedule, is_known=_has_probe_fields(run, recipe))
    return RunPlan(recipe, run, schedule, trace_url, patience_seconds, first_tars, probes, note)


def _with_found_size(run: RunDirectory, recipe: Recipe) -> Recipe:
    """The recipe, with the micro-batch that was found when its run began, if it leaves that to be found."""
    if recipe.micro_batch_size or not run.exists():
        return recipe
    return recipe.amended({"micro_batch_size": run.read_recipe().micro_batch_size})


def _first_tars(storage: Storage, recipe: Recipe, manifest: Manifest) -> dict[str, str]:
    """URL of a tar of each data set that ranks read, by its field; `manifest` is that of `data`."""
    datasets = rank_datasets(recipe)
    manifests = {name: manifest if name == "data" else Manifest.load(storage, url) for name, url in datasets.items()}
    return {name: next(iter(found.shards)).tar_url(datasets[name]) for name, found in manifests.items() if found.shards}


def _has_probe_fields(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether the run has begun with the same fields of probes, which were found good then."""
    return run.exists() and all(
        getattr(run.read_recipe(), field) == getattr(recipe, field) for field in ("probe_data", "probe_labels")
    )


def _with_labels(storage: Storage, recipe: Recipe, run: RunDirectory, samples: int) -> tuple[Recipe, int]:
    """The recipe with the classes and labels of a fine-tuning, and how many samples it trains with.

    Raises:
        EvaluationError: They cannot be trained with, or are not those that the run began with.
    """
    if recipe.finetune is None:
        return recipe, samples
    if recipe.finetune.validation_data:
        storage.check(recipe.finetune.validation_data, write=False)
    if run.exists() and (began := run.read_recipe().finetune):
        given = {"finetune.classes": list(began.classes), "finetune.samples_sha256": began.samples_sha256}
        recipe = recipe.amended(given)
    labels = TrainingLabels.of(storage, recipe)
    return labels.pinned(recipe), len(labels.train)


def _with_pixels(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with a model for images as the data set has them.

    Raises:
        RecipeError: The model is for images of other channels; or what they are normalised by is, or how they are
            augmented.
    """
    given, kind = recipe.model.in_channels, manifest.kind
    if given not in (kind.channels, RGB_CHANNELS):
        remedy = "make the data set with --gray or --bands, or leave the field out"
        raise RecipeError("model.in_channels", f"must be the data set's {kind.channels}", given, remedy)
    if (given, recipe.image_bits) == (kind.channels, kind.bits):
        return recipe
    return recipe.amended({"model.in_channels": kind.channels, "image_bits": kind.bits})


def _with_statistics(recipe: Recipe, run: RunDirectory, manifest: Manifest) -> Recipe:
    """The recipe with what images are normalised by: an existing run keeps what it began with."""
    if run.exists():
        return recipe.with_statistics(*run.read_recipe().statistics)
    return recipe.with_statistics(*recorded_statistics(manifest))


def begun_way(run: RunDirectory, recipe: Recipe) -> Recipe:
    """The recipe, as it was meant before there were grains if its run was begun then."""
    older = recipe.as_begun_before()
    return older if run.exists() and run.read_recipe().trajectory() == older.trajectory() else recipe


def check_folders(plan: RunPlan, lease: Lease) -> None:
    """Refuse folders on local disks that some node of the connected cluster which may have ranks does not see.

    Raises:
        NotSharedError: Names the nodes.
    """
    recipe, storage = plan.recipe, plan.run.storage
    kind, least = ("GPU", 1.0) if recipe.device == "cuda" else ("CPU", recipe.cpus_per_worker)
    with planted(storage, "trace", plan.trace_url) as trace:
        inputs = input_landmarks(storage, recipe, plan.first_tars)
        landmarks = (*run_landmarks(recipe, plan.run, lease), *inputs, *trace)
        check_seen_by_all(storage, landmarks, lambda resources: resources.get(kind, 0.0) >= least)


def _check_capacity(session: Session, recipe: Recipe) -> None:
    """Refuse what the local stack could never start; a cluster may still grow, so there a run waits."""
    if not session.is_local or session.stack is None:
        return
    if recipe.device == "cuda" and not torch.cuda.is_available():
        remedy = "set device=cpu precision=fp32, or submit to a cluster with RAY_ADDRESS"
        raise RecipeError("device", "must be cpu on a machine without a GPU", recipe.device, remedy)
    cpus = session.stack.settings.num_cpus or os.cpu_count() or 1
    if recipe.min_workers * recipe.cpus_per_worker > cpus:
        rule = f"must fit the local stack's {cpus} CPUs with min_workers = {recipe.min_workers}"
        remedy = f"set cpus_per_worker={cpus / recipe.min_workers:g} or less, or `convmae up --cpus N`"
        raise RecipeError("cpus_per_worker", rule, recipe.cpus_per_worker, remedy)


def _check_port(port: int) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise PortTakenError.of(port, error) from error
