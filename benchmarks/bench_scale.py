"""The cost of a thousand ranks: measured where one machine can, laid out on paper where it cannot: `make bench-scale`.

`restore`: ConvMAE-Base from a local S3 server at other world sizes than wrote it, on gloo: from our files, and from
DeepSpeed's own, in which places must be looked up first, in turn in the same processes.
`layout`: requests and bytes of up to 1,024 ranks by the same rules on files that were never written. `figures`: what
the figures of ranks cost in a step and a scrape. `deletes`: a checkpoint of 1,024 ranks. `polls`: what Ray Train's
controller spends on asking a worker, by stand-in actors.

    python benchmarks/bench_scale.py [restore layout figures deletes polls]
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from local_s3 import local_s3
from restore_group import restore_group, shapes_of
from restore_rank import Shapes
from scale_layout import restoring
from zero_material import commit_state, commit_zero_files, model_material, write_zero_files

from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from model import ConvMAE
from pipeline.store.storage import Storage

SIDES = ("ours", "DeepSpeed's")
RESTORES = [(4, 2), (2, 4)]
LAYOUTS = [(64, 64), (256, 256), (1024, 1024), (1000, 1024)]
WORLD_SIZES = (1, 64, 1024)
CHECKPOINT_FILES = 2048
ACTORS = (2, 8, 16)
POLLS = 50


def cpu_of(work: Callable[[], Any], times: int = 20) -> float:
    """CPU microseconds of this process, the fewest of some rounds."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(times):
            work()
        found.append((time.process_time() - began) / times)
    return min(found) * 1e6


def bench_restore(recipe: str, rounds: int, *, local: bool) -> None:
    """Both ways, in turn."""
    material = model_material(ConvMAE(named_recipe(recipe).model))
    with tempfile.TemporaryDirectory(prefix="convmae-bench-scale-") as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with contextlib.nullcontext() if local else local_s3(folder / "s3") as server:
            storage, root = (server.storage, server.url) if server else (Storage(), str(folder / "store"))
            for stage in (1, 3):
                for before, now in RESTORES:
                    runs = {
                        side: RunDirectory.of(storage, f"{root}/{side}", f"zero-{stage}-of-{before}") for side in SIDES
                    }
                    fields: dict[str, Any] = {"step": 10, "stage": stage, "world_size": before}
                    files, tiny = folder / f"zero-{stage}-of-{before}", named_recipe("tiny")
                    write_zero_files(files, material, stage, before)
                    commits = {
                        "ours": commit_state(runs["ours"], tiny, material, **fields),
                        "DeepSpeed's": commit_zero_files(runs["DeepSpeed's"], tiny, files, **fields),
                    }
                    shutil.rmtree(files)
                    found: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
                    with restore_group(now, folder) as group:
                        for _ in range(rounds):
                            for side, rows in found.items():
                                rows.append(group.restore(runs[side], shapes_of(material), stage))
                    for side, rows in found.items():
                        seconds = [max(answer["seconds"] for answer in row) for row in rows]
                        cpu = [sum(answer["cpu_seconds"] for answer in row) for row in rows]
                        requests = sum(answer["requests"] for answer in rows[0])
                        size = commits[side].bytes
                        times = sum(answer["read_bytes"] for answer in rows[0]) / size
                        print(
                            f"ZeRO {stage}, {before} -> {now} ranks, {side:<11} {statistics.median(seconds):6.2f} s, "
                            f"{statistics.median(cpu):6.2f} CPU s of all ranks, {requests:4} requests, "
                            f"{times:.2f} times the checkpoint's {size / 1e6:.0f} MB",
                            flush=True,
                        )


def bench_layout() -> None:
    """On paper."""
    with torch.device("meta"):
        model = ConvMAE(named_recipe("convmae_base").model)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad}
    groups: list[Shapes] = [
        {name: shape for name, shape in shapes.items() if len(shape) > 1},
        {name: shape for name, shape in shapes.items() if len(shape) <= 1},
    ]
    for stage in (1, 3):
        for before, now in LAYOUTS:
            found = restoring(groups, stage, before, now)
            print(
                f"ZeRO {stage}, {before:>4} -> {now:>4} ranks: {found.requests:7,.0f} requests, "
                f"{found.read_bytes / found.checkpoint_bytes:.2f} times the {found.checkpoint_bytes / 1e6:,.0f} MB; "
                f"the commit has {found.commit_bytes / 1e3:,.0f} kB, of which a rank is sent "
                f"{found.sent_bytes / 1e3:,.0f} kB, and plans for {found.plan_seconds:.2f} CPU s",
                flush=True,
            )


def as_it_was(words: torch.Tensor) -> tuple[Any, ...]:
    """Figures of a step as they were: each rank's words as a list, sums as a list, a tuple of each rank's figures."""
    from jobs.metrics.rank_figures import RankFigures

    summed = torch.tensor([0.0] * words.numel(), dtype=torch.float64).tolist()
    return tuple(RankFigures(*summed[at : at + 9]) for at in range(9, len(summed), 9))


def figure_costs(ranks: int) -> dict[str, float]:
    """CPU microseconds."""
    from prometheus_client import CollectorRegistry, generate_latest

    from jobs.metrics.exporter import RankSeries
    from jobs.metrics.rank_figures import RankFigures
    from jobs.rank.watchdog import HangWatch, Pulse
    from jobs.step.step_reading import RankReading, from_words, slowest, word_count
    from pipeline.load.read_counters import ReadCounters

    probe: Any = SimpleNamespace(poll=lambda: SimpleNamespace(metrics={}))
    dataset: Any = SimpleNamespace(counters=ReadCounters(), cache=None)
    batch: Any = SimpleNamespace(wait_seconds=0.0, read_wait_seconds=0.0, substitutions=[])
    reading, words = RankReading(dataset, 0, device=torch.device("cpu")), torch.zeros(word_count(ranks)).double()
    table = from_words(words.numpy())[1]
    parsed = tuple(RankFigures(*row) for row in table.tolist())
    series, registry = RankSeries("run", clock=lambda: 0.0), CollectorRegistry()
    registry.register(series)
    series.update(table)
    watch = HangWatch(600.0)
    watch.begin(1)
    pulses = [Pulse(1, rank, "host", "node", 1, 0.0, "", "step", 5, 0.0) for rank in range(ranks)]
    for pulse in pulses:
        watch.hear(pulse, 0.0)
    return {
        "every rank, a step: write": cpu_of(lambda: reading.write(words.numpy(), batch, probe)),
        "as it was: lists of all ranks, and tuples": cpu_of(lambda: as_it_was(words)),
        "rank 0, a step: parse and pack": cpu_of(
            lambda: (slowest(from_words(words.numpy())[1], "step_seconds"), pickle.dumps(table))
        ),
        "as it was: pack tuples": cpu_of(lambda: pickle.dumps(parsed)),
        "monitor, a step: unpack and keep": cpu_of(lambda: series.update(pickle.loads(pickle.dumps(table)))),
        "monitor, a scrape": cpu_of(lambda: generate_latest(registry), 2),
        "monitor, pulses of all ranks, each 10 s": cpu_of(lambda: [watch.hear(pulse, 0.0) for pulse in pulses], 5),
        "monitor, who hangs? each second": cpu_of(lambda: watch.hangs(1.0), 5),
    }


def bench_figures() -> None:
    """By rank, in a step and a scrape."""
    from jobs.step.step_reading import word_count

    for ranks in WORLD_SIZES:
        print(f"{ranks} ranks, {word_count(ranks) * 8 / 1e3:.1f} kB in the all-reduce of a step")
        for what, microseconds in figure_costs(ranks).items():
            print(f"  {what:<42} {microseconds:9,.0f} us of CPU", flush=True)


def bench_deletes() -> None:
    """One after the other, and several at once."""
    with tempfile.TemporaryDirectory(prefix="convmae-bench-scale-") as name, local_s3(Path(name)) as server:
        for way in ("one after the other", "several at once"):
            urls = [f"{server.url}/files/{number:05d}" for number in range(CHECKPOINT_FILES)]
            for url in urls:
                server.storage.write(url, b"x")
            began, cpu = time.perf_counter(), time.process_time()
            if way == "several at once":
                server.storage.delete_all(urls)
            else:
                for url in urls:
                    server.storage.delete(url)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(f"{len(urls)} files, {way:<20} {seconds:6.2f} s, {cpu:5.2f} CPU s", flush=True)


def bench_polls() -> None:
    """As Ray Train's controller asks: all at once, and waits for the answers."""
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def status(self) -> dict[str, Any]:
            return {"running": True, "error": None, "training_report": None}

    with tempfile.TemporaryDirectory(prefix="convmae-bench-scale-") as folder:
        ray.init(
            num_cpus=1,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        try:
            workers: list[Any] = []
            for count in ACTORS:
                workers += [Worker.remote() for _ in range(count - len(workers))]  # type: ignore[attr-defined]
                ray.get([worker.status.remote() for worker in workers])
                cpu = time.process_time()
                for _ in range(POLLS):
                    asked = [worker.status.remote() for worker in workers]
                    ray.wait(asked, num_returns=len(asked))
                    ray.get(asked)
                each = (time.process_time() - cpu) / POLLS / count
                print(
                    f"{count:>3} workers: {each * 1e6:5.0f} us of CPU a worker and poll; 1,024 workers twice a second: "
                    f"{each * 1024 * 2:.0%} of a core, once a second {each * 1024:.0%}",
                    flush=True,
                )
        finally:
            ray.shutdown()


def main() -> None:
    """Measure and print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of those above; all if none")
    parser.add_argument("--recipe", default="convmae_base", help="whose model is restored")
    parser.add_argument("--local", action="store_true", help="restore from a local folder, not from S3")
    parser.add_argument("--rounds", type=int, default=3, help="of restoring")
    options = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "figures": bench_figures,
        "layout": bench_layout,
        "deletes": bench_deletes,
        "polls": bench_polls,
        "restore": lambda: bench_restore(options.recipe, options.rounds, local=options.local),
    }
    for name in options.parts or parts:
        print(f"-- {name}", flush=True)
        parts[name]()


if __name__ == "__main__":
    main()
