"""The two sides of bench_consolidate, each a program: `consolidate_sides.py ours|stock`.

Imports nothing that a side does not need itself: what it imports is part of its time and memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.checkpoint import checkpoint
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

STEP = 100


def stock(storage: Storage, run_url: str, result_url: str) -> dict[str, float]:
    """Consolidate with DeepSpeed's own tool; returns the seconds of its stages."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    began = time.perf_counter()
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    seconds = {"import": time.perf_counter() - began}
    run = RunDirectory(storage, run_url)
    commit = checkpoint.read_commit(run, STEP)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "checkpoint", "tag")
        files.mkdir(parents=True)

        def fetch(name: str) -> None:
            storage.download(run.path("checkpoints", checkpoint.folder_name(STEP), name), files / name)

        with _timed(seconds, "fetch"), ThreadPoolExecutor(4) as threads:
            list(threads.map(fetch, [file.name for file in commit.files]))
        with _timed(seconds, "convert"):
            convert_zero_checkpoint_to_state_dict(
                str(files.parent), folder, max_shard_size=None, safe_serialization=True, tag="tag"
            )
        result = Path(folder, "model.safetensors")
        with _timed(seconds, "hash"), result.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with _timed(seconds, "upload"):
            storage.upload(result, result_url)
            storage.write(f"{result_url}.sha256", sha256.encode())
    return seconds


def ours(storage: Storage, run_url: str) -> dict[str, float]:
    """`convmae consolidate --force`; returns the seconds of its stages."""
    began = time.perf_counter()
    from jobs.consolidation.consolidate import consolidate, in_threads
    from jobs.consolidation.file_layout import PART_BYTES
    from jobs.consolidation.target import Target
    from jobs.consolidation.writer import ConsolidationProgress

    entered, stage = {"import": began}, "import"

    def note(name: str, _: ConsolidationProgress) -> None:
        nonlocal stage
        if name != stage:
            entered[name], stage = time.perf_counter(), name

    entered["plan"] = time.perf_counter()
    fan_out = in_threads(PART_BYTES, most=2 * (os.cpu_count() or 1))
    run = RunDirectory(storage, run_url)
    consolidate(run, STEP, Target(), if_exists="replace", fan_out=fan_out, on_progress=note)
    entered["end"] = time.perf_counter()
    names = list(entered)
    return {name: entered[after] - entered[name] for name, after in itertools.pairwise(names)}


class _timed:  # noqa: N801 (reads as a verb)
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._began


def main() -> None:
    """Run the side that the command line names, on what the environment says, and print its stages."""
    settings = json.loads(os.environ["BENCH_SETTINGS"])  # not in the command line: it has a secret
    storage = Storage.from_json(settings["storage"])
    stages = (
        ours(storage, settings["run"]) if sys.argv[1] == "ours" else stock(storage, settings["run"], settings["result"])
    )
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
