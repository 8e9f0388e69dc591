"""The pause of training for a checkpoint, against DeepSpeed's own synchronous save: `make bench-checkpoint`.

Two ranks train ConvMAE-Base on noise under gloo and save to a local S3 server. Ours copies in memory, and uploads while
steps continue; the other side is `engine.save_checkpoint` and an upload of the same files before the next step,
since DeepSpeed writes no objects. Both sides take turns in the same processes. Printed are medians over rounds of what
rank 0 paused, of the time until the checkpoint was in the store, and how much slower steps were meanwhile.

    python benchmarks/bench_checkpoint.py [--preset base] [--stages 1 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from local_s3 import local_s3

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

GOAL = 0.02
"""Share of the interval between checkpoints that training may pause."""
WORLD_SIZE = 2
_RANK = Path(__file__).with_name("checkpoint_rank.py")

Found = dict[str, Any]


def measure(recipe: Recipe, storage: Storage, run_url: str, rounds: int, folder: Path) -> Found:
    """Figures that rank 0 measured."""
    settings = {
        "recipe": recipe.to_json(),
        "storage": storage.to_json(),
        "run": run_url,
        "rounds": rounds,
        "meeting_point": (folder / f"meet-{recipe.zero_stage}").as_uri(),
    }
    environment = {**os.environ, "BENCH_SETTINGS": json.dumps(settings), "WORLD_SIZE": str(WORLD_SIZE)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_RANK)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=(folder / f"rank-{rank}.log").open("ab"),
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    out = [process.communicate()[0] for process in ranks]
    assert not any(process.returncode for process in ranks), (folder / "rank-0.log").read_text()[-3000:]
    found: Found = json.loads(out[0].strip().splitlines()[-1])
    return found


def report(recipe: Recipe, found: Found) -> list[str]:
    """Lines for one ZeRO stage."""
    step = statistics.median(found["plain"])
    stall = {side: statistics.median(row["stall"] for row in found[side]) for side in ("ours", "stock")}
    stored = {side: statistics.median(row["until_commit"] for row in found[side]) for side in ("ours", "stock")}
    slower = statistics.median(row["slowed"] / max(1, row["steps"]) for row in found["ours"]) / step
    share = stall["ours"] / (recipe.checkpoint_every_steps * step)
    each = {side: " ".join(f"{row['stall']:.2f}" for row in found[side]) for side in ("ours", "stock")}
    return [
        f"ZeRO-{recipe.zero_stage}: {found['bytes'] / 1e6:.0f} MB, a step takes {step:.2f} s",
        *(
            f"  {side:<6} training pauses {stall[side]:6.2f} s, stored after {stored[side]:6.2f} s ({each[side]})"
            for side in ("ours", "stock")
        ),
        f"  stock / ours: {stall['stock'] / stall['ours']:.1f} times the stall; steps during an upload take "
        f"{slower:.2f} times as long here, where the server shares the cores",
        f"  {share:.3%} of the default interval of {recipe.checkpoint_every_steps} steps at that speed "
        f"(goal {GOAL:.0%}: {'reached' if share < GOAL else 'not reached'}); "
        f"{GOAL:.0%} of any interval from {stall['ours'] / GOAL:.0f} s on",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", help="of the model: tiny, small, base, large, huge")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], choices=(1, 2, 3))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convmae-bench-checkpoint-") as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with local_s3(folder / "s3") as server:
            for stage in options.stages:
                batch = options.micro_batch_size
                changes = {
                    "model.preset": options.preset,
                    "zero_stage": stage,
                    "precision": "fp32",
                    "device": "cpu",
                    "micro_batch_size": batch,
                    "global_batch_size": batch * WORLD_SIZE,
                    "lanes": WORLD_SIZE,
                    "max_workers": WORLD_SIZE,
                    "min_workers": 1,
                }
                recipe = named_recipe("convmae_base").amended(changes)
                run = RunDirectory.of(server.storage, f"{server.url}/runs", f"zero-{stage}")
                found = measure(recipe, server.storage, run.url, options.rounds, folder)
                print("\n".join(report(recipe, found)), flush=True)


if __name__ == "__main__":
    main()
