"""The address of a webhook: where it comes from, what is refused, in which format it is asked and by which proxy."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from loopback_server import LoopbackServer

from jobs.errors import RecipeError
from jobs.notices.notice_rules import Notice
from jobs.notices.webhook import UndeliveredError, Webhook
from jobs.run.directory import RunDirectory
from pipeline.access.proxies import Proxies
from pipeline.store.storage import Storage

FIELDS = {"notify_url": "env:CONVMAE_NOTIFY_URL", "notify_format": "auto"}
NOTICE = Notice("failed", 1_790_000_000.0, 2, 7, "no space left")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(Storage(), str(tmp_path), "first")


def test_without_the_field_there_is_none_also_in_recipes_that_are_older_than_it(run: RunDirectory) -> None:
    assert Webhook.of({"notify_url": ""}, {}, run) is None
    assert Webhook.of({}, {"CONVMAE_NOTIFY_URL": "http://h/x"}, run) is None


@pytest.mark.parametrize(
    "value", ["", "hooks.slack.com/s3cr3t", "ftp://h/s3cr3t", "https://u:s3cr3t@h/", "http://[s3cr3t"]
)
def test_a_variable_without_an_address_is_refused_and_not_quoted(run: RunDirectory, value: str) -> None:
    with pytest.raises(RecipeError, match=r"notify_url: must name a variable .*CONVMAE_NOTIFY_URL") as refused:
        Webhook.of(FIELDS, {"CONVMAE_NOTIFY_URL": value}, run)

    assert "s3cr3t" not in str(refused.value)


class Proxy(LoopbackServer):
    """Answers as the server behind it would, and notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.body = b""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        self.body = handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


def test_the_users_proxy_is_used_and_slacks_host_gets_slacks_format(tmp_path: Path) -> None:
    with Proxy().running() as proxy:
        run = RunDirectory.of(Storage(proxies=Proxies(http=proxy.endpoint)), str(tmp_path), "first")
        for host in ("hooks.slack.com", "alerts.test"):
            found = Webhook.of(FIELDS, {"CONVMAE_NOTIFY_URL": f"http://{host}/T0"}, run)
            assert found
            found.post(NOTICE)
            assert (json.loads(proxy.body).keys() == {"text"}) == (host == "hooks.slack.com")

    assert proxy.asked == ["http://hooks.slack.com/T0", "http://alerts.test/T0"]


def test_a_proxy_that_is_none_is_named_by_its_variable(tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(proxies=Proxies(http="socks5://127.0.0.1:9")), str(tmp_path), "first")
    found = Webhook.of(FIELDS, {"CONVMAE_NOTIFY_URL": "http://alerts.test/T0"}, run)
    assert found

    with pytest.raises(UndeliveredError, match=r"^HTTP_PROXY must be the address of an HTTP proxy$") as undelivered:
        found.post(NOTICE)

    assert undelivered.value.is_final
