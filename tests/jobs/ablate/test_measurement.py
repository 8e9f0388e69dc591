"""How an ablation measures: what it refuses, and random weights once for all variants that begin with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_data import STORAGE, labelled_dataset

from jobs.ablate.measurement import Measurement
from jobs.ablate.spec import Spec, Trial
from jobs.errors import EvaluationError

SPEC = """
base = "tiny"
seeds = [0, 1]
[recipe]
model.image_size = 32
model.depth = [1, 1, 1]
[grid]
{grid}
[evaluation]
k = [3]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labelled_dataset(tmp_path_factory.mktemp("labelled"), {"ant": 8, "bee": 8}).url


def controls(folder: Path, data: str, grid: str) -> dict[str, str]:
    """Where the control of each run is kept."""
    (folder / "study.toml").write_text(SPEC.format(grid=grid))
    spec = Spec.load(str(folder / "study.toml"), [f"data={data}"])
    measurement = Measurement(STORAGE, spec.file.evaluation, str(folder))

    def key(trial: Trial) -> str:
        return measurement._control_key(trial)

    return {trial.run_name.removeprefix("study-"): key(trial) for trial in spec.trials}


def test_variants_of_one_encoder_share_controls(tmp_path: Path, data: str) -> None:
    found = controls(tmp_path, data, 'model.masking = ["block", "random"]\nmodel.loss = ["l1", "mse"]')

    assert len(found) == 8
    for seed in (0, 1):
        assert len({key for name, key in found.items() if name.endswith(f"seed{seed}")}) == 1
    assert len(set(found.values())) == 2


def test_variants_of_other_encoders_have_controls_of_their_own(tmp_path: Path, data: str) -> None:
    assert len(set(controls(tmp_path, data, "model.kernel_size = [5, 7]").values())) == 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("evaluation.labels={}/none.txt", "evaluation.labels: must exist"),
        ("evaluation.train_labels={}/none.txt", "evaluation.train_labels: must be given with evaluation.train_data"),
        ("evaluation.train_data={}/bare/data", "evaluation.train_data: must have labels.*with evaluation.train_labels"),
        ("evaluation.test_ratio=0.001", "evaluation.data: .*a larger evaluation.test_ratio, or a second dataset with"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_the_keys_of_the_spec(tmp_path: Path, given: str, told: str) -> None:
    data = labelled_dataset(tmp_path / "data", {"cat": 12, "dog": 12}).url
    labelled_dataset(tmp_path / "bare", {"cat": 2, "dog": 2}, has_labels=False)
    spec = Spec.load("kernel_small", [f"data={data}", given.format(tmp_path)])

    with pytest.raises(EvaluationError, match=f"^{told}") as caught:
        Measurement(STORAGE, spec.file.evaluation, str(tmp_path)).check(spec.trials[0])
    assert "--" not in str(caught.value), "options are those of another command"
