"""What a run is probed on, found good before the run begins, and after which steps."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.errors import EvaluationError, RecipeError
from jobs.evaluate.knn import NEIGHBOURS
from jobs.probes.run_probe import ProbedData, ProbedWeights, probe_samples
from jobs.recipe.recipe import Recipe
from jobs.recipe.schedule import Schedule
from jobs.weights.weight_files import model_json
from pipeline.errors import UserError
from pipeline.load.dataset import Dataset
from pipeline.shard.index import NO_LABEL
from pipeline.store.storage import Storage

LEAST_SAMPLES = max(NEIGHBOURS)


@dataclass(frozen=True)
class RunProbes:
    """How a run is probed."""

    data: ProbedData
    plan: str
    """Digest of the samples; empty where they could not be read yet."""
    recipe: Recipe
    schedule: Schedule

    @property
    def control(self) -> ProbedWeights:
        """The weights before the first step."""
        recipe = self.recipe
        return ProbedWeights(recipe.init_from, model_json(recipe.model), recipe.seed, *recipe.statistics)

    def is_due(self, step: int, *, is_milestone: bool) -> bool:
        """Whether the weights after `step` steps are probed."""
        is_last = step == self.schedule.total_steps
        return is_milestone or is_last or self.schedule.is_probe_epoch(step, self.recipe)

    def epoch(self, step: int) -> int:
        """Epochs finished, as in a commit."""
        return step // self.schedule.steps_per_epoch


def planned_probes(
    storage: Storage, recipe: Recipe, schedule: Schedule, *, is_known: bool = False
) -> tuple[RunProbes | None, str]:
    """How a run is to be probed; None where it is not, with the reason if that may surprise.

    Args:
        storage: Reaches the labelled data.
        recipe: Of the run.
        schedule: Of the run.
        is_known: Whether the run began with these fields. Then a fault is reported with each probe: it must not keep
            a run from being resumed.

    Raises:
        UserError: `probe_data` or `probe_labels` cannot be used: no dataset, no labels, one class, too few samples.
    """
    if not recipe.is_probed:
        return None, ""
    data = ProbedData(recipe.probe_data or recipe.data, recipe.probe_labels, recipe.probe_samples)
    is_named = bool(recipe.probe_data or recipe.probe_labels)
    try:
        if not is_named and not _may_have_labels(storage, recipe.data):
            return None, _note("the images of data have no labels, or all the same")
        if recipe.probe_data and not is_known:
            storage.check(recipe.probe_data, write=False)
        return RunProbes(data, _plan(storage, data), recipe, schedule), ""
    except (UserError, OSError) as error:
        if is_named and not is_known:
            raise
        return (RunProbes(data, "", recipe, schedule), "") if is_named else (None, _note(str(error)))


def _note(why: str) -> str:
    return f"no accuracies will be measured: {why}. probe_data=URL names a labelled data set"


def _may_have_labels(storage: Storage, url: str) -> bool:
    """By the names of its classes, or one of its indexes: a dataset without labels may have very many."""
    dataset = Dataset.open(storage, url)
    if dataset.manifest.classes or not len(dataset.manifest.shards):
        return len(dataset.manifest.classes) > 1
    return bool((dataset.index(0).table["label"] != NO_LABEL).any())


def _plan(storage: Storage, data: ProbedData) -> str:
    try:
        return probe_samples(storage, data).digest
    except EvaluationError as error:
        if error.field not in ("--k", "train", "test"):
            raise
        rule = f"must leave at least {LEAST_SAMPLES} samples to learn from, and two classes on either side"
        raise RecipeError("probe_data", rule, "fewer", "give more labelled samples, or probes=false") from None
