"""A web server over a folder, with faults on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web


class WebServer:
    """Serves the files of a folder; `address` is set once it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self.knows_ranges = True
        self.knows_if_match = True
        self.cut_bodies = 0
        """How many of the next bodies break off half-way."""
        self.ranges: list[str] = []
        """Range of every GET, in order."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        path = self.folder / request.match_info["path"]
        if path.name.startswith("forbidden"):
            raise web.HTTPForbidden
        if path.name.startswith("broken"):
            raise web.HTTPInternalServerError
        if not path.is_file():
            raise web.HTTPNotFound
        data, etag = path.read_bytes(), f'"{path.stat().st_mtime_ns:x}"'
        if self.knows_if_match and request.headers.get("If-Match", etag) != etag:
            raise web.HTTPPreconditionFailed
        asked = request.http_range if self.knows_ranges else slice(None)
        body = data[asked]
        status = 206 if self.knows_ranges and "Range" in request.headers else 200
        headers = {"ETag": etag, "Content-Length": str(len(body))}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        self.ranges.append(request.headers.get("Range", ""))
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if self.cut_bodies:
            self.cut_bodies -= 1
            await response.write(body[: len(body) // 2])
            assert request.transport
            request.transport.close()
            return response
        await response.write(body)
        return response


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """Run a server on a free port of the loopback address."""
    server, loop = WebServer(folder), asyncio.new_event_loop()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
