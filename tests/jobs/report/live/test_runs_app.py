"""Pages of several runs, as `convmae ui` serves them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from browser import DESK, PHONE, needs_browser, watched
from moto.server import ThreadedMotoServer
from patience import wait_until
from PIL import Image
from playwright.sync_api import Browser

from jobs.metrics.endpoint import served, url_of
from jobs.recipe.named_recipes import named_recipe
from jobs.report.live.page_token import Guard
from jobs.report.live.run_list import RunList, RunsUnder, keyed
from jobs.report.live.runs_app import RunsApp
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

HOSTILE = "rank 1: <script>document.title='owned'</script>"


def make_run(storage: Storage, root: str, name: str, state: str, **beat: Any) -> RunDirectory:
    run = RunDirectory.of(storage, root, name)
    run.claim(named_recipe("tiny"))
    row = {"epoch": 0, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
    run.write_history(1, 1, [{"step": step, "loss": 1 / step, **row} for step in range(1, 51)])
    event = {"at_seconds": time.time() - 60, "attempt": 1, "kind": "start", "step": 0, "reason": "new run"}
    begun = event | {"world_size": 2, "steps_redone": 0}
    run.write_events(1, [begun, event | {"kind": state, "step": 50, "reason": HOSTILE}])
    about = {"state": state, "step": 50, "total_steps": 100, "loss": 0.02, "updated_at_seconds": time.time()}
    run.write_heartbeat({**about, **beat})
    return run


@contextmanager
def ui(root: str, *arguments: str, **environ: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`convmae ui` as it is typed; gives the address that it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "CONVMAE_"))}
    variables = {**clean, "CONVMAE_HOME": str(Path(root).parent / "home"), **environ}
    command = [sys.executable, "-m", "jobs.cli.main", "ui", *arguments, "--root", root, "--json"]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    text = ""
    try:
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait()}"
            text += line
        yield json.loads(text)["url"], process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(30) == 0
        except subprocess.TimeoutExpired:  # what it waits for is known to it alone
            dump = ["py-spy", "dump", "--pid", str(process.pid)]
            stacks = subprocess.run(dump, check=False, capture_output=True, text=True)
            process.kill()
            raise AssertionError(f"it does not end: {stacks.stdout}{stacks.stderr}") from None
        finally:
            process.wait()
            process.stdout.close()


@needs_browser
def test_live_and_ended_runs_are_listed_and_each_leads_to_its_page(tmp_path: Path, browser: Browser) -> None:
    root, storage = str(tmp_path / "runs"), Storage()
    live = make_run(storage, root, "live", "running", eta_seconds=3700.0, probe_accuracies={"knn_20": 0.5})
    ended = make_run(storage, root, "ended", "finished")
    picture = io.BytesIO()
    Image.new("RGB", (800, 300), "green").save(picture, "PNG")
    storage.write(ended.path("reconstructions.png"), picture.getvalue())
    make_run(storage, root, "silent", "running", updated_at_seconds=time.time() - 3600)
    broken = make_run(storage, root, "broken", "running")
    storage.write(broken.path("heartbeat.json"), b'{"state": "<b>"')

    with ui(root) as (url, _), watched(browser, url, PHONE) as seen:
        assert url.startswith("http://127.0.0.1:")
        seen.waits_for("h1", "4 runs")
        rows = {
            cells[0]: cells[1:]
            for cells in (each.locator("td").all_inner_texts() for each in seen.page.locator("tbody tr").all())
        }
        assert rows["live"][:5] == ["running", "50 of 100 (50%)", "0.0200", "kNN, k = 20: 50.0%", "1h 01m"]
        assert rows["ended"][:5] == ["finished", "50 of 100 (50%)", "0.0200", "-", "-"]
        assert rows["silent"][0] == "interrupted"
        assert rows["broken"][0] == "unreadable"
        assert "must hold JSON" in rows["broken"][-1]
        seen.is_in_order()

        seen.page.evaluate("window.isTheSame = true")
        beat = live.read_heartbeat()
        live.write_heartbeat({**beat, "step": 60, "updated_at_seconds": time.time()})
        make_run(storage, root, "later", "running")
        seen.waits_for("h1", "5 runs")
        seen.waits_for("td", "60 of 100 (60%)")
        assert seen.page.evaluate("window.isTheSame")

        seen.page.get_by_role("link", name="ended").click()
        seen.waits_for(".state", "finished")
        seen.waits_for('[data-part="training"] svg.narrow', "loss")
        seen.waits_for('[data-part="events"] td', HOSTILE)
        assert seen.page.title() == "ended · ConvMAE run"
        seen.page.wait_for_function("document.images.length === 1 && document.images[0].naturalWidth === 800")
        seen.is_in_order()
        seen.page.get_by_role("link", name="All runs").click()
        seen.waits_for("h1", "5 runs")

        seen.page.get_by_role("link", name="live").click()
        seen.waits_for('[data-part="ranks"]', "on the run's own page")
        live.write_heartbeat({**beat, "step": 70, "updated_at_seconds": time.time()})
        seen.waits_for_fact("Step", "70 / 100")
        seen.is_in_order()


@needs_browser
def test_runs_of_several_places_are_shown_by_their_directories(tmp_path: Path, browser: Browser) -> None:
    here = make_run(Storage(), str(tmp_path / "here"), "same", "finished")
    there = make_run(Storage(), str(tmp_path / "there"), "same", "running")
    make_run(Storage(), str(tmp_path / "there"), "other", "running")

    with ui(str(tmp_path / "here"), here.url, there.url) as (url, _), watched(browser, url, DESK) as seen:
        seen.waits_for("h1", "2 runs")
        links = seen.page.get_by_role("link").evaluate_all("links => links.map(link => link.href)")
        assert len(set(links)) == 2
        seen.page.goto(next(link for link in links if link.endswith(f"{list(keyed([here, there]))[1]}/")))
        seen.waits_for(".state", "running")
        seen.is_in_order()


@needs_browser
def test_a_store_that_is_out_leaves_what_was_read_and_says_that_it_is_old(browser: Browser) -> None:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    storage = Storage(f"http://{host}:{port}", "any", "any", region="us-east-1", retry_seconds=1.0)
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=storage.endpoint_url, **keys).create_bucket(Bucket="bucket")
    make_run(storage, "s3://bucket/runs", "first", "running")
    app = RunsApp(RunList(RunsUnder(storage, "s3://bucket/runs"), "All."))
    server = served(Guard("", "").protects(app), "127.0.0.1", 0)
    url = url_of("127.0.0.1", server.server_port)

    with watched(browser, url) as listed, watched(browser, f"{url}runs/first/") as seen:
        listed.waits_for("td", "running")
        seen.waits_for(".state", "running")
        seen.waits_for('[data-part="training"] svg.narrow', "loss")
        assert seen.page.locator("[data-notice]").is_hidden()

        moto.stop()
        for each in (listed, seen):
            each.waits_for("[data-notice]", "What is shown is old: of ")
            each.is_in_order()
        assert listed.page.locator("tbody tr").count() == 1
        assert seen.page.locator(".state").inner_text() == "running"  # not interrupted: nobody could look

        again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        again.start()
        try:
            boto3.client("s3", endpoint_url=storage.endpoint_url, **keys).create_bucket(Bucket="bucket")
            make_run(storage, "s3://bucket/runs", "first", "finished")
            seen.waits_for(".state", "finished")
            wait_until("no notice", lambda: seen.page.locator("[data-notice]").is_hidden(), 60)
        finally:
            again.stop()
    server.shutdown()


def test_elsewhere_a_token_is_asked_for_and_printed_or_taken(tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    make_run(Storage(), root, "ended", "finished")

    def status(url: str, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as found:
                return int(found.status)
        except urllib.error.HTTPError as error:
            return error.code

    with ui(root, "--host", "0.0.0.0") as (printed, _):
        address, _, token = printed.replace("0.0.0.0", "127.0.0.1").partition("?token=")
        assert len(token) >= 43
        for path in ("", "parts", "runs/ended/", "runs/ended/parts", "runs/nobody/"):
            assert status(address + path) == 401
        assert status(f"{address}runs/ended/", Authorization=f"Bearer {token}") == 200
        assert status(f"{address}runs/nobody/", Authorization=f"Bearer {token}") == 404
    mine = "of-my-own-choice_1"
    with ui(root, CONVMAE_UI_TOKEN=mine) as (printed, _):  # also on loopback
        assert printed.endswith(f"/?token={mine}")
        assert status(printed.partition("?")[0]) == 401
        assert status(printed.partition("?")[0], Authorization=f"Bearer {mine}") == 200


def test_what_libraries_do_at_exit_does_not_hold_it(tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    make_run(Storage(), root, "ended", "finished")
    (tmp_path / "sitecustomize.py").write_text("import atexit, time\natexit.register(time.sleep, 3600)\n")
    with (
        ui(root, PYTHONPATH=str(tmp_path)) as (url, _),
        urllib.request.urlopen(f"{url}runs/ended/", timeout=60) as page,
    ):
        assert page.status == 200


def test_runs_with_one_name_have_keys_of_their_own(tmp_path: Path) -> None:
    places = [("here", "same"), ("there", "same"), ("there", "other")]
    runs = [RunDirectory.of(Storage(), str(tmp_path / place), name) for place, name in places]

    found = keyed(runs)

    assert list(found.values()) == runs
    assert [key.partition("~")[0] for key in found] == ["same", "same", "other"]
    assert "other" in found
