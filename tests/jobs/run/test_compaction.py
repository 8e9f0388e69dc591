"""Records of a run read the same before, while and after their parts are compacted, wherever that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.errors import RunError
from jobs.export import run_tables as export_tables
from jobs.export.run_tables import run_tables
from jobs.metrics.utilization import GroupCompute
from jobs.recipe.named_recipes import named_recipe
from jobs.report import history_lines
from jobs.report.history_lines import history_blocks
from jobs.report.report import report_html
from jobs.report.reported_run import ReportedRun
from jobs.report.run_difference import RunDifference
from jobs.report.run_figures import RunFigures
from jobs.run import parts
from jobs.run.directory import RunDirectory
from jobs.run.stored_steps import StoredSteps
from pipeline.store.storage import Storage

ATTEMPTS = 12
STRETCHES = [(max(1, 7 * number - 9), 7 * number + 5) for number in range(ATTEMPTS)]
"""First and last steps of attempts that do some again."""
LAST = ATTEMPTS + 1
"""An attempt after all that are made up: nobody writes them any more."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "COMPACTED_PARTS", 3)
    monkeypatch.setattr(parts, "FILE_ROWS", 40)
    monkeypatch.setattr(StoredSteps.blocks, "__defaults__", (11,))
    monkeypatch.setattr(history_lines, "_BLOCK_STEPS", 7)
    monkeypatch.setattr(export_tables, "_BLOCK_ROWS", 9)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return made(tmp_path, "first", STRETCHES)


def row(step: int, attempt: int, **fields: Any) -> dict[str, Any]:
    known = {"step": step, "epoch": step // 5, "loss": 1 / (step + attempt), "learning_rate": 1e-3, "world_size": 2}
    return {**known, "attempt": attempt, "samples": f"64-{step:x}", "step_seconds": 0.5, **fields}


def made(folder: Path, name: str, attempts: list[tuple[int, int]], part_steps: int = 4) -> RunDirectory:
    """A run of attempts, each from a step to a step, with rows of every kind."""
    run = RunDirectory.of(Storage(), str(folder / "runs"), name)
    run.claim(named_recipe("tiny"))
    for attempt, (first, last) in enumerate(attempts, 1):
        for start in range(first, last + 1, part_steps):
            rows = [row(step, attempt) for step in range(start, min(start + part_steps, last + 1))]
            rows[0] |= {"loss": None, "skipped": "the gradient"} if start % 3 == 0 else {"digest": f"{start:x}"}
            if attempt == 1:  # of older releases
                rows = [
                    {key: value for key, value in row.items() if key not in ("samples", "step_seconds")} for row in rows
                ]
            if attempt == 2:
                rows = [row | {"loss": 1, "later": ["field"]} for row in rows]
            run.write_history(attempt, start, rows)
        begun = {"at_seconds": 1.0 * first, "attempt": attempt, "kind": "restart", "step": first, "world_size": 2}
        saved = {"at_seconds": 1.0 * last, "attempt": attempt, "kind": "checkpoint", "step": last}
        compute = {"step_flops": 4e12, "peak_flops_per_second": 20e12, "devices": "2 x A10"} if attempt > 3 else {}
        kept = {"stall_seconds": 0.5, "duration_seconds": 1.0, "bytes": 5}
        run.write_events(attempt, [{**begun, "steps_redone": 1, **compute}, {**saved, **kept}])
        fault = {"fault": "checksum", "url": "s3://a/b.tar", "reason": "caf\ud800", "substitute": 1}
        run.write_quarantine(attempt, [{"step": first, "id": attempt, "attempt": attempt, **fault}])
    run.write_heartbeat({"state": "running", "step": 9, "total_steps": 99, "updated_at_seconds": 2.0})
    return run


def everything(run: RunDirectory) -> dict[str, Any]:
    """What each reader makes of a run."""
    tables = {
        title: pa.concat_tables([table.schema.empty_table(), *table.blocks]) for title, table in run_tables(run).items()
    }
    return {
        "history": json.dumps(run.read_history(), sort_keys=True),
        "every row": json.dumps(list(run.read_steps().rows()), sort_keys=True),
        "events": run.read_events(),
        "newest": [run.read_newest_events(count) for count in (1, 3, 10, 1000)],
        "last attempt": run.last_attempt(),
        "quarantine": run.read_quarantine(),
        "figures": RunFigures.read(run, run.read_recipe()),
        "lines": list(history_blocks(run, as_json=False)),
        "json": [json.loads(line) for line in "".join(history_blocks(run, as_json=True)).splitlines()],
        "tables": {title: (table.schema.to_string(), table.to_pylist()) for title, table in tables.items()},
        "diff": RunDifference.between(run, run).to_json(),
    }


def plainly(run: RunDirectory) -> dict[str, Any]:
    """What two readers should make of a run without probes, of its parts as they lie there, row by row."""
    parts = [run.storage.read(run.path("history", name)) for name in sorted(names(run))]
    computes = GroupCompute.of_attempts(run.read_events())
    every = [json.loads(line) for part in parts for line in part.splitlines()]
    for each in every:
        if compute := computes.get(each["attempt"]):
            each.update(compute.figures(each["world_size"], each.get("step_seconds", 0), each["step"]))
    last = {row["step"]: row for row in every}
    lines = [
        f"step {row['step']:>8}  epoch {row['epoch']:>4}  loss "
        + ("-" if row["loss"] is None else f"{row['loss']:.6f}")
        + f"  lr {row['learning_rate']:.3e}  world {row['world_size']:>3}  attempt {row['attempt']:>3}"
        + (f"  mfu {row['mfu_ratio']:.1%}" if "mfu_ratio" in row else "")
        + (f"  digest {row['digest']}" if row.get("digest") else "")
        for _, row in sorted(last.items())
    ]
    return {
        "lines": lines,
        "json": json.dumps([row for _, row in sorted(last.items())], sort_keys=True),
        "table": [(row["step"], row["attempt"], last[row["step"]] is not row, row["loss"]) for row in every],
    }


def test_what_is_made_block_by_block_of_redone_steps_is_what_their_last_rows_give(run: RunDirectory) -> None:
    expected = plainly(run)
    assert sum(superseded for _, _, superseded, _ in expected["table"]) > 20

    while True:
        json_lines = "".join(history_blocks(run, as_json=True)).splitlines()
        assert json.dumps(list(map(json.loads, json_lines)), sort_keys=True) == expected["json"]
        assert "".join(history_blocks(run, as_json=False)).splitlines() == expected["lines"]
        table = [row for block in run_tables(run)["history"].blocks for row in block.to_pylist()]
        found = [(row["step"], row["attempt"], row["superseded"], row["loss"]) for row in table]
        assert found == expected["table"]
        if not run.compact(LAST, 0, lambda: True):
            break
    assert not any(name.startswith("0001-") for name in names(run))


def compact(run: RunDirectory, attempt: int = LAST, first_step: int = 0) -> int:
    rounds = 0
    while run.compact(attempt, first_step, lambda: True):
        rounds += 1
    return rounds


def names(run: RunDirectory, folder: str = "history") -> list[str]:
    return run.storage.list_names(run.path(folder))


def test_every_reader_gives_the_same_after_each_compaction(run: RunDirectory) -> None:
    before, page = everything(run), report_html(ReportedRun.read(run))

    rounds = 0
    while run.compact(LAST, 0, lambda: True):
        rounds += 1
        assert everything(run) == before

    assert rounds > 2
    assert report_html(ReportedRun.read(run)) == page
    for folder in ("history", "events", "quarantine"):
        compacted = [name for name in names(run, folder) if name.startswith("compacted-")]
        assert len(names(run, folder)) - len(compacted) - 1 < parts.COMPACTED_PARTS
        assert compacted
    assert len([name for name in names(run) if name.startswith("compacted-")]) > 1, "files are not rewritten for ever"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attempts=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 25)), min_size=1, max_size=9),
    part_steps=st.integers(1, 6),
    settled=st.tuples(st.integers(1, 10), st.integers(0, 40)),
)
def test_whatever_attempts_redid_and_wherever_the_newest_is(
    tmp_path_factory: pytest.TempPathFactory,
    attempts: list[tuple[int, int]],
    part_steps: int,
    settled: tuple[int, int],
) -> None:
    stretches = [(first, first + length) for first, length in attempts]
    run = made(tmp_path_factory.mktemp("run"), "any", stretches, part_steps)
    before = everything(run)

    compact(run, *settled)
    assert everything(run) == before

    compact(run)
    assert everything(run) == before


def test_only_what_is_settled_is_compacted(run: RunDirectory) -> None:
    before = names(run)

    compact(run, attempt=6, first_step=33)

    live = [name for name in before if name >= "0006-00000033.jsonl"]
    assert "0006-00000034.jsonl" in live and "0006-00000030.jsonl" not in live
    left = [name for name in names(run) if name.endswith(".jsonl")]
    assert left[-len(live) :] == live
    assert len(left) < len(live) + parts.COMPACTED_PARTS
    assert "attempt-0006.jsonl" in names(run, "events"), "the attempt that is being trained still writes it"


def test_a_live_attempt_goes_on_beside_its_compacted_parts(run: RunDirectory) -> None:
    compact(run, attempt=ATTEMPTS, first_step=82)
    before = run.read_history()

    run.write_history(ATTEMPTS, 83, [row(step, ATTEMPTS) for step in range(83, 90)])
    run.write_events(LAST, [{"at_seconds": 1e6, "attempt": LAST, "kind": "finished", "step": 89}])
    compact(run, attempt=LAST + 1)

    after = {each["step"]: each for each in run.read_history()}
    assert after == {each["step"]: each for each in before} | {step: row(step, ATTEMPTS) for step in range(83, 90)}
    assert run.last_attempt() == LAST


def killed_compaction(run: RunDirectory, at: int) -> bool:
    """Compact in another process, which kills itself before one of its writes and deletes; whether it came that far."""
    command = [sys.executable, str(Path(__file__).with_name("compacting_process.py")), run.url, str(at), "3", "40"]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parents[3], env={"PYTHONPATH": "."})
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def test_a_compaction_that_is_killed_anywhere_loses_and_doubles_nothing(tmp_path: Path) -> None:
    def fresh(name: str) -> RunDirectory:
        return made(tmp_path, name, [(1, 9), (6, 20)])

    before = records(fresh("before"))
    at = 0
    while killed_compaction(run := fresh(f"killed-{at}"), at):
        assert records(run) == before, f"killed at {at}"
        compact(run)
        assert records(run) == before, f"killed at {at}, and compacted again"
        index = json.loads(run.storage.read(run.path("history", "compacted.json")))
        assert [name for name in names(run) if name.endswith(".npz")] == [file["name"] for file in index["files"]]
        covered = tuple(index["files"][-1]["last"])
        assert all(parts.Parts._key(name) > covered for name in names(run) if name.endswith(".jsonl"))
        at += 1
    assert at > 6


def records(run: RunDirectory) -> Any:
    every = list(run.read_steps().rows())
    return every, run.read_history(), run.read_events(), run.read_newest_events(3), run.read_quarantine()


class BetweenStorage(Storage):
    """Calls what a test gives it, once, when a compacted file was written or a part was listed."""

    after_write: Callable[[], None] | None = None
    after_list: Callable[[], None] | None = None

    def write(self, url: str, data: bytes) -> None:
        super().write(url, data)
        if "compacted-" in url:
            called, type(self).after_write = type(self).after_write, None
            if called:
                called()

    def list_names(self, url: str) -> list[str]:
        found = super().list_names(url)
        called, type(self).after_list = type(self).after_list, None
        if called:
            called()
        return found


def watched(run: RunDirectory) -> RunDirectory:
    return RunDirectory(BetweenStorage(), run.url)


def test_of_two_monitors_that_compact_at_once_one_has_no_effect(run: RunDirectory) -> None:
    before = records(run)
    BetweenStorage.after_write = lambda: compact(run)

    watched(run).compact(LAST, 0, lambda: True)

    assert records(run) == before
    index = json.loads(run.storage.read(run.path("history", "compacted.json")))
    assert [name for name in names(run) if name.endswith(".npz")] == [file["name"] for file in index["files"]]
    compact(watched(run))
    assert records(run) == before


def test_two_monitors_that_compact_for_a_while_leave_every_row_once(run: RunDirectory) -> None:
    before, failures = records(run), []

    def work() -> None:
        try:
            for _ in range(30):
                run.compact(LAST, 0, lambda: True)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert records(run) == before, "a reader beside them"
    assert not failures
    assert records(run) == before
    assert not run.compact(LAST, 0, lambda: True), "nothing is left to do"


def test_a_driver_that_was_cut_off_changes_nothing(run: RunDirectory) -> None:
    before = names(run)

    assert not run.compact(LAST, 0, lambda: False)

    assert names(run) == before


def test_what_a_driver_that_was_cut_off_writes_into_a_compacted_part_is_not_read_and_goes(run: RunDirectory) -> None:
    before = records(run)
    compact(run)
    run.write_history(3, 5, [row(step, 3, loss=9.0) for step in range(5, 9)])

    assert records(run) == before
    compact(run)
    assert "0003-00000005.jsonl" not in names(run)


def test_a_reader_whose_parts_are_compacted_beneath_it_begins_again(run: RunDirectory) -> None:
    before = records(run)

    for reading in ("read_steps", "read_events", "read_quarantine", "last_attempt"):
        expected = getattr(run, reading)()
        folder = made(
            Path(run.root).parent / reading, "first", [(max(1, 7 * n - 9), 7 * n + 5) for n in range(ATTEMPTS)]
        )
        BetweenStorage.after_list = lambda folder=folder: compact(folder)
        found = getattr(watched(folder), reading)()
        assert BetweenStorage.after_list is None
        same = list(found.rows()) == list(expected.rows()) if reading == "read_steps" else found == expected
        assert same, reading
    assert records(run) == before


def test_what_a_reader_still_walks_is_not_changed_by_a_compaction(run: RunDirectory) -> None:
    run.compact(LAST, 0, lambda: True)
    before = "".join(history_blocks(run, as_json=True))
    walked = history_blocks(run, as_json=True)
    first, files = next(walked), names(run)

    compact(run)

    assert len(set(files) - set(names(run))) > 3
    assert first + "".join(walked) == before


@pytest.mark.parametrize("folder", ["history", "events", "quarantine"])
@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "foreign"])
def test_a_compacted_file_that_is_damaged_is_refused_by_name(run: RunDirectory, folder: str, damage: str) -> None:
    compact(run)
    name = next(name for name in names(run, folder) if name.startswith("compacted-"))
    url = run.path(folder, name)
    data = bytearray(run.storage.read(url))
    data[len(data) // 2] ^= 1
    if damage == "gone":
        run.storage.delete(url)
    else:
        changed = {"flipped": bytes(data), "shorter": bytes(data[:-1]), "foreign": b"{}\n"}[damage]
        run.storage.write(url, changed)

    with pytest.raises(RunError, match=name) as refused:
        {"history": run.read_steps, "events": run.read_events, "quarantine": run.read_quarantine}[folder]()

    assert len(str(refused.value).splitlines()) == 1
    left = names(run, folder)
    run.compact(LAST, 0, lambda: True) if damage == "gone" else None
    assert names(run, folder) == left, "nothing is deleted"


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2}, {"version": "1"}, {"files": {}}, {"files": [{"name": "compacted-000001-00000000.npz"}]},
        {"files": [{"name": "../../x.npz", "last": [1], "rows": 1, "bytes": 1, "crc32c": 1}]},
    ],
)  # fmt: skip
def test_an_index_that_is_damaged_or_newer_is_refused_by_name(run: RunDirectory, change: dict[str, Any]) -> None:
    compact(run)
    url = run.path("history", "compacted.json")
    run.storage.write(url, json.dumps(json.loads(run.storage.read(url)) | change).encode())

    with pytest.raises(RunError, match=r"history/compacted\.json"):
        run.read_steps()
    with pytest.raises(RunError, match=r"history/compacted\.json"):
        run.compact(LAST, 0, lambda: True)


def test_a_damaged_part_is_not_compacted_and_still_named(run: RunDirectory) -> None:
    run.storage.write(run.path("history", "0002-00000001.jsonl"), b'{"step": 1}\n')

    with pytest.raises(RunError, match="0002-00000001"):
        compact(run)
    with pytest.raises(RunError, match="0002-00000001"):
        run.read_steps()


def test_the_newest_events_are_read_from_few_files(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, url: reads.append(url) or read(self, url))

    found = run.read_newest_events(3)

    assert [event["attempt"] for event in found] == [ATTEMPTS - 1, ATTEMPTS, ATTEMPTS]
    assert [url.rpartition("/")[2] for url in reads] == [
        f"attempt-{ATTEMPTS:04d}.jsonl",
        f"attempt-{ATTEMPTS - 1:04d}.jsonl",
    ]
