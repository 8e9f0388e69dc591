"""`convmae ablate`, with its output: plan, runs, evaluations, tables."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.ablate.ablation_page import ablation_html
from jobs.ablate.cluster_runs import ClusterRuns, stop_all
from jobs.ablate.estimate import PLAN_COLUMNS, estimates, plan_rows, total_text
from jobs.ablate.measurement import Measurement
from jobs.ablate.results import collected, missing_data
from jobs.ablate.schedule import TICK_SECONDS, Schedule
from jobs.ablate.spec import Spec, Trial
from jobs.ablate.table import csv_text, markdown, narrow_tables, statement_lines
from jobs.cluster import submission
from jobs.cluster.session import Session
from jobs.control.run_plan import plan_run
from jobs.errors import AblationError, RunFailedError
from jobs.run.directory import STOP_REQUEST_NAME, RunDirectory
from jobs.terminal import print_json, print_table, progress_bar, say
from pipeline.errors import LeaseHeldError
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage

FOLDER = ".ablations"
"""In the run root; no run can have its name."""


@dataclass(frozen=True)
class Ablation:
    """A spec, and where its runs and results are."""

    session: Session
    spec: Spec
    root: str
    words: str
    """With which the command was typed, for what to type next."""

    @property
    def folder(self) -> str:
        """Of its results."""
        return Storage.join(self.root, FOLDER, self.spec.name)

    @property
    def runs(self) -> dict[Trial, RunDirectory]:
        """The directory of each trial's run."""
        return {trial: RunDirectory.of(self.session.storage, self.root, trial.run_name) for trial in self.spec.trials}

    @property
    def measurement(self) -> Measurement:
        """How its runs are measured."""
        return Measurement(self.session.storage, self.spec.file.evaluation, self.folder)


def opened(session: Session, word: str, overrides: list[str]) -> Ablation:
    """An ablation as it was typed; its recipes are valid, nothing is looked up.

    Raises:
        UserError: A fault of the spec, or no run root is known.
    """
    spec = Spec.load(word, overrides)
    roots = {session.run_root(trial.recipe.run_root) for trial in spec.trials}
    if len(roots) > 1:
        raise AblationError("run_root", "must be one for all variants", sorted(roots), "leave it out of the spec")
    return Ablation(session, spec, roots.pop(), shlex.join(["convmae", "ablate", word, *overrides]))


def show_plan(storage: Storage, word: str, overrides: list[str], *, as_json: bool) -> None:
    """Print the runs of a spec and what they cost; starts nothing."""
    spec = Spec.load(word, overrides)
    found = estimates(storage, spec)
    if as_json:
        print_json(
            [
                {"run": trial.run_name, "variant": trial.variant.name, "seed": trial.seed, "steps": one.steps,
                 "seconds": one.seconds, "hours": one.hours, "unit": one.unit}
                for trial, one in found.items()
            ]
        )  # fmt: skip
        return
    say(f"{spec.name}: {spec.file.title or spec.name}")
    print_table(PLAN_COLUMNS, plan_rows(found))
    say(total_text(found))


def train_and_say(ablation: Ablation, *, at_most: int, as_json: bool) -> None:
    """Submit what is left, follow all runs, evaluate what has finished, and write the table.

    Raises:
        UserError: Bad input, found before the first run is submitted.
        RunFailedError: Runs are missing at the end; names them.
    """
    session, spec = ablation.session, ablation.spec
    if fault := missing_data(spec):
        raise fault
    session.storage.check(ablation.root, write=True)
    submission.job_client(session)  # a cluster that does not answer is found at once
    try:
        with hold_lease(session.storage, ablation.folder, "convmae ablate", on_wait=_say_wait):
            schedule = _trained(ablation, at_most, quiet=as_json)
    except LeaseHeldError as error:
        remedy = "that command follows the runs; `--table` shows how far they have come"
        raise AblationError("spec", error.rule, spec.name, remedy) from None
    write_and_say(ablation, as_json=as_json)
    if schedule.faults:
        lines = (f"{name}: {reason}" for name, reason in schedule.faults.items())
        raise RunFailedError("\n".join([f"{len(schedule.faults)} of {len(spec.trials)} runs are missing", *lines]))


def _say_wait(other: str) -> None:
    say(f"is {other} alive? watching its lease")


def _trained(ablation: Ablation, at_most: int, *, quiet: bool) -> Schedule:
    session, measurement = ablation.session, ablation.measurement
    plans = {trial: plan_run(session, trial.recipe, trial.run_name, drives=False) for trial in ablation.spec.trials}
    for trial in plans:
        measurement.check(trial)
    session.connect()
    runs = ClusterRuns(session, plans, ablation.folder)
    session.storage.delete(Storage.join(ablation.folder, STOP_REQUEST_NAME))
    schedule = Schedule(
        runs,
        lambda trial: measurement.make(session, trial, plans[trial].run),
        (lambda _: None) if quiet else say,
        at_most,
    )
    order = sorted(plans, key=lambda trial: ablation.spec.file.seeds.index(trial.seed))  # each variant once, first
    try:
        _follow(schedule, runs, order, quiet=quiet)
    except KeyboardInterrupt:
        names = ", ".join(trial.run_name for trial in schedule.running) or "none"
        say(f"still running: {names}; the same command follows them, `{ablation.words} --stop` stops them")
        raise
    return schedule


def _follow(schedule: Schedule, runs: ClusterRuns, order: list[Trial], *, quiet: bool) -> None:
    schedule.look(order)
    if quiet:
        while not schedule.is_over:
            schedule.tick()
            time.sleep(TICK_SECONDS)
        return
    with progress_bar("runs") as show:
        while not schedule.is_over:
            schedule.tick()
            runs.show(len(schedule.done), list(schedule.running), show)
            time.sleep(TICK_SECONDS)


def write_and_say(ablation: Ablation, *, as_json: bool) -> None:
    """Write the results of what there is now, and print the tables."""
    storage = ablation.session.storage
    storage.check(ablation.root, write=True)
    if fault := missing_data(ablation.spec):
        raise fault
    results = collected(ablation.spec, ablation.runs, ablation.measurement)
    files = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "table.md": markdown(results),
        "runs.csv": csv_text(results),
        "ablation.html": ablation_html(json.loads(json.dumps(results))),
    }
    for name, text in files.items():
        storage.write(Storage.join(ablation.folder, name), text.encode())
    if as_json:
        print_json(results)
        return
    for head, body in narrow_tables(results):
        print_table(head, body)
    for line in statement_lines(results):
        say(line)
    for url in _copied(ablation, files):
        say(url)


def _copied(ablation: Ablation, files: Mapping[str, str]) -> list[str]:
    """Where people find the files: on the local stack in its folder, since its store is opened by no browser."""
    session: Any = ablation.session
    if not session.is_on_stack:
        return [Storage.join(ablation.folder, name) for name in files]
    folder = session.home / "results" / ablation.spec.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return [str(folder / name) for name in files]


def stop_and_say(ablation: Ablation) -> None:
    """Stop all runs that are at work, and say which."""
    asked = stop_all(ablation.session, list(ablation.runs.values()), ablation.folder)
    for run in asked:
        now = run.read_heartbeat()
        say(f"{run.name}: {now.get('state', 'ended before it began')} at step {now.get('step', 0)}")
    say(f"{len(asked)} runs were stopped; `{ablation.words}` resumes them")
