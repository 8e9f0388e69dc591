"""An ablation on a real cluster that is killed in the middle and typed again. Two minutes on two idle cores."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from testbed import SMALL, Command

from jobs.ablate.spec import Spec
from jobs.recipe.recipe import Recipe
from pipeline.store.storage import Storage

HEAD = """
base = "tiny"
name = "killed"
seeds = [0, 1]
grid.model.kernel_size = [5, 7]
evaluation.k = [5]

[recipe]
epochs = 4
max_workers = 1
cpus_per_worker = 1.0
"""


@pytest.mark.slow
def test_an_ablation_that_is_killed_resumes_where_it_was(convmae: Command, data: str, tmp_path: Path) -> None:
    fields = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SMALL.items())
    path = tmp_path / "killed.toml"
    path.write_text(HEAD + fields)
    words = ("ablate", str(path), f"data={data}")
    command = convmae.start(*words, "--at-most", "2")
    first = convmae.run("killed-kernel_size-5-seed0")
    wait_for(lambda: first.read_heartbeat().get("step", 0) > 0)
    command.kill()
    command.communicate()

    out, _ = convmae(*words, "--at-most", "2")

    storage = Storage.from_environment(convmae.stack.environment())
    folder = f"s3://{convmae.stack.bucket}/runs/.ablations/killed"
    results = json.loads(storage.read(f"{folder}/results.json"))
    runs = [run for variant in results["variants"] for run in variant["runs"]]
    assert [run["run"] for run in runs] == [trial.run_name for trial in Spec.load(str(path)).trials]
    for run in runs:
        directory = convmae.run(run["run"])
        events = directory.read_events()
        assert run["state"] == "finished"
        assert [event["kind"] for event in events].count("finished") == 1
        assert max(event["attempt"] for event in events) == 1  # nothing was begun a second time
        assert run["accuracies"].keys() == run["random"].keys() == {"kNN, k = 5", "linear probe"}
        assert isinstance(directory.read_recipe(), Recipe)
        assert len(storage.list_names(directory.path("evaluations"))) == 1
    assert "killed-kernel_size-5-seed0: submitted" not in out
    assert len(storage.list_names(f"{folder}/evaluations")) == 4  # two models, two seeds

    again, _ = convmae(*words)

    assert "submitted" not in again
    assert json.loads(storage.read(f"{folder}/results.json")) == results


def wait_for(is_there: object, seconds: float = 240) -> None:
    assert callable(is_there)
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.5)
