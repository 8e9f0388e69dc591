"""A local S3 server of one's own, which can be killed and started: the stack's SeaweedFS alone, in its own folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.stack import services
from jobs.stack.ports import choose
from jobs.stack.services import BUCKET, REGION, StackSettings
from pipeline.store.storage import Storage

START_SECONDS = 60.0


@dataclass
class LocalS3:
    """The server, while it is up or down; its data is kept."""

    folder: Path
    settings: StackSettings
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """URL of its bucket, which is empty at first."""
        return f"s3://{BUCKET}"

    @property
    def storage(self) -> Storage:
        """Access to it."""
        endpoint = f"http://127.0.0.1:{self.settings.ports.s3}"
        return Storage(endpoint, self.settings.access_key, self.settings.secret_key, region=REGION)

    @property
    def pid(self) -> int:
        """Pid of the server."""
        assert self.process, "it is up"
        return self.process.pid

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log_path = self.folder / "s3.log"
        environment = services.service_environment("s3", self.settings, os.environ)
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                services.command("s3", self.settings), env=environment, stdout=log, stderr=log, cwd=self.folder
            )
        deadline = time.monotonic() + START_SECONDS
        while not services.is_healthy("s3", self.settings):
            assert self.process.poll() is None and time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL it."""
        assert self.process, "it is up"
        self.process.kill()
        self.process.wait()
        self.process = None


@contextlib.contextmanager
def local_s3(folder: Path) -> Iterator[LocalS3]:
    """Start a server that ends with the context.

    Args:
        folder: Empty; for its data and logs.
    """
    (folder / "run").mkdir()
    settings = StackSettings(
        stack_id=secrets.token_hex(16),
        home=folder,
        run_dir=folder / "run",
        ports=choose({}),
        access_key=secrets.token_hex(10).upper(),
        secret_key=secrets.token_urlsafe(30),
        internal_key=secrets.token_hex(32),
        num_cpus=None,
        prometheus_binary=None,
    )
    services.write_configuration(settings, token="")
    server = LocalS3(folder, settings)
    try:
        server.start()
        yield server
    finally:
        if server.process:
            server.process.terminate()
            server.process.wait()
        services.remove_configuration(settings)
