"""The cost of the same bits at any world size, against gradients as DeepSpeed reduces them: `make bench-grains`.

Both sides train the same model on the same images, in the same processes and in turn; the other side has micro-batches
of as many images as a grain. Printed are medians over rounds of rank 0's CPU seconds, and of the seconds that passed.

    python benchmarks/bench_grains.py [--preset small] [--images 8] [--grain 4] [--worlds 1 2] [--rounds 7]
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

from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.recipe import Recipe

GOAL = 0.03
"""Share of a step's CPU time that exact gradients may add."""
_RANK = Path(__file__).with_name("grain_rank.py")

Rounds = dict[str, list[tuple[float, float]]]


def bench_recipe(preset: str, images: int, grain: int) -> Recipe:
    """A recipe of the model, on the CPU."""
    fields: dict[str, Any] = {"model.preset": preset, "global_batch_size": images, "lanes": images // grain}
    return named_recipe("tiny").amended({**fields, "micro_batch_size": grain, "max_workers": 1})


def measure(recipe: Recipe, world_size: int, rounds: int) -> Rounds:
    """What each step took on rank 0, by side."""
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "meeting-point").as_uri()
        settings = {"recipe": recipe.to_json(), "rounds": rounds, "meeting_point": meeting_point}
        environment = {**os.environ, "BENCH_SETTINGS": json.dumps(settings), "WORLD_SIZE": str(world_size)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(_RANK)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        out = [process.communicate()[0] for process in ranks]
    assert not any(process.returncode for process in ranks)
    found: Rounds = json.loads(out[0].strip().splitlines()[-1])
    return found


def cost(rounds: Rounds) -> float:
    """Share of the CPU time that exact gradients add: the median over rounds, of which each has both sides."""
    pairs = zip(rounds["bits"], rounds["rounding"], strict=True)
    return statistics.median(ours[0] / theirs[0] for ours, theirs in pairs) - 1


def medians(rounds: Rounds, index: int) -> dict[str, float]:
    """Of CPU seconds (0) or of those that passed (1), by side."""
    return {side: statistics.median(step[index] for step in steps) for side, steps in rounds.items()}


def main() -> None:
    """Measure at each world size, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--images", type=int, default=8, help="in a global batch")
    parser.add_argument("--grain", type=int, default=4)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    recipe = bench_recipe(options.preset, options.images, options.grain)
    print(f"ConvMAE-{options.preset}, fp32, {options.images} images in grains of {options.grain}, one thread")
    for world_size in options.worlds:
        rounds = measure(recipe, world_size, options.rounds)
        cpu, passed = (medians(rounds, index) for index in (0, 1))
        added = cost(rounds)
        verdict = "reached" if added <= GOAL else "NOT reached"
        print(
            f"{world_size} ranks: {cpu['bits']:.3f} CPU s a step exact, {cpu['rounding']:.3f} by DeepSpeed:"
            f" {added:+.1%}  (goal <= {GOAL:.0%}: {verdict});"
            f" {passed['bits']:.3f} and {passed['rounding']:.3f} s passed"
        )


if __name__ == "__main__":
    main()
