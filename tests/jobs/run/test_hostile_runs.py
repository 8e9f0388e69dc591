"""Run directories and recipes that are damaged or malicious: refused by name, in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from committed import save

from jobs.checkpoint import checkpoint
from jobs.checkpoint.retention import carry_out, plan_pruning
from jobs.errors import CheckpointError, DamagedCheckpointError, RecipeError, RunError
from jobs.recipe.named_recipes import LARGEST_FILE_BYTES, named_recipe
from jobs.recipe.overrides import LONGEST_ARGUMENT, parse_overrides
from jobs.report.status import list_cells, status_or_error
from jobs.run.directory import RunDirectory, list_runs
from pipeline.errors import UserError
from pipeline.store.storage import Storage

DEEP = b"[" * 100_000
HISTORY_ROW = {"step": 1, "epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
EVENT = {"at_seconds": 1.5, "attempt": 1, "kind": "milestone", "step": 1}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    run.claim(named_recipe("tiny"))
    return run


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "rank-0.pt").write_bytes(b"state")
    return folder


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        DEEP,
        b'{"step": 3}',
        b'{"state": 5}',
        b'{"state": "running", "step": "3"}',
        b'{"state": "running", "step": true}',
        b'{"state": "running", "eta_seconds": NaN}',
        b'{"state": "running", "updated_at_seconds": 1e300}',
    ],
)
def test_a_heartbeat_that_is_damaged_is_named_and_hides_no_other_run(run: RunDirectory, data: bytes) -> None:
    other = RunDirectory.of(run.storage, run.url.rpartition("/")[0], "other")
    other.claim(named_recipe("tiny"))
    run.storage.write(run.path("heartbeat.json"), data)

    with pytest.raises(RunError, match=r"heartbeat\.json"):
        run.read_heartbeat()
    statuses = [status_or_error(found) for found in list_runs(run.storage, run.url.rpartition("/")[0])]
    assert [list_cells(status)[:2] for status in statuses] == [("first", "unreadable"), ("other", "submitted")]
    assert "heartbeat.json" in statuses[0]["error"]


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"\xff", DEEP, b"{}", b'{"epochs": "many"}'])
def test_a_recipe_that_is_damaged_is_refused(run: RunDirectory, data: bytes) -> None:
    run.storage.write(run.path("recipe.json"), data)

    with pytest.raises(UserError) as refused:
        run.read_recipe()

    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changed", [{"step": "1"}, {"step": None}, {"loss": "low"}, {"attempt": 1.5}, {"epoch": 2**60}]
)
def test_a_history_row_of_other_types_is_refused(run: RunDirectory, changed: dict[str, Any]) -> None:
    run.write_history(1, 1, [HISTORY_ROW])
    assert run.read_history() == [HISTORY_ROW]

    run.write_history(1, 1, [HISTORY_ROW | changed])

    with pytest.raises(RunError, match=rf"{next(iter(changed))}.*history/0001"):
        run.read_history()


@pytest.mark.parametrize("line", [b"x", b"[]", b"5", DEEP, b"{}", b'{"at_seconds": -Infinity}'])
@pytest.mark.parametrize("folder", ["events", "history", "quarantine"])
def test_a_line_that_is_not_a_row_is_refused(run: RunDirectory, folder: str, line: bytes) -> None:
    name = "0001-00000001.jsonl" if folder == "history" else "attempt-0001.jsonl"
    run.storage.write(run.path(folder, name), line + b"\n")
    read = {"events": run.read_events, "history": run.read_history, "quarantine": run.read_quarantine}[folder]

    with pytest.raises(RunError, match=rf"{folder}/{re.escape(name)}"):
        read()


def test_an_event_may_have_no_bytes_but_those_it_has_are_a_number(run: RunDirectory) -> None:
    run.write_events(1, [EVENT, EVENT | {"bytes": 7}])
    assert len(run.read_events()) == 2

    run.write_events(1, [EVENT | {"bytes": "<script>"}])
    with pytest.raises(RunError, match="must give bytes as an integer"):
        run.read_events()


def rewritten(run: RunDirectory, step: int, change: dict[str, Any], name: Any = None) -> None:
    """Change fields of a commit, or the name of its file."""
    fields = json.loads(run.storage.read(checkpoint.commit_url(run, step)))
    fields |= change
    if name is not None:
        fields["files"][0]["name"] = name
    run.storage.write(checkpoint.commit_url(run, step), json.dumps(fields).encode())


@pytest.mark.parametrize(
    "name", ["../../../../victim", "a/../../../../victim", "/etc/passwd", "a//b", ".", "", "a\0b", 5]
)
def test_a_commit_reaches_no_file_outside_of_its_step(
    run: RunDirectory, local: Path, tmp_path: Path, name: object
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for step in (1, 2):
        save(run, local, step)
    rewritten(run, 1, {}, name=name)

    with pytest.raises(DamagedCheckpointError, match="no path below the folder"):
        checkpoint.read_commit(run, 1)
    carry_out(run, plan_pruning(run, keep=1))
    checkpoint.prune(run, keep=1)

    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "change",
    [
        {"step": 2},
        {"step": "1"},
        {"epoch": "[/nope]"},
        {"world_size": -2},
        {"world_size": True},
        {"created_at_seconds": float("nan")},
        {"created_at_seconds": 1e300},
        {"milestone": "yes"},
        {"counters": {"images_total": "many"}},
        {"counters": []},
        {"versions": {"torch": 2}},
        {"driver": ["me"]},
        {"files": [{"name": "a", "bytes": -5, "crc32c": 0}]},
        {"files": [{"name": "a", "bytes": 1, "crc32c": "0"}]},
        {"files": [5]},
        {"files": 5},
    ],
)
def test_a_commit_with_fields_of_other_types_is_damaged(run: RunDirectory, local: Path, change: dict[str, Any]) -> None:
    save(run, local, 1)
    rewritten(run, 1, change)

    with pytest.raises(DamagedCheckpointError, match="commit"):
        checkpoint.read_commit(run, 1)


def test_a_commit_of_endless_depth_is_damaged(run: RunDirectory, local: Path) -> None:
    save(run, local, 1)
    run.storage.write(checkpoint.commit_url(run, 1), b'{"files": ' + DEEP)

    with pytest.raises(CheckpointError, match="must be a JSON object"):
        checkpoint.read_commit(run, 1)


@pytest.mark.parametrize(
    "text",
    [
        "epochs = " + "[" * 10_000,
        "epochs = " + "9" * 5000,
        "x = 1 #" + "x" * LARGEST_FILE_BYTES,
        "a" + ".a" * LARGEST_FILE_BYTES + " = 1",
    ],
)
def test_a_recipes_file_that_is_too_much_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(f'base = "tiny"\n{text}\n')

    with pytest.raises(RecipeError, match=r"mine\.toml") as refused:
        named_recipe(str(tmp_path / "mine.toml"))
    assert len(str(refused.value)) < 1000


def test_an_argument_that_is_too_much_is_refused() -> None:
    with pytest.raises(RecipeError, match=f"at most {LONGEST_ARGUMENT} characters"):
        parse_overrides(["epochs=" + "9" * LONGEST_ARGUMENT])
    for text in ("[" * 3000, "9" * 4000):
        with pytest.raises(RecipeError, match="epochs"):
            named_recipe("tiny").amended(parse_overrides([f"epochs={text}"]))


@pytest.mark.parametrize("field", ["epochs", "global_batch_size", "lanes", "checkpoint_every_steps", "seed"])
def test_an_absurd_count_is_refused(field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        named_recipe("tiny").amended({field: 2**63})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", DEEP, b'{"id": "a b", "step": 1, "at_seconds": 0}', b'{"id": "a", "step": "1", "at_seconds": 0}'],
)
def test_what_is_kept_of_a_tracker_is_checked(run: RunDirectory, data: bytes) -> None:
    assert run.read_tracked("mlflow") == {}
    run.storage.write(run.path("trackers", "mlflow.json"), data)

    with pytest.raises(RunError, match=r"trackers/mlflow\.json"):
        run.read_tracked("mlflow")


@pytest.mark.parametrize("data", [b"", b"5", b"{}", b'{"at_seconds": -1}', b'{"at_seconds": NaN}'])
def test_what_is_kept_of_notices_is_checked(run: RunDirectory, data: bytes) -> None:
    assert run.read_notified() == {}
    run.storage.write(run.path("notices.json"), data)

    with pytest.raises(RunError, match=r"notices\.json"):
        run.read_notified()
