"""Steps that are decoded a block at a time, out of several files, are those that were written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import RunError
from jobs.run.step_table import StepTable
from jobs.run.stored_steps import PackedSteps, StepFile, StoredSteps

ROW = {"epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}


def files_of(parts: list[tuple[bool, list[dict[str, Any]]]]) -> list[StepFile]:
    """A file of each part, compacted or not."""
    tables = [(is_compacted, StepTable.of(rows)) for is_compacted, rows in parts]
    return [PackedSteps(table.to_npz(), len(table), "there") if packed else table for packed, table in tables]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=6)), max_size=6),
    st.integers(1, 8),
)
def test_the_last_row_of_a_step_counts_in_whichever_file_and_block(
    parts: list[tuple[bool, list[int]]], block_rows: int
) -> None:
    rows = [
        {"step": step, **ROW, "loss": float(place), **({"note": place} if place % 3 else {"digest": f"{place:x}"})}
        for place, step in enumerate(step for _, steps in parts for step in steps)
    ]
    left = iter(rows)
    stored = StoredSteps.of(files_of([(packed, [next(left) for _ in steps]) for packed, steps in parts]))
    last = {row["step"]: row for row in rows}
    expected = [last[step] for step in sorted(last)]

    latest = stored.latest()
    blocks = list(latest.blocks(block_rows))

    assert [row for block in blocks for row in block.rows()] == expected
    assert all(len(block) == block_rows for block in blocks[:-1])
    assert list(stored.rows()) == rows
    assert stored.superseded().tolist() == [last[row["step"]] is not row for row in rows]
    assert latest.numbers("loss").tolist() == [row["loss"] for row in expected]
    assert np.isnan(latest.numbers("step_seconds")).all() and len(latest.numbers("step_seconds")) == len(expected)
    assert list(latest.where(latest.steps > 4).rows()) == [row for row in expected if row["step"] > 4]
    some = latest.only(("step", "loss"))
    assert list(some.rows()) == [{"step": row["step"], "loss": row["loss"]} for row in expected]


def test_files_are_decoded_once_and_not_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(True, [{"step": step, **ROW} for step in range(first, first + 5)]) for first in (1, 4, 9)]
    stored = StoredSteps.of(files_of(parts)).latest()
    decoded: list[int] = []
    only = PackedSteps.only

    def noted(file: PackedSteps, columns: Any) -> StepTable:
        decoded.append(list(stored.files).index(file))
        return only(file, columns)

    monkeypatch.setattr(PackedSteps, "only", noted)

    assert [row["step"] for row in stored.rows()] == list(range(1, 14))
    assert decoded == [0, 1, 2]
    decoded.clear()
    next(stored.blocks(2))
    assert decoded == [0]


def test_a_file_that_is_none_is_refused_before_anything_is_made_of_it() -> None:
    with pytest.raises(RunError, match="there"):
        StoredSteps.of([PackedSteps(b"{}", 1, "there")])
