"""A real Prometheus for a test, scraping often; and the answers of any Prometheus."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

from patience import wait_until

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")

_CONFIGURATION = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: convmae
    static_configs: [{{targets: [{targets}]}}]
"""


@contextmanager
def prometheus(folder: Path, rules: Path, *targets: str) -> Iterator[str]:
    """Run one that scrapes `targets` and evaluates `rules` every second; yields its URL."""
    assert PROMETHEUS
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "prometheus.yml"
    file.write_text(_CONFIGURATION.format(rules=rules, targets=", ".join(map(json.dumps, targets))))
    command = [PROMETHEUS, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            # It listens before it answers: queries are refused until then.
            wait_until("Prometheus", lambda: _is_ready(f"http://127.0.0.1:{port}"), 60)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=20)


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/-/ready", timeout=20):
            return True
    except OSError:  # includes 503
        return False


def asked(url: str, query: str, at_seconds: float | None = None) -> list[dict[str, Any]]:
    """The series that answer `query`, each with `metric` and `value`.

    Raises:
        ValueError: If Prometheus refuses the query, with what it says.
    """
    fields = {"query": query} | ({"time": str(at_seconds)} if at_seconds else {})
    try:
        with urlopen(f"{url}/api/v1/query?{urlencode(fields)}", timeout=20) as answer:
            return list(json.load(answer)["data"]["result"])
    except HTTPError as error:
        raise ValueError(f"{query}: {error.read().decode()}") from error


def wait_for_series(url: str, query: str, seconds: float = 120.0) -> None:
    """Poll until `query` has an answer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if asked(url, query):
                return
        except OSError:
            pass  # it is starting
        assert time.monotonic() < deadline, f"no answer to {query} within {seconds} s"
        time.sleep(0.2)
