"""What a GPU makes of the model: images a second, MFU, memory and seconds a step, as one table and one JSON file.

Sides: ConvMAE on visible patches ("sparse"), the same compiled, the dense reference, which does what the official code
does, and MAE with fused attention; forward, backward, no optimizer. MFU is by the operations that PyTorch counts in the
side's own step, over the card's dense peak. Then the cost of deterministic kernels, and what a loader delivers here.
Needs torch with CUDA and NumPy; the loader needs the whole package.

    python benchmarks/bench_gpu.py [--preset base] [--batches 32 64 128 256 512] [--json bench-gpu.json] [--images DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_model import COMPILED, DENSE, MAE_FUSED, SPARSE, Side
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS
from model.device_peak import sheet_peak

COMPILED_BATCHES = 2
"""Compiling takes a minute for each size: only the largest few that fit are."""
DETERMINISM_BATCH, LOADED_IMAGES = 64, 4096

Row = dict[str, Any]


def options_of(options: argparse.Namespace, batch: int) -> argparse.Namespace:
    """What a side is made with."""
    return argparse.Namespace(preset=options.preset, batch=batch, device=options.device)


def seconds_of(side: Side, rounds: int) -> float:
    """Median of a step, after two that warm up."""
    took = []
    for number in range(rounds + 2):
        began = time.perf_counter()
        side.step()
        if number >= 2:
            took.append(time.perf_counter() - began)
        side.clear()
    return statistics.median(took)


def flops_of(side: Side) -> int:
    """Operations of a step."""
    with FlopCounterMode(display=False) as counter:
        side.step()
    side.clear()
    return counter.get_total_flops()


def measured(name: str, precision: str, batch: int, options: argparse.Namespace, card: str) -> Row | None:
    """One row; None where the memory is not enough."""
    try:
        side = Side(name, precision, options_of(options, batch))
        flops = flops_of(Side(SPARSE, precision, options_of(options, batch)) if name == COMPILED else side)
        seconds = seconds_of(side, options.rounds)
        memory = side.peak_bytes()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    peak = sheet_peak(card, torch.float32 if precision == "fp32" else torch.bfloat16)
    mfu = flops / seconds / peak if peak else None
    row = {
        "side": name,
        "precision": precision,
        "batch": batch,
        "seconds": seconds,
        "images_per_second": batch / seconds,
    }
    return {**row, "mfu": mfu, "peak_bytes": memory}


def rows_of(options: argparse.Namespace, card: str) -> Iterator[Row]:
    """All sides, precisions and batches, the largest first."""
    for precision in options.precisions:
        for name in (SPARSE, COMPILED, DENSE, MAE_FUSED):
            fitted = 0
            for batch in sorted(options.batches, reverse=True):
                if name == COMPILED and (fitted == COMPILED_BATCHES or options.no_compile):
                    break
                row = measured(name, precision, batch, options, card)
                if row is None:
                    print(f"{name:20}{precision:6}{batch:6}  not enough memory", flush=True)
                    continue
                fitted += 1
                mfu = f"{row['mfu']:7.1%}" if row["mfu"] else "      -"
                figures = f"{row['images_per_second']:10.0f}{1e3 * row['seconds']:9.1f}{mfu}"
                print(f"{name:20}{precision:6}{batch:6}{figures}{row['peak_bytes'] / 1e9:8.2f}", flush=True)
                yield row


def determinism_cost(options: argparse.Namespace) -> float:
    """Share that deterministic kernels add to a step of bf16: the median over interleaved rounds."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    side, ratios = Side(SPARSE, "bf16", options_of(options, min(DETERMINISM_BATCH, max(options.batches)))), []
    try:
        for _ in range(options.rounds):
            took = []
            for deterministic in (True, False):
                torch.use_deterministic_algorithms(deterministic)
                took.append(seconds_of(side, 1))
            ratios.append(took[0] / took[1])
    finally:
        torch.use_deterministic_algorithms(False)
    return statistics.median(ratios) - 1


def loader_speed(options: argparse.Namespace) -> Row:
    """Images a second that our loader hands to the device, by as many threads as there are CPUs."""
    from loader_material import make_material, write_shards
    from loader_sides import SEED, SIDE

    from pipeline.ingest.sources import find_sources
    from pipeline.load.dataset import Dataset
    from pipeline.load.loader import Loader
    from pipeline.order.sample_order import Order
    from pipeline.store.storage import Storage

    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        material = make_material(options.images, LOADED_IMAGES, Path(folder))
        write_shards(Storage(), find_sources(Storage(), material.folder), material.shards)
        dataset = Dataset.open(Storage(), material.shards)
        order = Order(dataset.manifest.samples, global_batch_size=64, lanes=1, seed=SEED)
        device = torch.device(options.device)
        loader = Loader(
            dataset, order, image_shape=(SIDE, SIDE), seed=SEED, rank=0, world_size=1, threads=threads, device=device
        )
        count = 0
        began = time.perf_counter()
        for batch in loader.batches(0, 2 * order.steps_per_epoch):
            count += len(batch.images)
        return {"images_per_second": count / (time.perf_counter() - began), "threads": threads}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=[name for name in PRESETS if name != "mae_base"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", default="bench-gpu.json")
    parser.add_argument("--images", help="a folder of photographs for the loader; made up without")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print the table, and write the file after every part."""
    options = parse(arguments)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    torch.backends.fp32_precision = "ieee"
    print(f"ConvMAE-{options.preset} on {card}, torch {torch.__version__}, fp32 without TF32")
    print(f"{'':20}{'':6}{'batch':>6}{'images/s':>10}{'ms':>9}{'MFU':>7}{'GB':>8}")
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "preset": options.preset, "rows": []}

    def note(**more: Any) -> None:
        found.update(more)
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")

    for row in rows_of(options, card):
        note(rows=[*found["rows"], row])
    note(determinism_cost=determinism_cost(options))
    print(f"deterministic kernels: {found['determinism_cost']:+.1%} of a step (sparse, bf16)")
    try:
        note(loader=loader_speed(options))
        print("loader: {images_per_second:.0f} images/s with {threads} threads".format(**found["loader"]))
    except ModuleNotFoundError as error:
        print(f"loader: not measured, {error.name} is not installed")
    print(f"written: {options.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
