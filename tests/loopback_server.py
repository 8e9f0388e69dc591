"""An HTTP server on the loopback address while a block runs: the base of stand-ins for stores and services."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class LoopbackServer(ABC):
    """Passes every request to `serve`, each in a thread of its own."""

    def __init__(self) -> None:
        server = self
        self.closed = threading.Event()
        """Set when the block ends, for requests that are held until then."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.serve(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_CONNECT = do_GET  # noqa: N815

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client was killed
                    super().handle()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._listener.server_port}"

    @abstractmethod
    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.closed.set()
            self._listener.shutdown()
            self._listener.server_close()
            thread.join()
