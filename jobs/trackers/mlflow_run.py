"""A run in MLflow, by its client: figures, notes and how far they reach go to the server in one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.trackers.tracker import Point, TrackedRun

RUN_TAG = "convmae.run"
"""By which a run is found again: its id in the run directory."""
STEP_TAG = "convmae.step"
"""Up to where its figures are there. Written with them, so that none is sent twice, whoever dies when."""
STATE_TAG = "convmae.state"
NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as a run's description."""
EXPERIMENT = "convmae"
"""Unless MLFLOW_EXPERIMENT_NAME names another."""
_MOST_PARAMS = 100
_MOST_CHARACTERS = 6000
"""Of a parameter's value."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun:
    """One run of an MLflow server, or of a local store of MLflow's."""

    def __init__(self, run: TrackedRun) -> None:
        """Find the run by its tag, or create it."""
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=run.environ["MLFLOW_TRACKING_URI"])
        experiment = self._experiment(run.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
        known = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'")
        tags = {RUN_TAG: run.id, "convmae.directory": run.directory.url}
        found = known[0] if known else self._client.create_run(experiment, tags=tags, run_name=run.directory.name)
        self._id = found.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self.last_step: int | None = int(found.data.tags.get(STEP_TAG, 0))
        self._send_recipe(run.recipe, found.data.params)

    def send(self, points: Sequence[Point], last_step: int, log: str) -> None:
        """One request."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, value, int(1000 * point.at_seconds), point.step)
            for point in points
            for name, value in point.figures.items()
        ]
        tags = [RunTag(STEP_TAG, str(last_step)), *([RunTag(NOTE_TAG, log)] if log else [])]
        self._client.log_batch(self._id, metrics=metrics, tags=tags)

    def end(self, outcome: str) -> None:
        """Note the outcome as the run's status; a run that is resumed is `RUNNING` again."""
        self._client.set_tag(self._id, STATE_TAG, outcome)
        self._client.set_terminated(self._id, _STATUS[outcome])

    def leave(self) -> None:
        """Nothing is held."""

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if known := self._client.get_experiment_by_name(name):
            return str(known.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another run has created it meanwhile
            if known := self._client.get_experiment_by_name(name):
                return str(known.experiment_id)
            raise

    def _send_recipe(self, recipe: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Parameters never change in MLflow: a field that is another now, as placement fields may be, is a tag."""
        from mlflow.entities import Param, RunTag

        values = {name: str(value)[:_MOST_CHARACTERS] for name, value in recipe.items()}
        params = [Param(name, value) for name, value in values.items() if name not in known]
        tags = [RunTag(f"recipe.{name}", value) for name, value in values.items() if known.get(name, value) != value]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MOST_PARAMS])
        if tags:
            self._client.log_batch(self._id, tags=tags)
