"""Commands on runs of half a million steps and 300 attempts, on a local S3 server: `make bench-history`.

Of each command: wall seconds and CPU seconds of the process, from its start to its end; its peak memory; requests of
storage. On a run without a step (what Python, its imports and the first requests cost), and on two long ones before
and after their parts were compacted. `list` lists all of them and 20 more. The runs have no checkpoint: `report` draws
the page, and computes no picture of reconstructions.

    python benchmarks/bench_history.py [--steps N] [--attempts N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from local_s3 import LocalS3, local_s3
from long_run import LongRun

from jobs.run.directory import RunDirectory

OTHERS = 20
"""Short runs that `list` finds besides."""
COMMANDS = {
    "status": ["status", "{run}"],
    "status --json": ["status", "{run}", "--json"],
    "list": ["list"],
    "quarantine": ["quarantine", "{run}"],
    "report": ["report", "{run}"],
    "compare": ["compare", "{run}", "{other}", "--json"],
    "diff": ["diff", "{run}", "{other}"],
    "export metrics": ["export", "{run}", "--format", "metrics", "--out", "{folder}/tables", "--force"],
    "history": ["history", "{run}"],
    "history --json": ["history", "{run}", "--json"],
}
PAGE = "page"
"""The page of a run, as `convmae ui` draws it; then again, with a step more."""
_LAUNCHER = """
import json, os, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": time.perf_counter() - began, "cpu_seconds": used.ru_utime + used.ru_stime,
                  "peak_bytes": 1024 * used.ru_maxrss, "code": code}))
"""
"""A process's peak begins with that of the one that started it, so the one that does must be small."""


def measured(script: str, arguments: list[str], environ: Mapping[str, str], folder: Path) -> dict[str, float]:
    """One command, in a process of its own."""
    counts = folder / "requests.json"
    command = [sys.executable, str(Path(__file__).with_name(script)), str(counts), *arguments]
    launched = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *command], env=environ, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(launched.stdout)
    assert found["code"] == 0, (arguments, launched.stderr)
    return {**found, **json.loads(counts.read_text())}


def environment(server: LocalS3, folder: Path) -> dict[str, str]:
    """Of the commands: the server, and nothing of this machine's user."""
    settings = server.settings
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HOME": str(folder),
        "CONVMAE_HOME": str(folder / "home"),
        "CONVMAE_RUN_ROOT": f"{server.url}/runs",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{settings.ports.s3}",
        "AWS_ACCESS_KEY_ID": settings.access_key,
        "AWS_SECRET_ACCESS_KEY": settings.secret_key,
        "AWS_REGION": "us-east-1",
    }


def bench(names: tuple[str, str], environ: Mapping[str, str], folder: Path, rounds: int, what: str) -> None:
    """Every command on a run, and with another where it takes two."""
    print(f"-- {what}\n{'command':<16} {'seconds':>8} {'CPU s':>8} {'peak MB':>8} {'requests':>9}", flush=True)
    for title, command in {**COMMANDS, PAGE: ["{run}"]}.items():
        script = "drawn_page.py" if title == PAGE else "counted_command.py"
        arguments = [each.format(run=names[0], other=names[1], folder=folder) for each in command]
        found = [measured(script, arguments, environ, folder) for _ in range(rounds)]
        middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
        print(
            f"{title:<16} {middle['seconds']:>8.2f} {middle['cpu_seconds']:>8.2f} "
            f"{middle['peak_bytes'] / 1e6:>8.0f} {middle['requests']:>9.0f}",
            flush=True,
        )
        if title == PAGE:
            print(f"{'  of it, again':<16} {middle['again_seconds']:>8.2f} {middle['again_cpu_seconds']:>8.2f}")


def compact(run: RunDirectory, attempt: int) -> None:
    """As the monitor of a run's newest attempt does from time to time, all at once."""
    began, cpu, rounds = time.perf_counter(), time.process_time(), 0
    while run.compact(attempt, 0, lambda: True):
        rounds += 1
    names = run.storage.list_names(run.path("history"))
    print(
        f"{run.name}: {rounds} compactions in {time.perf_counter() - began:.1f} s, "
        f"{time.process_time() - cpu:.1f} CPU s; {len(names)} objects are left of the history",
        flush=True,
    )


def main() -> None:
    """Make the runs, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--attempts", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("empty", "parts", "compacted"), help="one of the three tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convmae-bench-history-") as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with local_s3(folder / "s3") as server:
            environ = environment(server, folder)
            runs = [RunDirectory.of(server.storage, f"{server.url}/runs", each) for each in ("one", "two")]
            none = RunDirectory.of(server.storage, f"{server.url}/runs", "none")
            for each in (none, *(RunDirectory.of(server.storage, none.root, f"short-{n:02d}") for n in range(OTHERS))):
                LongRun(steps=10, attempts=1).write(each)
            for each in runs:
                LongRun(options.steps, options.attempts).write(each)
            if options.only in (None, "empty"):
                bench(("none", "none"), environ, folder, options.rounds, "a run of ten steps")
            if options.only in (None, "parts"):
                bench(("one", "two"), environ, folder, options.rounds, "before any compaction")
            for each in runs:
                compact(each, options.attempts)
            if options.only in (None, "compacted"):
                bench(("one", "two"), environ, folder, options.rounds, "compacted")


if __name__ == "__main__":
    main()
