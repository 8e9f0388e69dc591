"""The record of a local stack: what was started for it, where it listens, and how each service is.

It is written to ``<home>/stack.json``, which holds secrets and is readable only by its owner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.stack import lock as stack_lock
from jobs.stack import services as stack_services
from jobs.stack.ports import LOOPBACK, Ports
from jobs.stack.services import BUCKET, StackSettings
from pipeline.errors import UserError, clipped
from pipeline.host.process_identity import ProcessIdentity
from pipeline.store.json_text import parsed_object


@dataclass(frozen=True)
class ServiceRecord:
    """One service as the keeper knows it."""

    process: ProcessIdentity | None = None
    starts: int = 0
    gave_up: bool = False
    """It died so often that the keeper no longer restarts it."""


@dataclass(frozen=True)
class ServiceStatus:
    """Whether one service is healthy."""

    healthy: bool
    pid: int | None
    detail: str


@dataclass(frozen=True)
class Stack:
    """A local stack as recorded in its home; its repr shows no secret."""

    settings: StackSettings
    keeper: ProcessIdentity | None
    services: dict[str, ServiceRecord]

    @property
    def endpoint(self) -> str:
        """URL of the S3 server."""
        return f"http://{LOOPBACK}:{self.settings.ports.s3}"

    @property
    def bucket(self) -> str:
        """Name of the bucket that `up` creates."""
        return BUCKET

    @property
    def ray_address(self) -> str:
        """Address for ``ray.init``."""
        return f"{LOOPBACK}:{self.settings.ports.ray}"

    @property
    def dashboard_url(self) -> str:
        """URL of the Ray dashboard and of its job API; both ask for the token."""
        return f"http://{LOOPBACK}:{self.settings.ports.dashboard}"

    @property
    def token_path(self) -> Path:
        """File with the token that Ray asks for."""
        return self.settings.token_path

    @property
    def prometheus_url(self) -> str | None:
        """URL of Prometheus, None where it is not installed."""
        if self.settings.prometheus_binary is None:
            return None
        return f"http://{LOOPBACK}:{self.settings.ports.prometheus}"

    @property
    def targets_dir(self) -> Path:
        """Folder into which a run writes ``<run>.json`` with the address of its exporter (Prometheus file_sd)."""
        return self.settings.home / "targets"

    @classmethod
    def load(cls, home: Path) -> Stack | None:
        """Return the stack of ``home`` if any process of it is running, perhaps in another container."""
        stack = read_stack(resolved(home))
        return stack if stack is not None and (stack.is_seen() or stack_lock.is_held(stack.settings.home)) else None

    def is_seen(self) -> bool:
        """Return whether a recorded process of it runs in this PID namespace."""
        return any(record.alive() for record in self.records())

    def environment(self) -> dict[str, str]:
        """Return the variables that a client process needs; set them before it imports Ray. Holds secrets."""
        return stack_services.client_environment(self.settings, os.environ)

    def status(self) -> dict[str, ServiceStatus]:
        """Return the state of the keeper and of every service; takes two seconds for each service that hangs."""
        keeper_alive = self.keeper is not None and self.keeper.alive()
        keeper_pid = self.keeper.pid if self.keeper is not None and keeper_alive else None
        keeper = ServiceStatus(keeper_alive, keeper_pid, "restarts what dies" if keeper_alive else "not running")
        return {"keeper": keeper} | {name: self._service_status(name) for name in self.settings.service_names}

    def records(self) -> list[ProcessIdentity]:
        """Return the recorded processes, keeper first."""
        recorded = [self.keeper, *(service.process for service in self.services.values())]
        return [record for record in recorded if record is not None]

    def save(self) -> None:
        """Write ``stack.json``; only for `up`, before it starts the keeper, and from then on only for the keeper."""
        state = asdict(self) | {"environment": self.environment()}
        stack_services.write_private(state_path(self.settings.home), json.dumps(state, default=str, indent=1))

    def _service_status(self, name: str) -> ServiceStatus:
        service = self.services[name]
        pid = service.process.pid if service.process is not None and service.process.alive() else None
        if pid is None:
            return ServiceStatus(False, None, "died too often; see its log" if service.gave_up else "not running")
        healthy = stack_services.is_healthy(name, self.settings)
        return ServiceStatus(healthy, pid, self.address(name) if healthy else "running, but does not answer")

    def address(self, name: str) -> str:
        """Return the URL of a service by its name."""
        return {"s3": self.endpoint, "ray": self.dashboard_url}.get(name) or str(self.prometheus_url)


def read_stack(home: Path) -> Stack | None:
    """Return the stack that ``stack.json`` records, running or not; None if there is no such file.

    Raises:
        UserError: It cannot be read or understood.
    """
    try:
        return _stack_of(parsed_object(state_path(home).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        rule = f"must be a folder that can be read ({os.strerror(error.errno or 0)})"
        raise UserError("CONVMAE_HOME", rule, clipped(str(home)), "name another folder") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        remedy = "end its processes and delete that file; data is kept"
        path = clipped(str(state_path(home)))
        raise UserError(
            "CONVMAE_HOME", f"must hold an intact stack.json ({clipped(repr(error))})", path, remedy
        ) from None


def _stack_of(state: Mapping[str, Any]) -> Stack:
    settings = state["settings"]
    paths = {"home": Path(settings["home"]), "run_dir": Path(settings["run_dir"]), "ports": Ports(**settings["ports"])}
    services = {
        str(name): ServiceRecord(**(service | {"process": _record(service["process"])}))
        for name, service in state["services"].items()
    }
    stack = Stack(StackSettings(**(settings | paths)), _record(state["keeper"]), services)
    texts = (stack.settings.stack_id, stack.settings.access_key, stack.settings.secret_key)
    if not all(isinstance(text, str) for text in texts) or set(services) != set(stack.settings.service_names):
        raise ValueError("an identity or a service is missing")
    if not all(type(port) is int and 0 < port < 2**16 for port in asdict(stack.settings.ports).values()):
        raise ValueError("a port is not valid")
    return stack


def _record(fields: dict[str, Any] | None) -> ProcessIdentity | None:
    return None if fields is None else ProcessIdentity.of_json(fields)


def state_path(home: Path) -> Path:
    """Return where a home's ``stack.json`` is."""
    return home / "stack.json"


def resolved(home: Path) -> Path:
    """Return a home without links; unlike ``Path.resolve`` it raises nothing where links form a circle."""
    return Path(os.path.realpath(home))
