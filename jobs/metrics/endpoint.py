"""The HTTP server of a run's metrics and page: a thread a request, and no more clients than it can bear.

`wsgiref` alone lets every client that says nothing keep a thread for good. Here it is given a few seconds, and where
too many are connected the one that has been for longest is cut off: a scrape always gets its answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

logger = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
"""For which a client may neither send nor take anything."""
MOST_CLIENTS = 64
"""At one moment."""


class Endpoint(ThreadingMixIn, WSGIServer):
    """Serves from threads of its own, which do not hold the process."""

    daemon_threads = True
    request_queue_size = MOST_CLIENTS

    def __init__(self, *args: Any, **options: Any) -> None:
        self._open: dict[Any, None] = {}  # the oldest first
        self._lock = threading.Lock()
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve one client, on a thread; of too many, cut off the oldest."""
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > MOST_CLIENTS else None
            self._open.pop(oldest, None)
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a client, whose connection is closed."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """A client that is gone, or was silent, is nobody's concern."""
        logger.debug("a request was not answered", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = SILENT_SECONDS

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


def served(app: Callable[..., Iterable[bytes]], host: str, port: int) -> Endpoint:
    """Serve an application until the process ends.

    Args:
        app: WSGI; called from several threads.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.

    Raises:
        OSError: The address cannot be listened on, or another process has the port.
    """

    class OfFamily(Endpoint):
        """An endpoint for this kind of address."""

        address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]

    server = make_server(host, port, app, OfFamily, _Handler)
    threading.Thread(target=server.serve_forever, name="endpoint", daemon=True).start()
    return server


def url_of(host: str, port: int) -> str:
    """Where what is served at an address is reached."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
