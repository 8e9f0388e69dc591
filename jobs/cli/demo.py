"""The demonstration: the main job on one machine, `make pretrain`. Each step prints the command that does the same."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.cluster import submission
from jobs.cluster.session import Session, home_folder
from jobs.control.lease import is_live
from jobs.control.run_plan import RunPlan, plan_run
from jobs.control.workflow import follow_job, say_outcome, train_as_job
from jobs.data.datasets import shard_and_say
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.run.probe_rows import MAIN_PROBE, ProbeCurve
from jobs.stack import local_stack
from jobs.terminal import say
from pipeline.ingest.photographs import PHOTOGRAPHS, cut_tiles
from pipeline.ingest.plan import Ingest, Sharding
from pipeline.ingest.sources import find_sources
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

TILES = 1024
SAMPLES_PER_SHARD = 256
SEED = 0
SHARDING = Sharding(SAMPLES_PER_SHARD, seed=SEED)
STEPS = 400
"""About three and a half minutes of training on two cores."""
PROBES = 5
"""About so many while it trains."""
PROBE_SAMPLES = 2000


def run_demo(environ: Mapping[str, str], images: str) -> None:
    """From photographs to a report; when it is run again, it resumes, or says that everything is done.

    Args:
        environ: Names the local stack's folder; other clusters and object stores in it are not used.
        images: Folder of photographs; empty for those that come with Python packages.
    """
    home = home_folder(environ)
    run_name, source = run_and_source(images, home)
    say("$ convmae up")
    local_stack.up(home, on_event=say)
    session = Session.open(
        {key: value for key, value in environ.items() if not key.startswith(("AWS_", "RAY_", "CONVMAE_S3_"))}
    )
    session.export()

    data = f"s3://convmae/datasets/{run_name}"
    say("")
    say(f"$ convmae shard {source} {data} --samples-per-shard {SAMPLES_PER_SHARD}")
    if not images:
        say(f"photographs: {', '.join(photograph.name for photograph in PHOTOGRAPHS)}, cut into {TILES} images")
        cut_tiles(source, TILES, SEED)
    manifest = shard_and_say(session, str(source), data, SHARDING)

    overrides = {"data": data, **length_fields(manifest)}
    arguments = " ".join(shlex.quote(f"{field}={value}") for field, value in overrides.items())
    say("")
    say(f"$ convmae submit tiny {arguments} --run {run_name} --follow")
    plan = plan_run(session, named_recipe("tiny").amended(overrides), run_name)
    if plan.run.exists() and is_live(plan.run) and (job := submission.newest_job(session, plan.run)):
        say(f"{run_name} is running already: {job}")
        say_outcome(plan.run, follow_job(session, plan.run, job))
    else:
        train_as_job(session, plan, follow=True)
    if plan.run.read_heartbeat().get("state") != "finished":  # it was stopped
        say("the same command resumes it")
        return
    _show_results(plan.run, home / "results" / run_name, session)
    say(accuracy_line(ProbeCurve.of(plan.run.read_events()), plan))


def run_and_source(images: str, home: Path) -> tuple[str, Path]:
    """The run's name and the folder of its photographs. Other photographs make another run.

    Raises:
        SourceError: If there are none; nothing was started.
    """
    if not images:
        return "demo", home / "photographs"
    folder = Path(images).expanduser().resolve()
    job = Ingest(find_sources(Storage(), str(folder)), SHARDING)
    slug = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:40]
    return f"demo-{slug}-{job.digest[:6]}", folder


def length_fields(manifest: Manifest) -> dict[str, Any]:
    """Fields that make the run about `STEPS` long on any data set, with early milestones for the picture."""
    recipe = named_recipe("tiny")
    batch = min(recipe.global_batch_size, manifest.samples // recipe.lanes * recipe.lanes)
    steps_per_epoch = max(1, manifest.samples // max(1, batch))
    epochs = math.ceil(STEPS / steps_per_epoch)
    fields: dict[str, Any] = {"epochs": epochs, "warmup_epochs": epochs / 20}
    fields |= {"probe_epochs": max(1, epochs // PROBES), "probe_samples": PROBE_SAMPLES}
    if milestones := sorted({epoch for epoch in (1, epochs // 5) if 0 < epoch < epochs}):
        fields["milestone_epochs"] = milestones
    if epochs * steps_per_epoch > 2 * STEPS:
        fields["max_steps"] = STEPS
    if 0 < batch < recipe.global_batch_size:
        fields["global_batch_size"] = batch
    return fields


def _show_results(run: RunDirectory, folder: Path, session: Session) -> None:
    """Copy the results that people look at from the object store, and say where everything is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "reconstructions.png"):
        run.storage.download(run.path(name), folder / name)
    weights = [name for name in run.storage.list_names(run.path("consolidated")) if name.endswith(".safetensors")]
    run.storage.download(run.path("consolidated", weights[-1]), folder / "convmae.safetensors")
    assert session.stack
    say("")
    say(f"report           {folder / 'report.html'}")
    say(f"reconstructions  {folder / 'reconstructions.png'}")
    say(f"weights          {folder / 'convmae.safetensors'}")
    say(f"run directory    {run.url} (S3 at {session.stack.endpoint})")
    say(f"Ray dashboard    {session.stack.dashboard_url}")
    if session.stack.prometheus_url:
        say(f"Prometheus       {session.stack.prometheus_url}")
    command = own_command(Path(sys.argv[0]).absolute(), Path.cwd())
    say(f"next             {command} status {run.name}, {command} history {run.name}, {command} down")


def accuracy_line(curve: ProbeCurve, plan: RunPlan) -> str:
    """What the encoder has learned: its accuracy beside that of random weights."""
    if curve.newest and curve.control:
        accuracies = (row.accuracies[MAIN_PROBE] for row in (curve.newest, curve.control))
        return "kNN accuracy {:.1%} (random weights {:.1%})".format(*accuracies).replace("%", " %")
    why = plan.probe_note or f"this run was not probed; `convmae evaluate {plan.run.name} --data URL` measures it"
    return f"kNN accuracy unknown: {why}"


def own_command(executable: Path, folder: Path) -> str:
    """How to type this command in `folder`: by its relative path if it lies below, as in a clone's `.venv`."""
    return str(executable.relative_to(folder)) if executable.is_relative_to(folder) else executable.name
