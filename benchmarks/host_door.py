"""A way from this process to a server on a host of a network of its own, past whatever was cut."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable


class Door(socketserver.ThreadingTCPServer):
    """Listens on this process's loopback address, and connects on a host."""

    daemon_threads = True

    def __init__(self, dial: Callable[[], socket.socket], target: tuple[str, int]) -> None:
        """Listen on a free port.

        Args:
            dial: Makes a TCP socket that is on the host.
            target: Address and port to which it is connected.
        """
        self.dial, self.target = dial, target
        super().__init__(("127.0.0.1", 0), _Passage)


class _Passage(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Door)
        with contextlib.suppress(OSError, RuntimeError), self.server.dial() as there:
            there.connect(self.server.target)
            back = threading.Thread(target=_pump, args=(there, self.request), daemon=True)
            back.start()
            _pump(self.request, there)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
