"""MLflow's own server for a test, with a SQLite store; it can be stopped and started again on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import wait_until


class MlflowServer:
    """`mlflow server` on the loopback address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        places = [
            f"--backend-store-uri=sqlite:///{self._folder / 'mlflow.db'}",
            f"--artifacts-destination={self._folder}",
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self._port}", "--workers=1"]
        environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *places], cwd=self._folder, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        wait_until("mlflow server", self._answers, 120)

    def stop(self) -> None:
        """End it and its workers; its store stays."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """One that runs until the end of the block."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
