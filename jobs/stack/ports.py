"""The TCP ports of a local stack: free ones on the loopback address, chosen so that no other process takes them.

Ports are taken from 20000 to 22767 and, for gRPC, from 30000 to 32767. Both ranges lie below Linux's ephemeral ports
(from 32768), from which Ray's workers and all outgoing connections draw: a service that is restarted a second after its
death finds its port free.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from pipeline.errors import UserError

LOOPBACK = "127.0.0.1"
CHOICES = range(20000, 22768)
GRPC_OFFSET = 10000
"""SeaweedFS listens for gRPC at its HTTP port plus this."""


class PortError(UserError):
    """A requested port that is not available: in use by another program, or not the running stack's."""


@dataclass(frozen=True)
class Ports:
    """Ports of one stack. ``master``, ``volume``, ``filer`` and ``admin`` have a gRPC twin 10000 above."""

    s3: int
    s3_grpc: int
    master: int
    volume: int
    filer: int
    admin: int
    ray: int
    dashboard: int
    ray_client: int
    dashboard_agent: int
    autoscaler_metrics: int
    dashboard_metrics: int
    prometheus: int

    def grpc_twins(self) -> dict[str, int]:
        """Return the gRPC port of each SeaweedFS part by its name."""
        twins = {name: getattr(self, name) + GRPC_OFFSET for name in ("master", "volume", "filer", "admin")}
        return {**twins, "s3": self.s3_grpc}


def is_free(port: int) -> bool:
    """Return whether a server could listen on the port now; closing connections of an earlier one do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def choose(requested: Mapping[str, int]) -> Ports:
    """Choose the ports of a new stack.

    Args:
        requested: Port by name, if the user asked for one; 0 leaves the choice to this function.

    Raises:
        PortError: If a requested port is in use, requested twice or not a port number.
    """
    taken: set[int] = set()
    for name, port in requested.items():
        if port and (port in taken or not 0 < port < 65536 or not is_free(port)):
            raise PortError(_flag(name), "must be a free TCP port", port, "give another, or 0 for any free one")
        taken.add(port)
    free = _free_ports(taken)
    return Ports(**{port.name: requested.get(port.name) or next(free) for port in fields(Ports)})


def check_same(requested: Mapping[str, int], current: Ports) -> None:
    """Refuse ports other than those of the running stack.

    Raises:
        PortError: If a port is requested that the running stack does not have.
    """
    for name, port in requested.items():
        if port and port != getattr(current, name):
            rule = f"must be that of the running stack, {getattr(current, name)}"
            raise PortError(_flag(name), rule, port, "omit it, or run `convmae down` first")


def _free_ports(taken: set[int]) -> Iterator[int]:
    # In random order, so that stacks which start at the same moment do not choose the same ports
    for port in random.sample(CHOICES, len(CHOICES)):
        if not {port, port + GRPC_OFFSET} & taken and is_free(port) and is_free(port + GRPC_OFFSET):
            yield port


def _flag(name: str) -> str:
    return f"--{name}-port"
