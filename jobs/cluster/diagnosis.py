"""Findings: what the facts of nodes and store mean for a run, and what to do about them. Pure; doctor gathers facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jobs.cluster.interfaces import UNREACHED_REMEDY
from jobs.cluster.node_probe import RAY_SETTINGS, Disk, NodeFacts
from jobs.terminal import bytes_text

Level = Literal["ok", "warning", "failed", "skipped"]

SKEW_WARNING_SECONDS = 1.0
SKEW_FAILED_SECONDS = 60.0
"""Heartbeats older than this make a live run look interrupted; at 15 minutes S3 refuses requests."""
SHARED_MEMORY_BYTES = 1 * 10**9
FREE_BYTES = 10 * 10**9
"""On a disk through which checkpoints pass; a ZeRO checkpoint of ConvMAE-Base is about 1.5 GB over all ranks."""
READ_BYTES_PER_SECOND = 100e6
"""About 900 images a second at ImageNet's 110 kB."""
REDUCE_BYTES_PER_SECOND = 100e6


@dataclass(frozen=True)
class Finding:
    """One check on one node, or on all of them."""

    check: str
    level: Level
    detail: str
    remedy: str = ""
    """What to do; empty if there is nothing to do."""
    node: str = ""
    """Host; empty for the whole cluster."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def same_versions(here: NodeFacts, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Packages must have the same versions wherever a run executes and its checkpoints are made."""
    different = False
    for node in nodes:
        for package, wanted in here.versions.items():
            found = node.versions.get(package, "-")
            if found != wanted:
                different = True
                remedy = f"install the pinned versions there: pip install -c constraints.txt . (here: {wanted})"
                yield Finding("versions", "failed", f"{package} is {found}, here {wanted}", remedy, node.host)
    if not different:
        yield Finding("versions", "ok", ", ".join(f"{name} {number}" for name, number in here.versions.items()))


def clock_skew(host: str, skew_seconds: float, uncertainty_seconds: float) -> Finding:
    """A node's clock compared with the one here.

    Args:
        host: The node.
        skew_seconds: How far it is ahead.
        uncertainty_seconds: Half of the time that asking took.
    """
    certain = max(0.0, abs(skew_seconds) - uncertainty_seconds)
    detail = f"{skew_seconds:+.3f} s, known to within {uncertainty_seconds:.3f} s"
    if certain <= SKEW_WARNING_SECONDS:
        return Finding("clock", "ok", detail, node=host)
    level: Level = "failed" if certain > SKEW_FAILED_SECONDS else "warning"
    return Finding("clock", level, detail, "let NTP (chrony) set the clocks of all nodes", host)


def ray_settings(found: Mapping[str, int]) -> Iterator[Finding]:
    """How soon Ray's head declares a silent host dead: one finding for each setting that is slow.

    Args:
        found: As the head's processes have them (jobs.cluster.node_probe.RAY_SETTINGS).
    """
    seconds = (found["health_check_period_ms"] + found["health_check_timeout_ms"]) / 1000
    after = (
        f"Ray declares a host that falls silent dead after {found['health_check_failure_threshold'] * seconds:.0f} s"
    )
    slow = {name: value for name, value in found.items() if value > RAY_SETTINGS[name]}
    for name, value in slow.items():
        setting = f"RAY_{name}={RAY_SETTINGS[name]}"
        remedy = f"set {setting} where the head starts, as infra/ does; runs notice silent hosts themselves"
        yield Finding("silent hosts", "warning", f"{name} is {value}: {after}", remedy)
    if not slow:
        yield Finding("silent hosts", "ok", after)


def node_findings(node: NodeFacts, *, wants_gpu: bool) -> Iterator[Finding]:
    """Shared memory, disks and GPUs of one node.

    Args:
        node: Its facts.
        wants_gpu: Whether a run is to train on GPUs there; a node without one is then a failure.
    """
    yield Finding("machine", "ok", f"{node.cpus} CPUs, {bytes_text(node.memory_bytes)} of memory", node=node.host)
    size = bytes_text(node.shared_memory_bytes)
    if node.shared_memory_bytes < SHARED_MEMORY_BYTES:
        remedy = "give the container more: docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
        yield Finding("/dev/shm", "warning", f"{size}; NCCL and Ray's object store need more", remedy, node.host)
    else:
        yield Finding("/dev/shm", "ok", size, node=node.host)
    for disk in node.disks:
        yield _disk_finding(node.host, disk)
    if node.gpus:
        yield Finding("GPUs", "ok", f"{len(node.gpus)}: {node.gpus[0]}", node=node.host)
    elif wants_gpu:
        remedy = "is the driver installed, and does Ray's container see it (nvidia-smi there)? Else set device=cpu"
        yield Finding("GPUs", "failed", "none visible", remedy, node.host)
    else:
        yield Finding("GPUs", "skipped", "none visible; device=cpu needs none", node=node.host)


def _disk_finding(host: str, disk: Disk) -> Finding:
    detail = f"{disk.folder}: {bytes_text(disk.free_bytes)} free of {bytes_text(disk.total_bytes)}"
    if not disk.writable:
        remedy = "make it writable for the user of Ray's workers, or name another cache_dir"
        return Finding("disk", "failed", f"{disk.folder} is not writable", remedy, host)
    if disk.free_bytes < FREE_BYTES:
        remedy = "free some space, set TMPDIR to a larger disk before Ray starts, or lower cache_bytes"
        return Finding("disk", "warning", detail, remedy, host)
    return Finding("disk", "ok", detail, node=host)


def read_speed(host: str, bytes_per_second: float) -> Finding:
    """A node's bandwidth to the store, while all nodes read."""
    detail = f"{bytes_text(bytes_per_second)}/s"
    if bytes_per_second >= READ_BYTES_PER_SECOND:
        return Finding("store bandwidth", "ok", detail, node=host)
    images = bytes_per_second / 110e3
    remedy = "set cache_dir, so that later epochs read from disk; or run the nodes in the bucket's region"
    detail += f": {images:.0f} images/s of 110 kB at most"
    return Finding("store bandwidth", "warning", detail, remedy, host)


def reduce_speed(backend: str, ranks: int, bytes_per_second: float) -> Finding:
    """The speed of an all-reduce over all nodes: its slowest rank's."""
    detail = f"{backend} over {ranks} ranks: {bytes_text(bytes_per_second)}/s"
    if bytes_per_second >= REDUCE_BYTES_PER_SECOND:
        return Finding("all-reduce", "ok", detail)
    remedy = "check the network between the nodes; a placement group, or EFA on AWS, helps"
    return Finding("all-reduce", "warning", detail, remedy)


def reduce_failure(backend: str, ranks: int, error: BaseException) -> Finding:
    """Ranks that did not reach each other."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Finding("all-reduce", "failed", f"{backend} over {ranks} ranks: {lines[-1]}", UNREACHED_REMEDY)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if something failed."""
    return int(any(finding.level == "failed" for finding in findings))


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Text for people: a line for each finding, and a second one with what to do."""
    words: Mapping[Level, str] = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "skipped": "skipped"}
    for finding in findings:
        where = f"{finding.node}: " if finding.node else ""
        yield f"{words[finding.level]:<8} {finding.check:<16} {where}{finding.detail}"
        if finding.remedy:
            yield f"{'':<8} {'':<16} -> {finding.remedy}"
