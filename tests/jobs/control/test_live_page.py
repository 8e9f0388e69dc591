"""The page of a run, in a browser, while a test calls its monitor as ranks and the controller would."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from browser import DESK, PHONE, needs_browser, watched
from guarded_s3 import GuardedS3, Principal
from monitored_runs import Start, begin, commit, record, served
from patience import wait_until
from playwright.sync_api import Browser
from probe_events import probe_event

from jobs.metrics.endpoint import MOST_CLIENTS, SILENT_SECONDS
from jobs.metrics.rank_figures import RankFigures
from jobs.recipe.named_recipes import named_recipe
from jobs.report.live.drawing_process import DrawingProcess
from jobs.report.live.live_figures import LiveFigures
from jobs.report.live.live_page import RUN_PARTS
from jobs.report.status import page_address, run_status, status_lines
from jobs.run.directory import RunDirectory
from jobs.run.own_code import PROJECT
from pipeline.access.profile_keys import Keys
from pipeline.store.storage import Storage

HOSTILE = "rank 1: <img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run as a driver leaves it to its monitor, in a store that other processes know, too."""
    directory = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    directory.claim(named_recipe("tiny"))
    return directory


@dataclass(frozen=True)
class Answer:
    """To one request; redirects are not followed."""

    status: int
    headers: Message
    body: bytes


def answer(url: str, **headers: str) -> Answer:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request("GET", url.removeprefix(f"http://{parts.netloc}"), headers=headers)
        found = connection.getresponse()
        return Answer(found.status, found.headers, found.read())
    finally:
        connection.close()


@needs_browser
def test_the_page_follows_an_attempt_s_end_a_restart_and_a_resize_without_a_reload(
    start: Start, run: RunDirectory, browser: Browser
) -> None:
    monitor = start(flush_seconds=0.2)
    begin(monitor)
    record(monitor, range(1, 31))
    commit(monitor, 20)
    with watched(browser, monitor.status()["page_url"], PHONE) as seen:
        total = monitor.status()["total_steps"]
        seen.waits_for_fact("Step", f"30 / {total:,}")
        seen.waits_for(".state", "running")
        seen.waits_for('[data-part="training"] svg.narrow', "learning rate")
        seen.page.evaluate("window.isTheSame = true")
        ranks = seen.page.locator('[data-part="ranks"] tbody tr')
        assert ranks.count() == 2
        assert "0.200" in ranks.nth(1).inner_text()
        assert seen.page.locator('[data-part="checkpoints"] tbody tr').count() == 1
        seen.is_in_order()

        monitor.worker_failed(HOSTILE, remedy="restart")
        seen.waits_for(".state", "restarting")
        seen.waits_for('[data-part="ranks"]', "No rank trains now.")
        begin(monitor, resume_step=20)
        record(monitor, range(21, 41), attempt=2)
        seen.waits_for_fact("Step", f"40 / {total:,}")
        seen.waits_for_fact("Restarts", "1")
        seen.waits_for_fact("Steps redone", "10")
        seen.waits_for('[data-part="attempts"] td', HOSTILE)
        seen.is_in_order()

        begin(monitor, world_size=3, resume_step=40)
        record(monitor, range(41, 51), attempt=3, world_size=3)
        probe = probe_event(40, 0.5)
        monitor.probed(40, {key: probe[key] for key in probe if key not in ("at_seconds", "attempt", "kind", "step")})
        seen.waits_for_fact("Workers", "2 → 3")
        seen.waits_for_fact("Workers now", "3 of 3")
        seen.waits_for_fact("kNN accuracy", "50.0%")
        seen.waits_for('[data-part="accuracy"] svg.narrow', "kNN")
        assert seen.page.locator('[data-part="attempts"] .bars div').count() == 3
        seen.is_in_order()

        monitor.end("finished")
        seen.waits_for(".state", "finished")
        assert seen.page.locator('[data-part="ranks"]').inner_text() == ""
        seen.page.set_viewport_size({"width": DESK["width"], "height": DESK["height"]})
        assert seen.page.locator('[data-part="training"] svg.wide').is_visible()
        seen.is_in_order()
        assert seen.page.evaluate("window.isTheSame")
        assert seen.page.title() == "first · ConvMAE run"


@needs_browser
def test_the_page_is_as_dark_as_the_reader_s_screen(start: Start, run: RunDirectory, browser: Browser) -> None:
    monitor = start()
    background = "getComputedStyle(document.body).backgroundColor"
    with watched(browser, monitor.status()["page_url"], color_scheme="dark") as dark:
        assert dark.page.evaluate(background) == "rgb(20, 23, 26)"
    with watched(browser, monitor.status()["page_url"], color_scheme="light") as light:
        assert light.page.evaluate(background) == "rgb(255, 255, 255)"


@needs_browser
def test_a_page_whose_run_is_gone_says_so(start: Start, run: RunDirectory, browser: Browser, tmp_path: Path) -> None:
    """The monitor is a process of its own here, so that it can be killed."""
    with monitoring(run) as (process, url), watched(browser, url) as seen:
        seen.waits_for(".state", "running")
        process.kill()
        seen.waits_for("[data-notice]", "No answer since")
        assert seen.page.locator(".state").inner_text() == "running"


MONITORING = """
import sys, time
sys.path[:0] = {paths!r}
from jobs.run.directory import RunDirectory
from monitored_runs import begin, record, start_monitor
from pipeline.access.profile_keys import Keys
from pipeline.store.storage import Storage
run = RunDirectory(Storage(), {url!r})
monitor = start_monitor(run, flush_seconds=0.2)
begin(monitor)
record(monitor, range(1, 31))
print(monitor.status()["page_url"], flush=True)
sys.stdin.readline()
slowest = 0.0
for step in range(31, 531):
    began = time.perf_counter()
    record(monitor, range(step, step + 1))
    slowest = max(slowest, time.perf_counter() - began)
print(slowest, "matplotlib" in sys.modules, flush=True)
sys.stdin.readline()
"""


@contextmanager
def monitoring(run: RunDirectory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a run's monitor alone; gives it, and the address of its page."""
    code = MONITORING.format(paths=[str(PROJECT), str(PROJECT / "tests")], url=run.url)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_the_monitor_s_process_draws_nothing_and_its_lock_is_free(run: RunDirectory) -> None:
    with monitoring(run) as (process, url):
        assert process.stdin
        assert process.stdout
        wait_until("parts", lambda: b"svg" in answer(f"{url}parts").body, 120)

        process.stdin.write("\n")
        process.stdin.flush()
        for _ in range(200):
            assert answer(f"{url}parts").status == 200
        slowest, has_drawn = process.stdout.readline().split()

    assert has_drawn == "False"
    assert float(slowest) < 1.0


def test_what_draws_the_page_ends_with_the_monitor(run: RunDirectory) -> None:
    with monitoring(run) as (process, url):
        wait_until("parts", lambda: b"data-state" in answer(f"{url}parts").body, 120)
        (drawer,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        wait_until("its end", lambda: not drawer.is_running() or drawer.status() == psutil.STATUS_ZOMBIE, 30)


def test_what_draws_the_page_is_replaced_when_it_is_killed(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    monitor.flush()
    before = set(psutil.Process().children())  # of earlier tests' monitors, whose pages somebody has just looked at
    drawing = DrawingProcess(run, lambda: LiveFigures(monitor.status(), np.empty((0, len(RankFigures._fields)))))
    try:
        assert {name for drawn in drawing.draw() for name in drawn.parts} == set(RUN_PARTS)
        (process,) = set(psutil.Process().children()) - before
        process.kill()
        process.wait()

        drawn = list(drawing.draw())

        assert {name for each in drawn for name in each.parts} == set(RUN_PARTS)
        assert not any(each.fault for each in drawn)
    finally:
        drawing.close()
    assert set(psutil.Process().children()) <= before


def test_keys_that_the_store_refuses_are_replaced_by_those_that_the_monitor_gets(open_s3: Storage) -> None:
    """As with keys of SSO: only the monitor's process can ask for newer ones."""
    run = RunDirectory.of(open_s3, "s3://bucket/runs", "first")
    run.claim(named_recipe("tiny"))
    old, new = Principal(token="old"), Principal(token="new")
    with GuardedS3(open_s3, principals={"OLD": old, "NEW": new}).running() as guard:
        storage = replace(open_s3, endpoint_url=guard.endpoint, key="OLD", secret="x", token="old", renewal=newer_keys)
        drawing = DrawingProcess(replace(run, storage=storage), lambda: LiveFigures({}, np.empty((0, 9))))
        try:
            assert not any(each.fault for each in drawing.draw())
            old.refusal = "ExpiredToken"
            faults = [each.fault for each in drawing.draw()]
            assert "credentials" in faults[0]

            wait_until("newer keys", lambda: not any(each.fault for each in drawing.draw()), 60)
        finally:
            drawing.close()
    assert {seen.key_id for seen in guard.seen if not seen.refused} == {"OLD", "NEW"}


def newer_keys() -> Keys:
    return Keys("NEW", "x", "new")


def test_on_loopback_only_requests_to_this_machine_are_answered(start: Start, run: RunDirectory) -> None:
    """A name of another site that leads to this machine would otherwise let that site read the page."""
    url = start().status()["page_url"]
    host = urlsplit(url).netloc

    assert answer(url).status == 200
    assert answer(url, Host=f"localhost:{urlsplit(url).port}").status == 200
    assert answer(url, Host="evil.example").status == answer(f"{url}parts", Host="evil.example:80").status == 403
    assert answer(url, Host="127.0.0.1.evil.example").status == 403
    assert answer(f"http://{host}/metrics", Host="evil.example").status == 200
    assert run.read_page_token() == ""


@pytest.fixture
def exposed(start: Start, run: RunDirectory) -> Iterator[tuple[str, str]]:
    """Address and token of a page that other machines reach."""
    monitor = start(host="0.0.0.0")
    begin(monitor)
    record(monitor, range(1, 6))
    monitor.flush()
    port = urlsplit(monitor.status()["page_url"]).port
    yield f"http://127.0.0.1:{port}/", run.read_page_token()


def test_elsewhere_the_page_asks_for_the_run_s_token_and_metrics_do_not(exposed: tuple[str, str]) -> None:
    url, token = exposed
    assert len(token) >= 43

    for refused in (url, f"{url}parts", f"{url}?token=", f"{url}?token={token}x", f"{url}parts?token={token[:-1]}"):
        found = answer(refused)
        assert (found.status, found.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert b"`convmae status first` prints" in found.body
    for wrong in ("Bearer wrong", f"Basic {token}", "Bearer", "Bearer \xe4"):
        assert answer(url, Authorization=wrong).status == 401
    assert answer(url, Authorization=f"Bearer {token}").status == 200
    assert answer(f"{url}metrics").status == 200

    opened = answer(f"{url}?token={token}")
    cookie = str(opened.headers["Set-Cookie"])
    assert (opened.status, opened.headers["Location"]) == (303, "./")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))
    kept = cookie.partition(";")[0]
    assert answer(url, Cookie=f'other={{"a":1}}; {kept}').status == 200
    assert answer(url, Cookie=f"{kept}x").status == 401
    outside = answer(f"http://{urlsplit(url).netloc}//evil.example/?token={token}")
    assert "evil" not in str(outside.headers["Location"])


@needs_browser
def test_the_address_that_status_prints_opens_the_page_and_hides_the_token(
    exposed: tuple[str, str], run: RunDirectory, browser: Browser
) -> None:
    url, token = exposed
    status = run_status(run)
    address = page_address(run, status)
    assert dict(status_lines({**status, "page_url": address}))["page"] == address
    assert address.endswith(f"/?token={token}")

    with watched(browser, address.replace("0.0.0.0", "127.0.0.1")) as seen:
        assert seen.page.url == url
        seen.waits_for(".state", "running")
        seen.is_in_order()
        assert seen.page.evaluate("document.cookie") == ""


def test_a_run_s_token_outlives_its_driver_and_an_ended_run_has_no_page(start: Start, run: RunDirectory) -> None:
    first = start(host="0.0.0.0")
    token = run.read_page_token()
    first.flush()
    assert page_address(run, run_status(run)).endswith(token)

    second = start(host="0.0.0.0")
    assert run.read_page_token() == token
    second.end("stopped")
    assert page_address(run, run_status(run)) == ""

    run.storage.write(run.path("page-token.json"), b'{"token": "guess"}')
    start(host="0.0.0.0")
    assert len(run.read_page_token()) == len(token)


def test_clients_that_hang_hold_up_neither_the_page_nor_a_scrape_nor_the_monitor(
    start: Start, run: RunDirectory
) -> None:
    monitor = start()
    begin(monitor)
    url = monitor.status()["page_url"]
    address = ("127.0.0.1", int(urlsplit(url).port or 0))
    hanging: list[socket.socket] = []
    try:
        for _ in range(3 * MOST_CLIENTS):
            client = socket.create_connection(address, timeout=5)
            client.sendall(b"GET /parts HTTP/1.1\r\nHost: ")
            hanging.append(client)
        began = time.monotonic()
        record(monitor, range(1, 101))
        assert answer(url).status == 200
        assert served(monitor)["convmae_step"] == 100
        assert time.monotonic() - began < SILENT_SECONDS
        wait_until("all to be cut off", lambda: all(map(is_cut_off, hanging)), 30)
        assert answer(url).status == 200
    finally:
        for client in hanging:
            client.close()


def is_cut_off(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_an_answer_has_what_is_new_and_forbids_what_is_foreign(start: Start, run: RunDirectory) -> None:
    monitor = start()
    begin(monitor)
    record(monitor, range(1, 6))
    monitor.flush()
    url = monitor.status()["page_url"]
    found: dict[str, Any] = {}

    def is_complete() -> bool:
        found.update(json_of(f"{url}parts"))
        return "training" in found["parts"]

    wait_until("all parts", is_complete, 120)
    digests = {name: digest for name, (digest, _) in found["parts"].items()}
    again = json_of(f"{url}parts?have={','.join(digests.values())}")
    policy = answer(url).headers["Content-Security-Policy"]

    assert set(again["parts"]) <= {"header", "facts"}  # which say when the run was last heard of
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert answer(f"{url}parts").headers["Cache-Control"] == "no-store"


def json_of(url: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(answer(url).body)
    return loaded
