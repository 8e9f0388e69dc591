from __future__ import annotations

from pathlib import Path

import pytest
from labelled_data import STORAGE, labelled_dataset

from jobs.ablate.measurement import Measurement
from jobs.ablate.spec import Spec
from jobs.errors import EvaluationError


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
