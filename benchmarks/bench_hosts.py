"""Time from a host that falls silent to the next step: `make bench-hosts`. As root, with iproute2.

Store, head and two workers of one CPU are hosts of their own on this machine. By turns a worker's cable is pulled, so
that no reset arrives anywhere, and a new worker takes its place: once on a cluster that was started plainly, and once
with the head's variables of `infra/ray-up/aws.yaml`. Printed are medians of what the run's own event log says.

    python benchmarks/bench_hosts.py [--rounds 3] [--calm-seconds 30]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import yaml
from bench_recovery import IMAGES, PATIENCE_SECONDS, Found, recovered, report, settle
from host_network import PROJECT, missing
from patience import done, wait_until
from ray_hosts import RayHosts, ray_hosts

from jobs.run.directory import RunDirectory

SETTINGS = {"silent, plain": False, "silent, infra": True}
"""Rows of the table, and whether nodes have the variables of infra/."""
GOALS = {"silent, plain": 30.0, "silent, infra": 20.0}
"""Seconds down at most."""


def measure(cluster: RayHosts, what: str, rounds: int, calm_seconds: float, found: Found) -> None:
    """Add events `recovered` of a run whose workers are cut off one after the other."""
    run = begin(cluster)
    settle(run)
    for _ in range(rounds):
        time.sleep(calm_seconds)
        attempt, lost = run.read_heartbeat()["attempt"], cluster.workers[-1]
        cluster.network.cut(lost)
        wait_until(what, lambda before=attempt: recovered(run, before) is not None, PATIENCE_SECONDS)
        (start,) = (event for event in run.read_events() if event["attempt"] == attempt + 1 and "steps_redone" in event)
        event = recovered(run, attempt)
        assert event
        found[what].append({**event, "steps_redone": start["steps_redone"]})
        print(f"{what}: {event['down_seconds']:.1f} s; {start['reason']}", file=sys.stderr, flush=True)
        cluster.remove(lost)
        cluster.add_worker()
        wait_until("two ranks", lambda: run.read_heartbeat().get("world_size") == 2, PATIENCE_SECONDS)
        settle(run)


def begin(cluster: RayHosts) -> RunDirectory:
    """Submit a run that lasts."""
    data = f"{cluster.url}/data"
    done(cluster.convmae(cluster.head, "shard", cluster.photographs(IMAGES), data, "--samples-per-shard", "128"))
    placed = ("cpus_per_worker=1.0", "epochs=100000", f"run_root={cluster.url}/runs", "checkpoint_every_steps=10")
    done(cluster.convmae(cluster.head, "submit", "tiny", f"data={data}", *placed, "--run", "silence"))
    return cluster.run("silence")


def infra_variables() -> Mapping[str, str]:
    """Variables that `infra/ray-up/aws.yaml` sets for Ray's head."""
    cluster = yaml.safe_load((PROJECT / "infra" / "ray-up" / "aws.yaml").read_text())
    options = cluster["docker"]["head_run_options"]
    return dict(option.removeprefix("--env ").split("=", 1) for option in options if option.startswith("--env RAY_"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calm-seconds", type=float, default=30.0, help="of training before each")
    arguments = parser.parse_args()
    if why := missing():
        sys.exit(why)
    found: Found = defaultdict(list)
    for what, is_tuned in SETTINGS.items():
        tuning = infra_variables() if is_tuned else {}
        with (
            tempfile.TemporaryDirectory(prefix="bench-hosts-") as folder,
            ray_hosts(Path(folder), workers=2, tuning=tuning) as cluster,
        ):
            measure(cluster, what, arguments.rounds, arguments.calm_seconds, found)
    print("\n".join(report(found, GOALS)))


if __name__ == "__main__":
    main()
