"""A machine without local stack, cluster or cloud, and the command in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from command_line import MANIFEST, Ended, Typed

from jobs.cli import main
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.shard.index import IndexRow, ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage


@pytest.fixture
def no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without local stack, cluster or cloud."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "RAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CONVMAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")


@pytest.fixture
def typed(no_stack: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """The command, in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["convmae", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.main()
        code = caught.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def data(tmp_path: Path) -> str:
    url = str(tmp_path / "data")
    MANIFEST.save(Storage(), url, [])
    return url


@pytest.fixture
def indexed_data(tmp_path: Path) -> str:
    """100 samples in two shards, without their tars."""
    url, entries = str(tmp_path / "indexed"), []
    for shard in ("a", "b"):
        rows = [IndexRow(f"{shard}{n}", 512, 9, 1, 2, 3, n % 2) for n in range(50)]
        index = ShardIndex.from_rows(shard, 5000, "", (), rows)
        entries.append(ShardEntry.of(index))
        Storage().write(entries[-1].index_url(url), index.to_bytes())
    Manifest(2, "digest", (), 0, ShardTable.of(entries)).save(Storage(), url, [])
    return url


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A run root with one run of five steps that finished."""
    root = str(tmp_path / "runs")
    run = RunDirectory.of(Storage(), root, "first")
    run.claim(named_recipe("tiny"))
    row = {"epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
    run.write_history(1, 1, [{"step": step, **row} for step in range(1, 6)])
    event = {"at_seconds": 1.7e9, "attempt": 1, "kind": "start", "step": 0, "reason": "new run"}
    run.write_events(1, [event, event | {"kind": "finished", "reason": "", "step": 5}])
    beat = {"state": "finished", "step": 5, "total_steps": 5, "loss": 0.5, "updated_at_seconds": 1.7e9}
    run.write_heartbeat(beat)
    return root
