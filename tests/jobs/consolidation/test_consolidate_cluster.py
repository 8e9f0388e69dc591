"""Consolidation from and to a real S3 server: by tasks of a real Ray cluster, and its memory for a large model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import torch
from local_s3 import local_s3
from safetensors.torch import load
from testbed import Command
from zero_material import commit_state, random_material

from jobs.consolidation.target import consolidated_url
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.stack.record import Stack
from pipeline.store.storage import Storage

ON_A_CLUSTER = """
import functools, os, sys
from jobs.cluster.session import Session
session = Session.open(os.environ)
session.export()
session.connect()
from jobs.consolidation.consolidate import consolidate
from jobs.consolidation.target import Target
from jobs.cluster.fan_out import fan_out
tasks = functools.partial(fan_out, copying=True)
result = consolidate(session.run(sys.argv[1]), target=Target(shard_bytes=int(sys.argv[2])), fan_out=tasks)
print(*(file.url for file in result.files))
"""

BY_ITSELF = """
import functools, os, sys
import ray
from jobs.consolidation.consolidate import consolidate
from jobs.cluster.fan_out import fan_out
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
tasks = functools.partial(fan_out, copying=True)
consolidate(RunDirectory(Storage.from_environment(os.environ), sys.argv[1]), fan_out=tasks)
"""


def test_tasks_of_a_cluster_make_the_same_files_also_where_training_has_every_cpu(
    convmae: Command, local_stack: Stack, tmp_path: Path
) -> None:
    run = convmae.run("consolidated-by-tasks")
    material = random_material(6_000_000, tensor_elements=900_000)
    commit_state(run, named_recipe("tiny"), material, step=5, stage=3, world_size=3)

    command = [sys.executable, "-c", ON_A_CLUSTER, run.url, str(9 << 20)]
    done = subprocess.run(command, env=convmae.environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    urls = done.stdout.split()
    by_tasks = {name: tensor for url in urls for name, tensor in load(run.storage.read(url)).items()}

    out, _ = convmae("consolidate", run.name)
    assert "step 5: s3://" in out
    here = load(run.storage.read(consolidated_url(run, 5)))
    assert len(urls) > 2
    assert by_tasks.keys() == here.keys()
    assert all(torch.equal(by_tasks[name], tensor) for name, tensor in here.items())


class Watch:
    """The most resident memory of each process below one, measured from outside."""

    def __init__(self, process: psutil.Popen) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self._process = process
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while self._process.poll() is None:
            try:
                for process in [self._process, *self._process.children(recursive=True)]:
                    name = f"{(process.cmdline() or ['ended'])[0]} {process.pid}"
                    self.peaks[name] = max(self.peaks[name], process.memory_info().rss)
            except psutil.Error:
                continue

    def of(self, prefix: str) -> list[int]:
        """Peaks of the processes whose name begins so."""
        self._thread.join()
        return [peak for name, peak in self.peaks.items() if name.startswith(prefix)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_process_needs_300_mb_for_a_checkpoint_of_two_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    with local_s3(tmp_path / "s3") as server:
        run = RunDirectory.of(server.storage, f"{server.url}/runs", "large")
        commit = commit_state(run, named_recipe("tiny"), random_material(190_000_000), step=5, stage=2, world_size=2)
        assert commit.bytes >= 2 << 30
        environment = _environment(server.storage, tmp_path)

        for arguments in ([], ["--dtype", "bf16"], ["--dtype", "fp16", "--shard-bytes", "100MB"]):
            command = [sys.executable, "-m", "jobs.cli.main", "consolidate", run.url, *arguments]
            with psutil.Popen(command, env=environment) as process:
                watch = Watch(process)
            assert process.returncode == 0
            assert max(watch.of("")) < 300e6, watch.peaks

        run.storage.delete(f"{run.path('consolidated', 'step-00000005.safetensors')}.sha256")
        with psutil.Popen([sys.executable, "-c", BY_ITSELF, run.url], env=environment) as process:
            watch = Watch(process)
        assert process.returncode == 0
        assert watch.of("ray::work")
        assert max([*watch.of("ray::work"), *watch.of(sys.executable)]) < 300e6, watch.peaks


def _environment(storage: Storage, home: Path) -> dict[str, str]:
    assert storage.endpoint_url and storage.key and storage.secret and storage.region
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))}
    return {
        **clean,
        "AWS_ENDPOINT_URL": storage.endpoint_url,
        "AWS_ACCESS_KEY_ID": storage.key,
        "AWS_SECRET_ACCESS_KEY": storage.secret,
        "AWS_REGION": storage.region,
        "CONVMAE_HOME": str(home / "no-stack"),
    }
