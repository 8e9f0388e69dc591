"""A real Alertmanager with the configuration of the compose file: an alert reaches a webhook."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from json_hook import JsonHook
from manifests import INFRA
from patience import wait_until

ALERTMANAGER = shutil.which("alertmanager") or shutil.which("prometheus-alertmanager")

pytestmark = pytest.mark.skipif(ALERTMANAGER is None, reason="Alertmanager is not installed")


def post(url: str, value: Any) -> None:
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=5).close()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_alerts_of_a_run_reach_the_webhook_together_and_what_follows_from_another_does_not(tmp_path: Path) -> None:
    assert ALERTMANAGER
    secret, text = tmp_path / "alert-webhook", (INFRA / "compose" / "alertmanager.yml").read_text()
    (tmp_path / "alertmanager.yml").write_text(
        text.replace("/run/secrets/alert-webhook", str(secret)).replace("group_wait: 10s", "group_wait: 1s")
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{probe.getsockname()[1]}"
    options = [f"--config.file={tmp_path / 'alertmanager.yml'}", f"--storage.path={tmp_path}"]
    command = [ALERTMANAGER, *options, f"--web.listen-address={url}", "--cluster.listen-address="]
    with JsonHook().running() as hook, (tmp_path / "log").open("w") as log:
        secret.write_text(f"{hook.endpoint}/T0")
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until("Alertmanager", lambda: is_ready(f"http://{url}"), 30)
            names = ["ConvmaeRunGone", "ConvmaeNoProgress", "ConvmaeRestartLoop"]
            labels = [{"alertname": name, "severity": "critical", "run": "base-1"} for name in names]
            said = {"summary": "base-1 <is> not well.", "runbook_url": "docs/runbook.md#here"}
            post(f"http://{url}/api/v2/alerts", [{"labels": each, "annotations": said} for each in labels])
            wait_until("the message", lambda: bool(hook.taken), 30)
        finally:
            server.terminate()
            server.wait(timeout=20)

    (message,) = hook.taken
    (attachment,) = message["attachments"]
    assert attachment["title"] == "firing: base-1"
    assert sorted(attachment["text"].split("\n")) == [
        "",
        "critical ConvmaeRestartLoop: base-1 <is> not well. docs/runbook.md#here",
        "critical ConvmaeRunGone: base-1 <is> not well. docs/runbook.md#here",
    ]
