"""A history in columns gives the rows back that it was made of."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.errors import RunError
from jobs.run.rows import LARGEST, checked
from jobs.run.step_table import COLUMNS, LONGEST_TEXT, StepTable

ROW = {"step": 1, "epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
WHOLE = st.integers(1 - LARGEST, LARGEST - 1)
NUMBERS = st.one_of(st.floats(1 - LARGEST, LARGEST - 1), WHOLE)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["\0", "a\0", "\ud800", "x" * (LONGEST_TEXT + 1), "64-8c1f03b2"])
)
RATIOS = st.floats(0, 1)
ROWS = st.fixed_dictionaries(
    {
        "step": WHOLE, "epoch": WHOLE, "loss": st.none() | NUMBERS, "learning_rate": NUMBERS, "world_size": WHOLE,
        "attempt": WHOLE,
    },
    optional={
        "samples": TEXTS, "substitutions": WHOLE, "step_seconds": NUMBERS, "data_wait_seconds": NUMBERS,
        "skipped": TEXTS, "digest": TEXTS, "validation_top5": RATIOS, "validation_plan": TEXTS,
        "validation_samples": st.integers(1, LARGEST - 1),
        "of_another_release": st.one_of(st.none(), st.booleans(), TEXTS, st.lists(WHOLE), st.just({"a": [None]})),
    },
)  # fmt: skip


def exactly(rows: Any) -> str:
    """Values with their types, since 1 == 1.0 == True; whatever the order of fields."""
    return json.dumps(list(rows), sort_keys=True)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(ROWS, max_size=4), min_size=1, max_size=3))
def test_rows_come_back_as_they_were_also_from_files_that_are_joined(parts: list[list[dict[str, Any]]]) -> None:
    rows = [checked("history", row, "here") for part in parts for row in part]
    assert exactly(StepTable.of(rows).rows()) == exactly(rows)

    joined = StepTable.joined([StepTable.of(part) for part in parts])
    data = joined.to_npz()

    assert exactly(StepTable.of_npz(data, len(rows), "here").rows()) == exactly(rows)
    some = StepTable.of_npz(data, len(rows), "here", ("step", "loss", "attempt"))
    assert exactly(some.numbers("loss").tolist()) == exactly(StepTable.of(rows).numbers("loss").tolist())
    odd = np.arange(len(rows)) % 2 == 1
    assert exactly(joined.where(odd).rows()) == exactly(rows[1::2])
    assert exactly(joined.slice(1, 3).rows()) == exactly(rows[1:4])


def test_columns_are_as_this_release_writes_rows() -> None:
    row = {**ROW, "samples": "64-8c1f03b2", "substitutions": 0, "step_seconds": 0.5, "data_wait_seconds": 0.0}

    (found,) = StepTable.of([row]).rows()

    assert list(found) == list(row)
    assert list(COLUMNS)[: len(row)] == list(row)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"loss": np.array([np.inf])}, "give loss as a number"),
        ({"step": np.array([2**60])}, "give step as a number"),
        ({"step": np.array([1.0])}, "give step as one value a row"),
        ({"step": np.array([1, 2])}, "give step as one value a row"),
        ({"loss": np.array([[0.5]])}, "give loss as one value a row"),
        ({"attempt": np.array([np.iinfo(np.int64).min])}, "give attempt in every row"),
        ({"samples": np.array([1])}, "give samples as one value a row"),
        ({"samples": np.array([b"x" * 100_000])}, "longer than 1 rows"),
        ({"samples": np.array(["text"], object)}, "must be an .npz file"),
        ({"validation_top1": np.array([1.5])}, "give validation_top1 as a number from 0 to 1"),
        ({"validation_top1": np.array([0.5])}, "must give validation_samples"),
        ({"validation_top1": np.array([0.5]), "validation_samples": np.array([0])}, "give validation_samples"),
        ({"digest": np.array([b"a", b"b"])}, "give digest as one value a row"),
        ({"rest_places": np.array([7]), "rest_lines": np.frombuffer(b"{}", np.uint8)}, "further fields of its rows"),
        ({"rest_places": np.array([0]), "rest_lines": np.frombuffer(b"{", np.uint8)}, "must hold JSON"),
        ({"rest_places": np.array([0, 1]), "rest_lines": np.frombuffer(b"{}", np.uint8)}, "must be an .npz file"),
        ({"rest_places": np.array([0]), "rest_lines": np.frombuffer(b'{"step": ""}', np.uint8)}, "give step as an int"),
    ],
)  # fmt: skip
def test_a_file_of_other_values_is_refused_by_name(changed: dict[str, Any], rule: str) -> None:
    columns = StepTable.of([ROW]).columns
    data = io.BytesIO()
    np.savez_compressed(data, **{**columns, "validation_samples": np.array([5]), "validation_top1": np.array([0.5])})
    assert len(StepTable.of_npz(data.getvalue(), 1, "there/file.npz")) == 1

    data = io.BytesIO()
    np.savez_compressed(data, **{**columns, **changed})
    with pytest.raises(RunError, match=rule) as refused:
        StepTable.of_npz(data.getvalue(), 1, "there/file.npz")
    assert "there/file.npz" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"PK", b"{}", b"\x93NUMPY"])
def test_what_is_no_file_of_columns_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(RunError, match=r"there/file\.npz"):
        StepTable.of_npz(data, 1, "there/file.npz")


@pytest.mark.parametrize("name", ["step", "loss", "attempt"])
def test_a_file_without_a_column_that_every_row_has_is_refused(name: str) -> None:
    columns = {each: column for each, column in StepTable.of([ROW]).columns.items() if each != name}

    with pytest.raises(RunError, match=f"give {name} in every row"):
        StepTable.of_npz(StepTable(1, columns).to_npz(), 1, "there/file.npz")
