from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from probe_events import probe_events
from pyarrow import parquet

from jobs.errors import ExportError
from jobs.export.run_tables import TABLE_SUFFIXES, RunTable, export_tables, run_tables
from jobs.metrics.utilization import GroupCompute
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

COMPUTE = GroupCompute(2e12, 8e12, "2 x L4 (data sheet)")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose first attempt lost steps 3 and 4, and whose second one has a column of a later release."""
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    run.claim(named_recipe("tiny"))
    row = {"epoch": 0, "learning_rate": 1e-3, "world_size": 2, "step_seconds": 0.5, "samples": "64-ff"}
    run.write_history(1, 1, [{"step": step, "attempt": 1, "loss": 1.0, **row} for step in (1, 2, 3, 4)])
    later = [{"step": step, "attempt": 2, "loss": 0.5, **row, "new": [step]} for step in (3, 4, 5)]
    later[-1] |= {"loss": None, "skipped": "the gradient", "digest": "ab"}
    run.write_history(2, 3, later)
    begun = {"step": 0, "world_size": 2, "steps_redone": 0}
    run.write_events(1, [{"at_seconds": 1.7e9 + 0.25, "attempt": 1, "kind": "start", **begun, **COMPUTE.to_json()}])
    restart = {"at_seconds": 1.7e9 + 9, "attempt": 2, "kind": "restart", **begun, "reason": 'a, "rank"\ndied'}
    run.write_events(2, [restart, *probe_events({0: 0.25, 4: 0.5})])
    return run


def whole(table: RunTable) -> pa.Table:
    return pa.concat_tables([table.schema.empty_table(), *table.blocks])


def read(url: str) -> pd.DataFrame:
    return pd.read_parquet(url) if url.endswith(".parquet") else pd.read_csv(url)


@pytest.mark.parametrize("name", TABLE_SUFFIXES)
def test_pandas_reads_every_row_and_leaves_out_redone_steps_by_one_column(
    run: RunDirectory, tmp_path: Path, name: str
) -> None:
    written = export_tables(run, name, Storage(), str(tmp_path / "out"))

    files = {Path(each.url).stem: read(each.url) for each in written}
    assert sorted(files) == ["accuracies", "events", "history"]
    history = files["history"]
    assert history["step"].tolist() == [1, 2, 3, 4, 3, 4, 5]
    assert history["superseded"].tolist() == [False, False, True, True, False, False, False]
    current = history[~history["superseded"]]
    expected = run.read_history()
    assert current["step"].tolist() == [row["step"] for row in expected]
    assert [None if pd.isna(loss) else loss for loss in current["loss"]] == [row["loss"] for row in expected]
    assert current["new"].dropna().tolist() == ["[3]", "[4]", "[5]"]
    mfu = history["mfu_ratio"]
    assert mfu[:4].tolist() == pytest.approx([0.5] * 4) and mfu[4:].isna().all()  # of what the attempt recorded
    accuracies = files["accuracies"]
    assert accuracies[accuracies["method"] == "knn_20"]["accuracy"].tolist() == [0.25, 0.5]
    assert (accuracies["low"] < accuracies["accuracy"]).all() and (accuracies["accuracy"] < accuracies["high"]).all()
    events = files["events"]
    assert events["reason"].tolist()[1] == 'a, "rank"\ndied'
    assert pd.to_datetime(events["time"]).iloc[0] == pd.Timestamp(1.7e9 + 0.25, unit="s", tz="UTC")


def test_a_run_without_steps_has_the_same_columns_of_the_same_types(run: RunDirectory, tmp_path: Path) -> None:
    empty = RunDirectory.of(Storage(), str(tmp_path / "runs"), "second")
    empty.claim(named_recipe("tiny"))

    found, full = run_tables(empty), run_tables(run)

    for title, table in found.items():
        assert whole(table).num_rows == 0
        for field in table.schema:
            assert full[title].schema.field(field.name).type == field.type


def test_the_recipe_is_in_the_metadata(run: RunDirectory, tmp_path: Path) -> None:
    written = export_tables(run, "metrics", Storage(), str(tmp_path / "out"))

    for each in written:
        about = json.loads(parquet.read_schema(each.url).metadata[b"convmae"])
        assert (about["run"], about["url"]) == ("first", run.url)
        assert about["recipe"] == named_recipe("tiny").to_json()


@pytest.mark.parametrize("name", TABLE_SUFFIXES)
def test_pandas_is_not_loaded_though_pyarrow_would_where_it_is_installed(
    run: RunDirectory, tmp_path: Path, name: str
) -> None:
    code = "import sys; from jobs.export.run_tables import export_tables; from jobs.run.directory import RunDirectory; "
    code += "from pipeline.store.storage import Storage; run, name, out = sys.argv[1:]; "
    code += "export_tables(RunDirectory(Storage(), run), name, Storage(), out); print('pandas' in sys.modules)"

    command = [sys.executable, "-c", code, run.url, name, str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)

    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None], "int64"),
        ([1, 0.5], "double"),
        ([True, False], "bool"),
        ([True, 1], "string"),
        ([2**70], "string"),
        ([None], "string"),
        (["a", 1], "string"),
    ],
)
def test_a_column_that_no_release_knows_has_the_type_of_its_values(
    run: RunDirectory, values: list[Any], kind: str
) -> None:
    row = {"epoch": 0, "loss": 1.0, "learning_rate": 1e-3, "world_size": 2, "attempt": 3}
    run.write_history(3, 6, [{"step": 6 + n, **row, "other": value} for n, value in enumerate(values)])

    table = whole(run_tables(run)["history"])

    assert str(table.schema.field("other").type) == kind
    as_text = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    assert table["other"].to_pylist() == [None] * 7 + (as_text if kind == "string" else values)


def test_what_is_there_is_not_replaced_unless_asked(run: RunDirectory, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    export_tables(run, "metrics", Storage(), out)

    with pytest.raises(ExportError, match="must not exist yet"):
        export_tables(run, "metrics", Storage(), out)
    assert export_tables(run, "metrics", Storage(), out, force=True)
