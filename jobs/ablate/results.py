"""Results of an ablation as plain values, from the directories of its runs; tables and page are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from jobs.ablate.measurement import Measurement
from jobs.ablate.spec import Spec, Trial
from jobs.ablate.statistics import Comparison, Seeded, compared
from jobs.errors import RunError
from jobs.report.run_figures import RunFigures
from jobs.run.directory import RunDirectory
from jobs.run.evaluations import accuracies

FORMAT_VERSION = 1


def collected(spec: Spec, runs: Mapping[Trial, RunDirectory], measurement: Measurement) -> dict[str, Any]:
    """All that is known of the runs now.

    Args:
        spec: The ablation.
        runs: The directory of each trial's run, whether it exists or not.
        measurement: Finds their evaluations.
    """
    return {
        "format_version": FORMAT_VERSION,
        "name": spec.name,
        "title": spec.file.title or spec.name,
        "seeds": list(spec.file.seeds),
        "evaluation": spec.file.evaluation.model_dump(mode="json"),
        "variants": [
            {
                "name": variant.name,
                "base": variant.base,
                "changes": dict(variant.changes),
                "runs": [
                    _run_json(trial, runs[trial], measurement) for trial in spec.trials if trial.variant is variant
                ],
            }
            for variant in spec.variants
        ],
        "paper": [figure.model_dump(mode="json") for figure in spec.file.paper],
        "statements": [_statement_json(one) for one in _compared(spec, runs, measurement)],
    }


def _run_json(trial: Trial, run: RunDirectory, measurement: Measurement) -> dict[str, Any]:
    known: dict[str, Any] = {"run": run.name, "url": run.url, "seed": trial.seed, "state": "not started"}
    if not run.exists():
        return known
    figures = asdict(RunFigures.read(run, trial.recipe))
    return known | figures | _accuracies(trial, run, measurement)


def _accuracies(trial: Trial, run: RunDirectory, measurement: Measurement) -> dict[str, Any]:
    report = measurement.of_run(trial, run)
    control = measurement.of_control(trial) if report else None
    return {
        "accuracies": accuracies(report) if report else {},
        "random": accuracies(control) if control else {},
        "test_samples": report["test"]["samples"] if report else None,
    }


def _compared(
    spec: Spec, runs: Mapping[Trial, RunDirectory], measurement: Measurement
) -> Iterator[tuple[str, Comparison]]:
    """Each statement beside each measure of ours."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for trial in spec.trials:
        report = measurement.of_run(trial, runs[trial]) if runs[trial].exists() else None
        for measure, value in (accuracies(report) if report else {}).items():
            found.setdefault(measure, {}).setdefault(trial.variant.name, {})[trial.seed] = value
    for statement in spec.file.statements:
        for measure, figures in (found or {"": {}}).items():
            seeded: Mapping[str, Seeded] = figures
            yield measure, compared(statement, seeded)


def _statement_json(one: tuple[str, Comparison]) -> dict[str, Any]:
    measure, comparison = one
    statement = comparison.statement
    return {
        "text": statement.text,
        "source": statement.source,
        "measure": measure,
        "verdict": comparison.verdict,
        "figures": comparison.figures,
    }


def missing_data(spec: Spec) -> RunError | None:
    """The error where a trial has no dataset."""
    trial = next((trial for trial in spec.trials if not trial.recipe.data), None)
    if trial is None:
        return None
    return RunError("data", "must be the URL of a dataset", "", f"add data=URL: convmae ablate {spec.name} data=URL")
