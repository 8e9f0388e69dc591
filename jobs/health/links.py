"""The links between nodes, before ranks use them: each node sends some megabytes to the next one of a ring.

Over TCP, between the addresses by which Ray's nodes know each other: a process group would take seconds to connect. A
node whose links in both directions are slow is slow itself; of a single slow link nobody knows at which end it is.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence

LINK_BYTES = 8 << 20
LINK_SECONDS = 5.0
"""For a connection, and for each piece of what is sent."""
LINK_SPEED = "link_bytes_per_second"
_PIECE_BYTES = 1 << 18

Address = tuple[str, int]


def receive_once(host: str) -> Address:
    """Wait in a thread for one peer, and answer it with the bytes a second at which its data came.

    Args:
        host: An address of this node.

    Returns:
        Where the peer should connect to.
    """
    server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.settimeout(LINK_SECONDS)
    threading.Thread(target=_receive, args=(server,), name="convmae-link", daemon=True).start()
    return host, int(server.getsockname()[1])


def _receive(server: socket.socket) -> None:
    with server, contextlib.suppress(OSError):  # who sends finds out by itself
        peer, _ = server.accept()
        with peer:
            peer.settimeout(LINK_SECONDS)
            left, began = LINK_BYTES - len(peer.recv(1)), time.perf_counter()
            while left > 0 and (piece := peer.recv(min(left, _PIECE_BYTES))):
                left -= len(piece)
            peer.sendall(f"{(LINK_BYTES - left) / (time.perf_counter() - began):.1f}\n".encode())


def sent_bytes_per_second(address: Address) -> float:
    """How fast data reaches a peer that waits in `receive_once`; 0 where it does not."""
    try:
        with socket.create_connection(address, timeout=LINK_SECONDS) as peer:
            peer.sendall(bytes(LINK_BYTES))
            with peer.makefile("rb") as answer:
                return float(answer.readline() or 0.0)
    except OSError:
        return 0.0


def speed_of_nodes(ring: Sequence[str], sent: Mapping[str, float]) -> dict[str, float]:
    """The faster of each node's two links, in bytes a second, by node.

    Args:
        ring: Nodes, each of which sent to the next, and the last to the first.
        sent: How fast, by the one that sent.
    """
    return {node: max(sent[node], sent[ring[place - 1]]) for place, node in enumerate(ring)}
