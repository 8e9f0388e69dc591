"""A local S3 server for a benchmark: the stack's SeaweedFS alone, in a folder of its own, ended with the benchmark."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from jobs import stack_services
from jobs.stack_ports import choose
from jobs.stack_services import BUCKET, REGION, StackSettings
from pipeline.storage import Storage

START_SECONDS = 60.0


@contextlib.contextmanager
def local_s3(folder: Path) -> Iterator[tuple[Storage, str, int]]:
    """Start the server.

    Args:
        folder: Empty; for its data and logs.

    Yields:
        How to reach it, the URL of an empty bucket, and the server's pid.
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
    stack_services.write_configuration(settings, token="")
    environment = stack_services.service_environment("s3", settings, os.environ)
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            stack_services.command("s3", settings), env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not stack_services.is_healthy("s3", settings):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "s3.log").read_text()
            time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{settings.ports.s3}"
        yield Storage(endpoint, settings.access_key, settings.secret_key, region=REGION), f"s3://{BUCKET}", server.pid
    finally:
        server.terminate()
        server.wait()
        stack_services.remove_configuration(settings)
