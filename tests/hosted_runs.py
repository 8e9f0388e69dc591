"""Runs on a cluster of hosts: started, watched, disturbed, and compared with an undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
from followed_runs import SPREAD, has_checkpoint, trains, until
from host import Host
from patience import done
from ray_hosts import RayHosts
from testbed import losses, small_recipe

from jobs.checkpoint.checkpoint import committed_steps, read_commit
from jobs.control.lease import is_live
from jobs.run.directory import FINAL_STATES, RunDirectory, list_runs
from jobs.run.trace import TracedStep, read_trace, traced_steps

FIELDS = {**SPREAD, "checkpoint_every_steps": 20, "standby": True}


class Runs:
    """Runs of one recipe and data set on a cluster, each with a trace.

    The undisturbed one is trained as far as a test needs it, on one rank.
    """

    def __init__(self, cluster: RayHosts, data: str) -> None:
        self.cluster, self.data = cluster, data

    def recipe(self, **fields: object) -> Sequence[str]:
        """Arguments for a run that lasts longer than a test."""
        return small_recipe(self.data, **{**FIELDS, "run_root": f"{self.cluster.url}/runs", **fields})

    def begin(self, name: str, host: Host | None = None, **fields: object) -> RunDirectory:
        """Submit a run, as a job of the head unless another host is given."""
        trace = f"{self.cluster.url}/traces/{name}"
        submit = ("submit", *self.recipe(**fields), "--run", name, "--trace", trace)
        done(self.cluster.convmae(host or self.cluster.laptop, *submit))
        return self.cluster.run(name)

    def stop(self, run: RunDirectory) -> None:
        """End a run with a checkpoint, and check that nothing of it is left."""
        done(self.cluster.convmae(self.cluster.laptop, "stop", run.url))
        self.cluster.wait_for_nothing_left()

    def end(self) -> None:
        """Stop every run that is still at work, without checking that nothing is left."""
        for run in list_runs(self.cluster.storage, f"{self.cluster.url}/runs"):
            if is_live(run):
                run.write_stop_request()
                until(run, "its end", lambda now: now["state"] in FINAL_STATES)

    def assert_undisturbed(self, run: RunDirectory) -> None:
        """Check that its history and its samples, crops, flips and masks are those of the undisturbed run."""
        found = losses(run)
        if len(self.cluster.run("undisturbed").read_history()) < len(found):  # else an earlier test needed as much
            trace = f"{self.cluster.url}/traces/undisturbed"
            recipe = self.recipe(max_steps=len(found), max_workers=1, checkpoint_every_steps=500)
            pretrain = ("pretrain", *recipe, "--run", "undisturbed", "--trace", trace)
            done(self.cluster.convmae(self.cluster.head, *pretrain), within_seconds=900)
        expected = losses(self.cluster.run("undisturbed"))[: len(found)]
        assert found == pytest.approx(expected, rel=1e-5)
        traces = [list(self._traced(name, len(found))) for name in (run.name, "undisturbed")]
        assert [step.step for step in traces[0]] == list(range(1, len(found) + 1))
        assert traces[0] == traces[1]

    def _traced(self, name: str, steps: int) -> Iterator[TracedStep]:
        rows = read_trace(self.cluster.storage, f"{self.cluster.url}/traces/{name}")
        return islice(traced_steps(rows), steps)


def is_under_way(run: RunDirectory, workers: int) -> dict[str, Any]:
    """Wait until that many ranks train past the first checkpoint; returns the heartbeat."""
    after_the_first = trains(workers, after=int(str(FIELDS["checkpoint_every_steps"])))
    return until(run, "a checkpoint", lambda now: after_the_first(now) and has_checkpoint(now))


def newest_claims(run: RunDirectory) -> list[int]:
    """The driver that committed each checkpoint, by step."""
    return [read_commit(run, step).claim for step in committed_steps(run)]
