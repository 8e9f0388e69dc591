"""Real ranks that are fed by loader processes, some of which are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loader_faults
from monitored_ranks import MonitoredRanks, long_recipe, made_dataset

STEPS = 12


def trained(recipe_changes: dict[str, Any], data: str, folder: Path, name: str, *, kills: bool) -> list[dict[str, Any]]:
    """History of the first steps of two ranks."""
    recipe = long_recipe(data, str(folder / "runs"), digest_every_steps=2, max_workers=2, **recipe_changes)
    with MonitoredRanks(recipe, name, folder, world_size=2) as ranks:
        if kills:
            ranks.until(lambda: ranks.monitor.status()["step"] >= 3)
            for process in ranks.processes:
                for loading in loader_faults.loader_processes(process.pid):
                    loading.kill()
        ranks.until(lambda: ranks.monitor.status()["step"] >= STEPS)
        left = [loading.pid for process in ranks.processes for loading in loader_faults.loader_processes(process.pid)]
        assert len(left) == (2 * 2 if kills else 0)
        ranks.stop()
        assert not ranks.events("restart")
        assert all(map(loader_faults.is_gone, left))
        if kills:
            assert all(ranks.log(rank).count("replaced it in") == 2 for rank in range(2))
        rows = ranks.run.read_history()
    return [{name: row.get(name) for name in ("step", "loss", "digest", "samples")} for row in rows[:STEPS]]


def test_ranks_train_to_the_same_bits_by_processes_that_are_killed_as_by_threads(tmp_path: Path) -> None:
    data = made_dataset(tmp_path)
    by_threads = trained({}, data, tmp_path, "threads", kills=False)
    changes = {"loader_processes": True, "loader_threads": 2}

    by_processes = trained(changes, data, tmp_path, "processes", kills=True)

    assert by_processes == by_threads
    assert sum(bool(row["digest"]) for row in by_threads) >= STEPS // 2
