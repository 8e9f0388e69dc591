"""A real Ray cluster of several hosts on this machine: store, head, workers, and a laptop that is no node.

Every host is one of `host_network`: `ray start` finds the address, the ports and the session folder that it would find
on a machine of its own. From a test or a script (as root; `PYTHONPATH=benchmarks`):

    with ray_hosts(folder, workers=2) as cluster:
        done(cluster.convmae(cluster.laptop, "list"))           # as typed there; a Popen
        worker = cluster.add_worker()
        with cluster.network.without(worker, seconds=3): ...    # its link is cut; host_network has more
        cluster.run("first").read_heartbeat()                   # read by this process, past every cut
        cluster.leftovers()                                     # what runs and is no service

`ray_hosts` takes 20 to 30 seconds until the workers have joined, on two cores.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host import HOME, Host, Names
from host_network import Network, host_network
from patience import end, wait_until

from jobs.run.directory import RunDirectory
from jobs.stack.services import BUCKET, REGION, s3_binary
from pipeline.ingest.photographs import cut_tiles
from pipeline.store.storage import Storage

RAY = (sys.executable, "-m", "ray.scripts.scripts")
START_SECONDS = 300
START_ATTEMPTS = 6
INTERFACES = ("enp3s0", "eno1", "ens192", "enp0s31f6", "eth2", "ens4")
"""Of the workers, by the order in which they come."""
S3_PORT, GCS_PORT, DASHBOARD_PORT, PROMETHEUS_PORT = 8333, 6379, 8265, 9090
_OBJECT_STORE_BYTES = 100 << 20
_SERVICES = (
    "/weed ", "/gcs_server ", "/raylet ", "/log_monitor.py ", "/dashboard.py ", "/autoscaler/_private/monitor.py ",
    "ray.scripts.scripts start", "ray.util.client.server", "ray-dashboard-", "ray::DashboardAgent", "multiprocessing.",
    "ray::RuntimeEnvAgent", "/agent/main.py ", "/dashboard/agent.py ", "ray::IDLE ", "default_worker.py ",
    "/prometheus ", "ray::_AutoscalingCoordinatorActor",
)  # fmt: skip
"""Parts of command lines of what a cluster runs without any run; the last one stays since the first run."""


@dataclass(eq=False)
class RayHosts:
    """The hosts, and what was started on them."""

    network: Network
    store: Host
    head: Host
    laptop: Host
    workers: list[Host] = field(default_factory=list)
    tuning: Mapping[str, str] = field(default_factory=dict)
    """Variables for `ray start` on the head, as a cluster file sets them; none on one that is started plainly."""
    names: Names = Names.DNS
    nodes: dict[Host, Any] = field(default_factory=dict)
    """`ray start --block` of each node."""
    _options: dict[Host, Sequence[str]] = field(default_factory=dict)
    _ends: Counter[Host] = field(default_factory=Counter)
    _token: str = field(default_factory=lambda: secrets.token_hex(32))
    _keys: tuple[str, str] = field(default_factory=lambda: (secrets.token_hex(10).upper(), secrets.token_urlsafe(30)))
    _doors: dict[str, str] = field(default_factory=dict)
    _added: int = 0

    @property
    def http_address(self) -> str:
        """RAY_ADDRESS on the laptop."""
        return f"http://{self.place(self.head)}:{DASHBOARD_PORT}"

    @property
    def address(self) -> str:
        """RAY_ADDRESS on a node."""
        return f"{self.place(self.head)}:{GCS_PORT}"

    @property
    def url(self) -> str:
        """URL of the store's bucket."""
        return f"s3://{BUCKET}"

    @property
    def storage(self) -> Storage:
        """Access of this process to the store, whatever is cut."""
        return Storage(self._doors["s3"], *self._keys, region=REGION)

    def place(self, host: Host) -> str:
        """A host as others call it: by its name where there are names, else by its address."""
        return f"{host.name}.cluster.internal" if self.names is Names.DNS else host.address

    def convmae(self, host: Host, *arguments: str, **changes: str) -> Any:
        """Start the command on a host, as a user there would; see `host_network.done` and `inner`."""
        there = self.http_address if host is self.laptop else self.address
        return host.start(sys.executable, "-m", "jobs.cli.main", *arguments, **{"RAY_ADDRESS": there, **changes})

    def run(self, name: str) -> RunDirectory:
        """The directory of a run."""
        return RunDirectory.of(self.storage, f"{self.url}/runs", name)

    def photographs(self, count: int) -> str:
        """Put class folders of photographs into the store; returns their URL."""
        url = f"{self.url}/photographs"
        with tempfile.TemporaryDirectory() as folder:
            cut_tiles(Path(folder), count, seed=0)
            for file in Path(folder).rglob("*.jpg"):
                self.storage.write(f"{url}/{file.relative_to(folder)}", file.read_bytes())
        return url

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray believes to be there."""
        nodes = self.ask_ray("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}

    def ask_ray(self, path: str) -> Any:
        """The answer of the head's dashboard."""
        request = urllib.request.Request(
            self._doors["dashboard"] + path, headers={"Authorization": f"Bearer {self._token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def start_store(self) -> None:
        """Start the S3 server; `wait_for_store` waits until it answers."""
        self.nodes[self.store] = self.store.serve("weed", *_weed(self.store))

    def wait_for_store(self) -> None:
        """Wait until the bucket can be asked."""
        wait_until("the store", lambda: self.store.listens(S3_PORT) and self._answers(), START_SECONDS)

    def start_head(self, *options: str) -> None:
        """Start Ray's head, and wait until it is a node itself: no other may come before."""
        self._start_ray(self.head, "--head", "--dashboard-host=0.0.0.0", "--num-cpus=0", *options)
        self.wait_for_nodes(self.head)

    def start_node(self, host: Host, cpus: int = 1) -> None:
        """Start a node of the cluster on a host; `wait_for_nodes` waits until it has joined."""
        self._start_ray(host, f"--address={self.address}", f"--num-cpus={cpus}")

    def stop_node(self, host: Host) -> None:
        """Kill everything of Ray on a host, which stays; drivers of jobs are among a head's."""
        end(self.nodes.pop(host))
        host.kill("")

    def add_worker(self, cpus: int = 1) -> Host:
        """Boot one host more, start a node on it, and wait until it has joined."""
        self._added += 1
        interface = INTERFACES[(self._added - 1) % len(INTERFACES)]
        host = self.add_host(f"worker{self._added}", interface, has_code=False)
        self.workers.append(host)
        self.start_node(host, cpus)
        self.wait_for_nodes(host)
        return host

    def remove(self, host: Host) -> None:
        """Take a host's power, permanently."""
        if host in self.workers:
            self.workers.remove(host)
        self.nodes.pop(host, None)
        self.network.power_off(host)

    def add_host(self, name: str, interface: str, *, has_code: bool = True) -> Host:
        """Boot a host on which a user's shell has the store's keys and Ray's token."""
        host = self.network.add(name, interface=interface, names=self.names, has_code=has_code)
        self.equip(host)
        return host

    def equip(self, host: Host) -> None:
        """Set a host's environment up."""
        (host.home / "ray_token").write_text(self._token)
        (host.home / "ray_token").chmod(0o600)
        key, secret = self._keys
        host.environment |= {
            "AWS_ENDPOINT_URL": f"http://{self.place(self.store)}:{S3_PORT}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": REGION,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{HOME}/ray_token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def wait_for_nodes(self, *hosts: Host) -> None:
        """Wait until they have joined."""
        wanted = {host.address for host in hosts or [self.head, *self.workers]}

        def joined() -> bool:
            self.keep_up()
            try:
                return wanted <= self.alive()
            except (OSError, ValueError, KeyError, TypeError):
                return False

        wait_until("the nodes", joined, START_SECONDS)

    def keep_up(self) -> None:
        """Start `ray start` again where it has ended, as a service manager does.

        Ray gives a node 30 s to start, which a busy machine overruns; and a node that was taken for dead while its link
        was cut ends itself when it hears of it.
        """
        for host, options in list(self._options.items()):
            if host in self.nodes and self.nodes[host].poll() is not None:
                self._ends[host] += 1
                assert self._ends[host] < START_ATTEMPTS, (host.folder / "ray.log").read_text()
                self.stop_node(host)
                self._start_ray(host, *options)

    def leftovers(self) -> list[str]:
        """Host and command line of everything at work that is no service: ranks, drivers, commands, and zombies."""
        found = []
        for host in self.network.hosts:
            for process in host.processes():
                with contextlib.suppress(OSError, LookupError):
                    line = Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ").strip()
                    if not any(service in f"{line} " for service in _SERVICES):
                        found.append(f"{host.name}: {line or process.name() + ' (zombie)'}")
        return found

    def wait_for_nothing_left(self, seconds: float = 60) -> None:
        """Wait until nothing but services runs on any host.

        Raises:
            AssertionError: Something does; names it.
        """
        with contextlib.suppress(AssertionError):
            wait_until("hosts without work", lambda: not self.leftovers(), seconds)
        left = self.leftovers()
        assert not left, "\n".join(left)

    def open_doors(self) -> None:
        """Let this process reach store and dashboard."""
        self._doors = {"s3": self.store.door(S3_PORT), "dashboard": self.head.door(DASHBOARD_PORT)}

    def write_identities(self) -> None:
        """Tell the store who may do what."""
        key, secret = self._keys
        identity = {
            "name": "convmae",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.store.home / "identities.json").write_text(json.dumps({"identities": [identity]}))

    def _start_ray(self, host: Host, *options: str) -> None:
        command = [*RAY, "start", "--block", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--log-color=false"]
        tuning = self.tuning if host is self.head else {}
        self.nodes[host] = host.serve("ray", *command, *options, **tuning)
        self._options[host] = options

    def _answers(self) -> bool:
        try:
            return self.storage.exists(f"{self.url}/nothing") is False
        except Exception:
            return False


@contextlib.contextmanager
def ray_hosts(
    folder: Path, *, workers: int = 2, names: Names = Names.DNS, tuning: Mapping[str, str] | None = None
) -> Iterator[RayHosts]:
    """Store, head, laptop and workers of one CPU; all end with the context.

    Args:
        folder: Empty; for files of the hosts, their logs among them.
        workers: How many at first.
        names: What hosts make of names.
        tuning: Variables for the head's `ray start`.
    """
    with host_network(folder) as network:
        store = network.add("store", interface="eth0", names=names, has_code=False)
        head = network.add("head", interface="ens5", names=names)
        laptop = network.add("laptop", interface="wlp2s0", names=names)
        cluster = RayHosts(network, store, head, laptop, tuning=tuning or {}, names=names)
        for host in (store, head, laptop):
            cluster.equip(host)
        cluster.write_identities()
        cluster.open_doors()
        cluster.start_store()
        cluster.start_head()
        for _ in range(workers):  # one after the other: at once they take turns on few cores, and overrun Ray's limit
            cluster.add_worker()
        cluster.wait_for_store()
        yield cluster


def _weed(host: Host) -> Sequence[str]:
    return [
        s3_binary(),
        *["mini", f"-dir={HOME}/s3", f"-bucket={BUCKET}", f"-ip={host.address}", f"-ip.bind={host.address}"],
        *["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"],
        *[f"-s3.config={HOME}/identities.json", f"-s3.port={S3_PORT}", "-volume.preStopSeconds=0"],
    ]
