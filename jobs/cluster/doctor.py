"""The doctor, `convmae doctor`: whether machine, cluster and store are fit for a run. Puts a probe on every node."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.cluster.diagnosis import (
    Finding,
    clock_skew,
    node_findings,
    ray_settings,
    read_speed,
    reduce_failure,
    reduce_speed,
    same_versions,
)
from jobs.cluster.node_probe import NodeFacts, NodeProbe
from jobs.cluster.session import Session
from jobs.cluster.store_check import settings_finding, store_findings
from jobs.errors import ClusterError
from pipeline.access.urls import is_local, is_s3
from pipeline.store.storage import Storage

PROBE_BYTES = 32 * 1024**2
CLOCK_READINGS = 5
NODE_SECONDS = 120.0
"""How long a node may take to start a probe; a new runtime environment has to be copied to it first."""
REDUCE_SECONDS = 60.0
HEAD_RESOURCE = "node:__internal_head__"
"""Ray's mark of the head."""
CALLER_NAME = "caller.json"


@dataclass(frozen=True)
class Caller:
    """The machine on which `convmae doctor` was typed, if it is not a node of the cluster."""

    host: str
    versions: Mapping[str, str]
    findings: tuple[Finding, ...]
    """About the store as seen from there."""

    @classmethod
    def here(cls, session: Session, store_url: str) -> Caller:
        """This machine; checks the store if there are credentials for it."""
        facts = NodeProbe().facts([])
        if not store_url or (is_s3(store_url) and not session.has_credentials):
            remedy = "none are needed: commands that need the store run on the cluster"
            found = [Finding("store", "skipped", "no credentials here", remedy)]
        else:
            found = list(store_findings(session.storage, store_url))
        return cls(facts.host, facts.versions, tuple(replace(finding, node=facts.host) for finding in found))

    def to_text(self) -> str:
        """Text that `of_text` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Caller:
        """Read `to_text`."""
        read = json.loads(text)
        return cls(read["host"], read["versions"], tuple(Finding(**finding) for finding in read["findings"]))


def examine(
    session: Session,
    store_url: str,
    folders: Sequence[str],
    caller: Caller | None = None,
    *,
    wants_gpu: bool,
    of_runs: Callable[[], Iterable[Finding]] = tuple,
) -> Iterator[Finding]:
    """Check everything; yields findings as they become known.

    Args:
        session: Connected to nothing yet.
        store_url: Where to write, read and delete some objects; empty for nowhere.
        folders: Folders that nodes will write to, like a `cache_dir`.
        caller: The machine on which the command was typed, if it is not this one.
        wants_gpu: Whether nodes without a GPU are a failure.
        of_runs: Finds out what live runs have on the cluster, once that is connected to.
    """
    here = NodeProbe().facts(folders)
    if caller:
        here = replace(here, versions=caller.versions)
        yield from caller.findings
    yield settings_finding(session.storage)
    stored = False
    if store_url:
        found = list(store_findings(session.storage, store_url))
        stored = all(finding.level == "ok" for finding in found)
        yield from found
    else:
        yield Finding("store", "skipped", "no URL", "give one that a run will use: --store s3://BUCKET/runs")
    try:
        session.connect()
    except ClusterError as error:
        named = "RAY_ADDRESS" in session.environ
        yield Finding("cluster", "failed" if named else "skipped", error.rule, error.remedy)
        yield from same_versions(here, [here])
        yield from node_findings(here, wants_gpu=wants_gpu)
        return
    try:
        yield from _examine_cluster(session.storage, store_url if stored else "", here, folders, wants_gpu)
        yield from of_runs()
        if not session.is_local:
            yield from _head_settings()
    finally:
        if stored:
            session.storage.delete(_speed_url(store_url))


def _examine_cluster(
    storage: Storage, store_url: str, here: NodeFacts, folders: Sequence[str], wants_gpu: bool
) -> Iterator[Finding]:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    yield Finding("cluster", "ok", f"{len(nodes)} nodes, {_resources(nodes)}")
    probes = [_probe_on(node) for node in nodes]
    try:
        answers, missing = _answers(nodes, [probe.facts.remote(folders) for probe in probes])
        yield from missing
        present = [(probe, facts) for probe, facts in zip(probes, answers, strict=True) if facts]
        yield from same_versions(here, [facts for _, facts in present])
        for probe, facts in present:
            yield clock_skew(facts.host, *measured_skew(lambda probe=probe: ray.get(probe.clock.remote())))  # type: ignore[misc]
        for _, facts in present:
            yield from node_findings(facts, wants_gpu=wants_gpu)
        if store_url:
            yield from _read_speeds(storage, store_url, present)
        yield _all_reduce(present[0][0], [probe for probe, _ in present], "gloo")
    finally:
        for probe in probes:
            ray.kill(probe)
    if all(facts.gpus for _, facts in present):
        yield _nccl(nodes)


def _head_settings() -> Iterator[Finding]:
    """Asked on the head: only its own processes know the variables with which it was started."""
    import ray

    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]:
            probe = _probe_on(node)
            try:
                yield from ray_settings(ray.get(probe.ray_settings.remote(), timeout=NODE_SECONDS))
            finally:
                ray.kill(probe)


def measured_skew(
    clock: Callable[[], float], here: Callable[[], float] = time.time, readings: int = CLOCK_READINGS
) -> tuple[float, float]:
    """How far another clock is ahead, and the uncertainty: half of the quickest answer's time.

    Args:
        clock: Reads the other clock.
        here: Reads this one.
        readings: How many times to ask.
    """
    found = []
    for _ in range(readings):
        before = here()
        there = clock()
        after = here()
        found.append(((after - before) / 2, there - (before + after) / 2))
    uncertainty, skew = min(found)
    return skew, uncertainty


def _resources(nodes: Sequence[dict[str, Any]]) -> str:
    totals = {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    return ", ".join(f"{total:g} {name}s" for name, total in totals.items())


def _probe_on(node: dict[str, Any], **options: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor: Any = ray.remote(NodeProbe)
    return actor.options(num_cpus=0, scheduling_strategy=place, **options).remote()


def _answers(nodes: Sequence[dict[str, Any]], asked: Sequence[Any]) -> tuple[list[NodeFacts | None], list[Finding]]:
    import ray

    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
    answers: list[NodeFacts | None] = []
    missing = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            answers.append(ray.get(answer) if answer in ready else None)
            reason = f"no answer within {NODE_SECONDS:.0f} s"
        except Exception as error:
            answers.append(None)
            reason = str(error).strip().splitlines()[-1]
        if answers[-1] is None:
            remedy = "look at `ray logs` of that node; are the project's dependencies installed there?"
            missing.append(Finding("node", "failed", reason, remedy, node["NodeManagerHostname"]))
    return answers, missing


def _speed_url(store_url: str) -> str:
    return Storage.join(store_url, "doctor-speed.bin")


def _read_speeds(storage: Storage, store_url: str, present: Sequence[tuple[Any, NodeFacts]]) -> Iterator[Finding]:
    import ray

    if is_local(store_url):
        yield Finding("store bandwidth", "skipped", "a folder, not a store")
        return
    url = _speed_url(store_url)
    storage.write(url, os.urandom(PROBE_BYTES))
    speeds = ray.get([probe.read_bytes_per_second.remote(storage, url, PROBE_BYTES) for probe, _ in present])
    for (_, facts), speed in zip(present, speeds, strict=True):
        yield read_speed(facts.host, speed)


def _all_reduce(first: Any, probes: Sequence[Any], backend: str) -> Finding:
    import ray

    host, port = ray.get(first.free_address.remote())
    asked = [
        probe.reduce.remote(backend, f"tcp://{host}:{port}", rank, len(probes), REDUCE_SECONDS)
        for rank, probe in enumerate(probes)
    ]
    try:
        return reduce_speed(backend, len(probes), min(ray.get(asked, timeout=2 * REDUCE_SECONDS)))
    except Exception as error:
        return reduce_failure(backend, len(probes), error)


def _nccl(nodes: Sequence[dict[str, Any]]) -> Finding:
    """On one GPU of each node, which must be free, so that a run which trains on all of them is not disturbed."""
    import ray

    probes = [_probe_on(node, num_gpus=1) for node in nodes]
    try:
        ready, waiting = ray.wait([probe.clock.remote() for probe in probes], num_returns=len(probes), timeout=30.0)
        if waiting:
            detail = f"nccl: no free GPU on {len(waiting)} of {len(ready) + len(waiting)} nodes"
            return Finding("all-reduce", "skipped", detail, "run it again when nothing is training")
        return _all_reduce(probes[0], probes, "nccl")
    finally:
        for probe in probes:
            ray.kill(probe)
