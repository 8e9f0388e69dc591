"""A real Ray cluster of several nodes on this machine: a head without CPUs, and nodes that come, drain and die."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from local_s3 import LocalS3, local_s3
from patience import wait_until

from jobs.run.directory import RunDirectory

RAY = (sys.executable, "-m", "ray.scripts.scripts")
OBJECT_STORE_BYTES = 100 << 20
NODE_ATTEMPTS = 4
NODE_SECONDS = 240
"""For a node to start and join, on a machine that does much else."""


@dataclass
class Node:
    """One `ray start --block`, which is a node."""

    process: subprocess.Popen[bytes]
    log: Path
    node_id: str = ""

    @property
    def lives(self) -> bool:
        """Whether it has not ended by itself, or been ended."""
        return self.process.poll() is None

    @property
    def is_up(self) -> bool:
        """Whether its raylet runs; one that was drained ends by itself."""
        return self._raylet() is not None

    def workers(self) -> list[psutil.Process]:
        """Processes of the ranks that train on it."""
        raylet = self._raylet()
        found = raylet.children(recursive=True) if raylet else []
        return [process for process in found if "RayTrainWorker" in process.name()]

    def kill(self) -> None:
        """SIGKILL its raylet; what ran under it dies with it."""
        raylet = self._raylet()
        assert raylet, "it is up"
        raylet.kill()

    def _raylet(self) -> psutil.Process | None:
        if self.process.poll() is not None:
            return None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next((child for child in children if child.name() == "raylet"), None)

    def end(self) -> None:
        """SIGKILL every process of it, as when a machine loses its power; drivers of jobs are among a head's."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            for process in [psutil.Process(self.process.pid), *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@dataclass
class Cluster:
    """The nodes, and how a shell beside them is set up."""

    folder: Path
    sockets: Path
    """Short: paths of Unix sockets may have 107 bytes."""
    s3: LocalS3
    ports: dict[str, int]
    variables: Mapping[str, str]
    """Of the nodes' environment beside what every node has; an empty one is omitted."""
    head: Node = field(init=False)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        """RAY_ADDRESS of the cluster."""
        return f"127.0.0.1:{self.ports['gcs']}"

    def environment(self) -> dict[str, str]:
        """The environment of the nodes; those who submit to them have RAY_ADDRESS as well."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "CONVMAE_"))}
        storage = self.s3.storage
        assert storage.endpoint_url and storage.key and storage.secret and storage.region
        found = {
            **clean,
            "AWS_ENDPOINT_URL": storage.endpoint_url,
            "AWS_ACCESS_KEY_ID": storage.key,
            "AWS_SECRET_ACCESS_KEY": storage.secret,
            "AWS_REGION": storage.region,
            "CONVMAE_HOME": str(self.folder / "no-stack"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **self.variables,
        }
        return {name: value for name, value in found.items() if value}

    def start_head(self) -> None:
        """Start the head, which has no CPU for ranks."""
        ports = self.ports
        self.head = self._start(
            "head",
            "--head",
            f"--port={ports['gcs']}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports['dashboard']}",
            f"--ray-client-server-port={ports['client']}",
            f"--temp-dir={self.sockets}",
            "--num-cpus=0",
        )
        wait_until("the head", self._head_answers, NODE_SECONDS)

    def add(self, cpus: int = 1, *options: str, own_disk: Path | None = None) -> Node:
        """Start one node more, and wait until it has joined.

        Args:
            cpus: It has for ranks and tasks.
            options: Of `ray start`, further ones.
            own_disk: A folder at which this node has a disk of its own; takes root.
        """
        before = self.alive()
        mounting = f'mount -t tmpfs none {shlex.quote(str(own_disk))} && exec "$@"'
        prefix = ("unshare", "--mount", "sh", "-c", mounting, "sh") if own_disk else ()
        started = (f"--address={self.address}", f"--num-cpus={cpus}", *options)
        for _ in range(NODE_ATTEMPTS):  # a raylet gives up when its agents need more than 15 s to start
            node = self._start(f"node{len(self.nodes)}", *started, prefix=prefix)
            self.nodes.append(node)
            wait_until("the node", lambda node=node: bool(self.alive() - before) or not node.lives, NODE_SECONDS)  # type: ignore[misc]
            if node.lives:
                break
            self.nodes.remove(node)
        (node.node_id,) = self.alive() - before
        return node

    def drain(self, node: Node, seconds: int) -> None:
        """Tell Ray that a node goes away in so many seconds, as a cloud's autoscaler does."""
        command = [
            *RAY,
            "drain-node",
            f"--address={self.address}",
            f"--node-id={node.node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot capacity is taken back",
            f"--deadline-remaining-seconds={seconds}",
        ]
        subprocess.run(command, env=self.environment(), check=True, capture_output=True, timeout=60)

    def alive(self) -> set[str]:
        """Ids of the nodes that Ray believes to be there."""
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports['dashboard']}/api/v0/nodes", headers=headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    def convmae(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command, as a user of the cluster would."""
        command = [sys.executable, "-m", "jobs.cli.main", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env={**self.environment(), "RAY_ADDRESS": self.address}, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, name: str) -> RunDirectory:
        """The directory of a run."""
        return RunDirectory.of(self.s3.storage, f"{self.s3.url}/runs", name)

    def end(self) -> None:
        """End all nodes."""
        for node in [*self.nodes, self.head]:
            node.end()

    def _start(self, name: str, *options: str, prefix: Sequence[str] = ()) -> Node:
        log = self.folder / f"{name}.log"
        command = [
            *prefix,
            *RAY,
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={free_port()}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            "--log-color=false",
            *options,
        ]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=self.environment(), stdout=file, stderr=file, cwd=self.folder, start_new_session=True
            )
        return Node(process, log)

    def _head_answers(self) -> bool:
        assert self.head.process.poll() is None, self.head.log.read_text()
        try:
            return len(self.alive()) == 1
        except (OSError, ValueError, KeyError, TypeError):
            return False


@contextlib.contextmanager
def ray_cluster(folder: Path, variables: Callable[[LocalS3], Mapping[str, str]] = lambda _: {}) -> Iterator[Cluster]:
    """A head, an S3 server beside it, and no other node yet; all end with the context.

    Args:
        folder: Empty; for logs, data and the token that every node and client must show.
        variables: Of the nodes' environment, given the server; an empty one is omitted.
    """
    (folder / "s3").mkdir()
    with local_s3(folder / "s3") as s3, tempfile.TemporaryDirectory(prefix="ray-") as sockets:
        (folder / "token").write_text(secrets.token_hex(32))
        ports = {name: free_port() for name in ("gcs", "dashboard", "client")}
        cluster = Cluster(folder, Path(sockets), s3, ports, variables(s3))
        try:
            cluster.start_head()
            yield cluster
        finally:
            cluster.end()


def free_port() -> int:
    """A port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
