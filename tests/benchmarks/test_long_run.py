"""The made-up run of `make bench-history` is one that readers take, and compaction has work with."""

from __future__ import annotations

from pathlib import Path

from long_run import LongRun

from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage


def test_each_step_is_there_and_some_were_redone(tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "long")
    LongRun(steps=5000, attempts=20).write(run)
    before = (run.read_history(), run.read_events(), run.read_quarantine())

    assert [row["step"] for row in before[0]] == list(range(1, 5001))
    assert run.read_steps().superseded().any()
    assert run.last_attempt() == 20

    while run.compact(20, 0, lambda: True):
        pass

    assert "compacted.json" in run.storage.list_names(run.path("history"))
    assert (run.read_history(), run.read_events(), run.read_quarantine()) == before
