"""Consolidating a checkpoint from S3 to S3, against DeepSpeed's own tool: `make bench-consolidate`.

Both sides start from the same ZeRO files on a local S3 server, and end with one fp32 safetensors file and its SHA-256
there. The stock side is what one does without us: fetch the files, run `zero_to_fp32`'s conversion, put the result
back. Each side is a fresh process, as a person would start it; rounds are interleaved. Wall seconds, CPU seconds of
the process and of the server, and peak resident memory are measured from outside. Results are compared bit by bit.

    python benchmarks/bench_consolidate.py [--preset base] [--stage 1] [--world 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from consolidate_sides import STEP
from local_s3 import LocalS3, local_s3
from zero_material import commit_state, commit_zero_files, model_material, write_zero_files

from jobs.checkpoint.commit import Commit
from jobs.consolidation.target import consolidated_url
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

GOAL = 3.0
SIDES = Path(__file__).with_name("consolidate_sides.py")
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    wall_seconds: float
    cpu_seconds: float
    server_cpu_seconds: float
    peak_bytes: int
    stages: dict[str, float]
    """Wall seconds of what the process did, one after the other."""


def measured(side: str, server: LocalS3, run: RunDirectory, result_url: str) -> Measured:
    """Run one side in a process of its own and watch it."""
    store = psutil.Process(server.pid)
    settings = {"storage": server.storage.to_json(), "run": run.url, "result": result_url}
    environment = {**os.environ, "BENCH_SETTINGS": json.dumps(settings)}
    before, began = _cpu(store), time.perf_counter()
    process = psutil.Popen(
        [sys.executable, str(SIDES), side],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = cpu = 0.0
    while process.poll() is None:
        try:
            peak, cpu = max(peak, process.memory_info().rss), _cpu(process)
        except psutil.Error:
            break
        time.sleep(_POLL_SECONDS)
    wall = time.perf_counter() - began
    out, err = process.communicate()
    assert process.returncode == 0, err
    stages = json.loads(out.strip().splitlines()[-1])
    return Measured(wall, cpu, _cpu(store) - before, int(peak), stages)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Print what each side takes, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", help="of the model: tiny, small, base, large, huge")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.preset, options.stage, options.world, options.rounds)


def compare(folder: Path, preset: str, stage: int, world: int, rounds: int) -> dict[str, list[Measured]]:
    """Make a checkpoint, run both sides `rounds` times in turn, and print what they take."""
    (folder / "s3").mkdir()
    with local_s3(folder / "s3") as server:
        runs = {side: RunDirectory.of(server.storage, f"{server.url}/runs", side) for side in ("ours", "stock")}
        commit = _checkpoints(runs, folder / "checkpoint", preset, stage, world)
        print(f"{preset}, ZeRO-{stage}, {world} ranks: {commit.bytes / 1e6:.0f} MB of checkpoint", flush=True)
        result_url = f"{server.url}/stock/model.safetensors"
        found: dict[str, list[Measured]] = {side: [] for side in runs}
        for _ in range(rounds):
            for side, measurements in found.items():
                measurements.append(measured(side, server, runs[side], result_url))
                print(f"{side:<6} {measurements[-1].wall_seconds:7.2f} s", flush=True)
        same_tensors(server.storage, consolidated_url(runs["ours"], STEP), result_url)
    report(found)
    return found


def _checkpoints(runs: Mapping[str, RunDirectory], folder: Path, preset: str, stage: int, world: int) -> Commit:
    """The same weights as a checkpoint of ours and as one of DeepSpeed's own files; returns the former's commit."""
    from model import ConvMAE

    recipe = named_recipe("convmae_base").amended({"model.preset": preset, "zero_stage": stage})
    material = model_material(ConvMAE(recipe.model))
    write_zero_files(folder, material, stage, world)
    commit_zero_files(runs["stock"], recipe, folder, step=STEP, stage=stage, world_size=world)
    shutil.rmtree(folder)
    return commit_state(runs["ours"], recipe, material, step=STEP, stage=stage, world_size=world)


def same_tensors(storage: Storage, ours_url: str, stock_url: str) -> None:
    """Compare the results bit by bit; the stock tool forgets the frozen parameters of ZeRO 1."""
    import torch
    from safetensors.torch import load

    ours_found, stock_found = load(storage.read(ours_url)), load(storage.read(stock_url))
    assert stock_found.keys() <= ours_found.keys()
    assert all(torch.equal(ours_found[name], tensor) for name, tensor in stock_found.items())


def report(found: dict[str, list[Measured]]) -> None:
    """Print medians, and each round's wall seconds."""
    for side, rows in found.items():
        wall, cpu, server = (
            statistics.median(getattr(row, name) for row in rows)
            for name in ("wall_seconds", "cpu_seconds", "server_cpu_seconds")
        )
        peak = max(row.peak_bytes for row in rows) / 1e6
        rounds = " ".join(f"{row.wall_seconds:.2f}" for row in rows)
        costs = f"{wall:7.2f} s wall  {cpu:6.2f} s CPU  {server:6.2f} s of the server's  {peak:6.0f} MB"
        print(f"{side:<6} {costs}  ({rounds})")
        stages = {name: statistics.median(row.stages[name] for row in rows) for name in rows[0].stages}
        print("       " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items()))
    ratios = [
        (
            name,
            statistics.median(getattr(row, name) for row in found["stock"]),
            statistics.median(getattr(row, name) for row in found["ours"]),
        )
        for name in ("wall_seconds", "cpu_seconds", "peak_bytes")
    ]
    print("stock / ours: " + ", ".join(f"{theirs / own:.2f} {name.replace('_', ' ')}" for name, theirs, own in ratios))
    wall_ratio = ratios[0][1] / ratios[0][2]
    print(f"goal, {GOAL:g} times in wall time: {'reached' if wall_ratio >= GOAL else 'not reached'}")


if __name__ == "__main__":
    main()
