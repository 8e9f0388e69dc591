import base64
import html
import io
import json
import re
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_browser
from PIL import Image
from probe_events import probe_events

from jobs.checkpoint.checkpoint import write_commit
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.errors import RunError
from jobs.metrics.utilization import GroupCompute
from jobs.recipe.finetune import Finetune
from jobs.recipe.recipe import Recipe
from jobs.report.report import MOST_ATTEMPTS, MOST_CHECKPOINTS, MOST_FAULTS, MOST_SKIPPED, write_report
from jobs.run.directory import RunDirectory
from model import ConvMAEConfig
from pipeline.store.storage import Storage

STORAGE = Storage()
SCRIPT = "<script>alert('x')</script>&"
ATTEMPTS = [
    ("start", "new run", 0, 0, 2),
    ("restart", f"rank 1: {SCRIPT}", 20, 5, 1),
    ("resize", "workers 1 -> 2", 40, 3, 2),
]
TOTAL_STEPS = 60
RUN_NAME = "<script>run"  # no name that a command takes, but a folder may be called anything


class Page(HTMLParser):
    """A page taken apart; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            self.cells[-1][-1] += data
        if self.open[-1:] == ["dt"]:
            self.facts[data] = ""
        if self.open[-1:] == ["dd"]:
            self.facts[next(reversed(self.facts))] += data


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "a recipe",
        "model": ConvMAEConfig(norm_pix=False),
        "epochs": 3,
        "warmup_epochs": 1.0,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "lanes": 2,
        "checkpoint_every_steps": 10,
    }
    return Recipe(**(fields | changes))


def rows(first: int, end: int, attempt: int, world_size: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": 0,
            "loss": 1 / step,
            "learning_rate": 1e-3,
            "world_size": world_size,
            "attempt": attempt,
        }
        for step in range(first, end)
    ]


def attempt_event(number: int, attempt: tuple[str, str, int, int, int]) -> dict[str, Any]:
    kind, reason, step, redone, world_size = attempt
    return {
        "at_seconds": 1000.0 * number,
        "attempt": number,
        "kind": kind,
        "reason": reason,
        "step": step,
        "world_size": world_size,
        "steps_redone": redone,
    }


def checkpoint_event(number: int, step: int) -> dict[str, Any]:
    fields = {"stall_seconds": 0.25, "duration_seconds": 1.0, "bytes": 3_000_000, "milestone": step == TOTAL_STEPS}
    return {"at_seconds": 1000.0 * number + step, "attempt": number, "kind": "checkpoint", "step": step, **fields}


def heartbeat(state: str, step: int) -> dict[str, Any]:
    status = {"state": state, "step": step, "total_steps": TOTAL_STEPS, "steps_per_epoch": 20}
    return {**status, "updated_at_seconds": 1000.0 + 3723}


def new_run(folder: Path, **changes: Any) -> RunDirectory:
    run = RunDirectory(STORAGE, str(folder / "runs" / RUN_NAME))
    run.claim(recipe(**changes))
    return run


def finished_run(folder: Path, **changes: Any) -> RunDirectory:
    """A run of three attempts on one, then two workers, with one checkpoint left."""
    run = new_run(folder, **changes)
    ends = [26, 44, TOTAL_STEPS + 1]
    for number, (attempt, end) in enumerate(zip(ATTEMPTS, ends, strict=True), start=1):
        _, _, step, _, world_size = attempt
        events = [attempt_event(number, attempt)]
        events += [checkpoint_event(number, saved) for saved in range(step + 10, end, 10)]
        if end > TOTAL_STEPS:
            events.append({"at_seconds": 4723.0, "attempt": 3, "kind": "finished", "step": TOTAL_STEPS, "reason": ""})
        run.write_events(number, events)
        run.write_history(number, step + 1, rows(step + 1, end, number, world_size))
    run.write_heartbeat(heartbeat("finished", TOTAL_STEPS))
    commit_last_step(run)
    return run


def commit_last_step(run: RunDirectory) -> None:
    write_commit(
        run,
        Commit(
            step=TOTAL_STEPS, epoch=3, world_size=2, zero_stage=1, precision="fp32", recipe_digest="r",
            dataset_digest="d1", order_version=1, seed=0, attempt=3, created_at_seconds=0.0, milestone=True,
            counters={}, versions={"torch": "2.13.0"}, files=(CheckpointFile("model", 3, 4),),
        ),
    )  # fmt: skip


def report_of(run: RunDirectory) -> tuple[Page, str]:
    text = STORAGE.read(write_report(run)).decode()
    return Page(text), text


def attempt_cells(page: Page) -> list[Sequence[str]]:
    return [cells for cells in page.cells if len(cells) == 8]


def checkpoint_cells(page: Page) -> list[Sequence[str]]:
    return [cells for cells in page.cells if len(cells) == 6]


def test_report_lies_in_the_run_directory_and_is_the_same_every_time(tmp_path: Path) -> None:
    run = finished_run(tmp_path)

    url = write_report(run)
    first = STORAGE.read(url)

    assert url == run.path("report.html")
    assert STORAGE.read(write_report(run)) == first


def test_mfu_and_devices_are_those_of_attempts_that_recorded_them(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    assert "MFU" not in report_of(run)[0].facts

    for number, world_size in ((2, 1), (3, 2)):
        compute = GroupCompute(3e12, 10e12 * world_size, f"{world_size} x L4 (data sheet)").to_json()
        begun, *later = [event for event in run.read_events() if event["attempt"] == number]
        run.write_events(number, [begun | compute, *later])
    run.write_history(2, 21, [row | {"step_seconds": 0.6} for row in rows(21, 41, 2, 1)])  # 0.5 of the peak
    run.write_history(3, 41, [row | {"step_seconds": 0.25} for row in rows(41, TOTAL_STEPS + 1, 3, 2)])  # 0.6
    page, text = report_of(run)

    assert page.facts["MFU"] == f"{(0.5 * 0.6 + 0.6 * 0.25) / 0.85:.1%}"
    assert ">MFU<" in text
    assert page.facts["devices"] == "1 x L4 (data sheet) → 2 x L4 (data sheet)"


def test_headline_states_the_facts_of_the_run(tmp_path: Path) -> None:
    page, text = report_of(finished_run(tmp_path))

    expected = {
        "Step": "60 / 60",
        "Epoch": "3 / 3",
        "Final loss": f"{1 / TOTAL_STEPS:.4f}",
        "Images trained": "480",
        "Attempts": "3",
        "Restarts": "1",
        "Resizes": "1",
        "Steps redone": "8",
        "Workers": "2 → 1 → 2",
        "Goodput": "2.8%",  # of 0.975 s a step, in 2,059 s until the last checkpoint
        "Wall time": "1h 02m",
    }
    assert expected.items() <= page.facts.items()
    assert 'data-state="finished"' in text
    assert "last heard of 1970-01-01 01:18:43 UTC" in text


@pytest.mark.parametrize("views", [1, 4])
def test_images_are_counted_once_and_their_masks_named(tmp_path: Path, views: int) -> None:
    run = finished_run(tmp_path, model=ConvMAEConfig(views=views))
    STORAGE.write(run.path("reconstructions.png"), b"png")

    page, text = report_of(run)

    assert page.facts["Images trained"] == "480"
    assert page.facts.get("Masks of each") == (None if views == 1 else "4")
    assert ("an image is masked 4 times" in text) == (views > 1)
    assert page.facts["model.views"] == str(views)


def test_sizes_of_images_are_named_where_there_are_several(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "plain")
    assert "Image size" not in report_of(run)[0].facts

    changes = {"epochs": 10, "warmup_epochs": 1.0, "resolution_schedule": [[0, 160], [0.7, 224]]}
    recipe = run.read_recipe().amended({**changes, "model.image_size": 224})
    run.storage.write(run.path("recipe.json"), json.dumps(recipe.to_json()).encode())
    run.storage.write(run.path("reconstructions.png"), b"png")
    page, text = report_of(run)

    assert page.facts["Image size"] == "160x160; 224x224 from epoch 7"
    assert page.facts["resolution_schedule"] == "[[0.0, 160], [0.7, 224]]"
    assert "Pictures have the last of the run&#x27;s image sizes" in text


def test_every_attempt_is_listed_with_its_workers_steps_and_reason(tmp_path: Path) -> None:
    page, _ = report_of(finished_run(tmp_path))

    listed = [
        (kind, reason, int(step), int(redone), int(workers))
        for _, _, kind, workers, step, _, redone, reason in attempt_cells(page)[:-1]
    ]
    assert listed == ATTEMPTS
    assert attempt_cells(page)[-1][2] == "finished"


def test_checkpoints_are_listed_newest_first_and_those_that_exist_marked(tmp_path: Path) -> None:
    page, text = report_of(finished_run(tmp_path))

    cells = checkpoint_cells(page)
    assert [row[0] for row in cells] == ["60", "50", "40", "30", "20", "10"]
    assert [row[4] for row in cells] == ["yes", "", "", "", "", ""]
    assert {row[2] for row in cells} == {"3 MB"}
    assert "6 written, 18 MB, in 1.5 s" in text


def test_whatever_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    STORAGE.write(f"{data}/skipped.jsonl", json.dumps({"path": f"{SCRIPT}.jpg", "reason": SCRIPT}).encode())
    run = finished_run(tmp_path, name=SCRIPT, data=data)
    run.write_heartbeat({**heartbeat("failed", 30), "state": 'failed"><script>'})

    page, text = report_of(run)

    assert "<script" not in text
    assert RUN_NAME in "".join(page.texts)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert attempt_cells(page)[1][7] == f"rank 1: {SCRIPT}"
    assert [f"{SCRIPT}.jpg", SCRIPT] in page.cells
    assert page.facts["name"] == SCRIPT


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    STORAGE.write(run.path("reconstructions.png"), b"png")

    page, text = report_of(run)

    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    links = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href", "srcset")
    ]
    assert links
    assert all(link is not None and link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}


def test_charts_mark_the_restarts_and_give_each_id_once(tmp_path: Path) -> None:
    page, text = report_of(finished_run(tmp_path))

    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    panels = 3
    assert [chart["class"] for chart in charts] == ["wide", "narrow"]
    assert text.count("stroke: var(--mark)") == len(charts) * panels * (len(ATTEMPTS) - 1)
    assert len(ids) == len(set(ids)) > 0


@pytest.mark.parametrize(("norm_pix", "note"), [(False, False), (True, True)])
def test_reconstructions_are_embedded_and_normalised_ones_explained(tmp_path: Path, norm_pix: bool, note: bool) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(picture, "PNG")
    run = finished_run(tmp_path, model=ConvMAEConfig(norm_pix=norm_pix))
    STORAGE.write(run.path("reconstructions.png"), picture.getvalue())

    page, text = report_of(run)

    [source] = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert source is not None
    assert base64.b64decode(source.partition(",")[2]) == picture.getvalue()
    assert ("mean and variance of the original patch" in text) == note


def test_recipe_and_versions_are_shown_in_full(tmp_path: Path) -> None:
    run = finished_run(tmp_path)

    page, _ = report_of(run)

    fields = run.read_recipe().to_json()
    model = fields.pop("model")
    assert fields.keys() | {f"model.{name}" for name in model} <= page.facts.keys()
    assert page.facts["model.norm_pix"] == "false"
    assert page.facts["torch"] == "2.13.0"
    assert page.facts["data set digest"] == "d1"


def test_the_timeline_shows_how_long_attempts_lasted_on_how_many_workers(tmp_path: Path) -> None:
    page, _ = report_of(finished_run(tmp_path))

    bars = [attrs for _, attrs in page.tags if "flex-grow" in (attrs.get("style") or "")]
    assert [bar["class"] for bar in bars] == ["start", "restart", "resize"]
    assert [bar["style"] for bar in bars] == ["flex-grow: 1000", "flex-grow: 1000", "flex-grow: 1723"]
    assert bars[1]["title"] == "attempt 2: 1 workers for 16m 40s, restart"


def test_data_faults_are_named_and_counted_by_kind(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    ledger = [
        {
            "id": number,
            "fault": "checksum" if number else "missing",
            "url": f"s3://b/{SCRIPT}",
            "reason": SCRIPT,
            "step": 7,
            "substitute": number + 1,
            "attempt": 1,
        }
        for number in range(MOST_FAULTS + 1)
    ]
    run.write_quarantine(1, ledger)

    page, text = report_of(run)

    faults = [cells for cells in page.cells if len(cells) == 5]
    assert len(faults) == MOST_FAULTS
    assert faults[0] == ["7", "missing", "0", f"s3://b/{SCRIPT}", SCRIPT]
    assert f"{MOST_FAULTS + 1} samples were found unusable and replaced: {MOST_FAULTS} checksum, 1 missing" in text
    assert "<script" not in text


def test_a_name_in_another_encoding_is_in_the_report_as_escapes(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    place = {"id": 1, "fault": "missing", "step": 7, "substitute": 2, "attempt": 1}
    run.write_quarantine(1, [{**place, "url": "s3://b/caf\udce9", "reason": "no such file: caf\udce9.jpg"}])

    page, _ = report_of(run)

    (fault,) = [cells for cells in page.cells if len(cells) == 5]
    assert fault[3:] == ["s3://b/caf\\udce9", "no such file: caf\\udce9.jpg"]


def test_a_run_without_data_faults_says_so(tmp_path: Path) -> None:
    _, text = report_of(finished_run(tmp_path))

    assert "every sample that was read is as it was ingested" in text


def test_first_skipped_images_are_named_and_all_are_counted(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    lines = [json.dumps({"path": f"{number}.jpg", "reason": "truncated"}) for number in range(1234)]
    STORAGE.write(f"{data}/skipped.jsonl", "\n".join(lines).encode())

    page, text = report_of(finished_run(tmp_path, data=data))

    named = [cells[0] for cells in page.cells if len(cells) == 2]
    assert named == [f"{number}.jpg" for number in range(MOST_SKIPPED)]
    assert "1,234" in text


@pytest.mark.parametrize(("content", "sentence"), [(b"", "None: every image"), (None, "is not there")])
def test_absence_of_skipped_images_is_distinguished_from_absence_of_the_list(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    data = str(tmp_path / "data")
    if content is not None:
        STORAGE.write(f"{data}/skipped.jsonl", content)

    _, text = report_of(finished_run(tmp_path, data=data))

    assert sentence in text


def test_run_that_never_started_reports(tmp_path: Path) -> None:
    page, text = report_of(new_run(tmp_path))

    assert "not started" in text
    assert page.facts["Attempts"] == "0"
    assert "No step was recorded yet." in text
    assert "No checkpoint was committed yet." in text


def test_running_run_reports_its_latest_loss_and_no_end(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.write_events(1, [attempt_event(1, ATTEMPTS[0])])
    run.write_history(1, 1, rows(1, 2, 1, 2))
    run.write_heartbeat(heartbeat("running", 1))

    page, text = report_of(run)

    assert page.facts["Latest loss"] == "1.0000"
    assert page.facts["Workers"] == "2"
    assert "Final loss" not in page.facts
    assert "Dashed lines" not in text


def test_failed_run_says_why_at_the_top(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    failed = {"at_seconds": 2000.0, "attempt": 1, "kind": "failed", "step": 0, "reason": "disk on fire"}
    run.write_events(1, [attempt_event(1, ATTEMPTS[0]), failed])
    run.write_heartbeat(heartbeat("failed", 0))

    _, text = report_of(run)

    assert "<p>disk on fire</p>" in text.partition("</header>")[0]


def test_long_run_makes_a_small_file_that_says_what_it_omits(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    attempts = [("start" if number == 1 else "restart", "x" * 200, 0, 0, number % 7 + 1) for number in range(1, 501)]
    events = [attempt_event(number, attempt) for number, attempt in enumerate(attempts, start=1)]
    run.write_events(1, events + [checkpoint_event(1, step) for step in range(1, 3001)])
    run.write_history(1, 1, rows(1, 20_001, 1, 2))
    commit_last_step(run)
    run.write_heartbeat(heartbeat("running", 20_000))

    page, text = report_of(run)

    assert len(text.encode()) < 1_000_000
    assert page.facts["Latest loss"] == f"{1 / 20_000:.4f}"
    assert page.facts["Workers"] == "1 to 7"
    assert [row[0] for row in attempt_cells(page)] == [str(number) for number in range(501 - MOST_ATTEMPTS, 501)]
    assert f"{500 - MOST_ATTEMPTS} older ones are not listed." in text
    kept = [str(TOTAL_STEPS)]
    newest = [f"{step:,}" for step in range(3000, 3000 - MOST_CHECKPOINTS, -1)]
    assert [row[0] for row in checkpoint_cells(page)] == newest + kept
    assert f"{3000 - MOST_CHECKPOINTS - len(kept):,} older ones are not listed." in text


def test_report_of_an_unknown_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="must exist"):
        write_report(RunDirectory.of(STORAGE, str(tmp_path), "nobody"))


LAID_OUT = """<script>
const hidden = element => getComputedStyle(element).display === "none";
const wide = [...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  return !element.closest(".table, .picture, svg") && box.width && box.right > innerWidth + 1;
});
document.title = JSON.stringify({
  viewport: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map(element => element.className),
  charts: [...document.querySelectorAll("svg")].filter(svg => !hidden(svg)).map(svg => svg.getAttribute("class")),
  letters: Math.min(...[...document.querySelectorAll("td, dd, p")].map(e => parseFloat(getComputedStyle(e).fontSize))),
  pictures: [...document.images].map(image => image.complete && image.naturalWidth > 0),
});
</script>"""


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in headless Chromium, which may reach no host."""
    alone = ("--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, "--headless", *alone, profile, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture
def page_of_a_run(tmp_path: Path) -> Path:
    """The report of a run with long names and a picture, as a file."""
    run = finished_run(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (800, 300), "green").save(picture, "PNG")
    STORAGE.write(run.path("reconstructions.png"), picture.getvalue())
    page = tmp_path / "report.html"
    page.write_bytes(STORAGE.read(write_report(run)))
    return page


@needs_browser
@pytest.mark.parametrize(("width", "charts"), [(360, "narrow"), (1280, "wide")])
def test_report_is_readable_on_a_phone_and_on_a_desk(page_of_a_run: Path, width: int, charts: str) -> None:
    text = page_of_a_run.read_text()
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')  # it forbids the script that measures
    page_of_a_run.write_text(policy.sub("", text).replace("</body>", f"{LAID_OUT}</body>"))

    dom = chromium(page_of_a_run, f"--window-size={width},800", "--dump-dom").stdout

    title = re.search("<title>(.*?)</title>", dom)
    assert title
    found = json.loads(html.unescape(title[1]))
    assert found["page"] <= found["viewport"] == width  # a scroll bar takes a part
    assert found["wide"] == []
    assert found["charts"]
    assert set(found["charts"]) == {charts}
    assert found["letters"] >= 12
    assert found["pictures"] == [True]


@needs_browser
def test_report_prints_and_loads_nothing_from_elsewhere(page_of_a_run: Path) -> None:
    printed = page_of_a_run.with_suffix(".pdf")

    log = chromium(page_of_a_run, f"--print-to-pdf={printed}").stderr

    assert printed.read_bytes().startswith(b"%PDF")
    assert "Refused to" not in log
    assert "ERR_" not in log


def test_the_accuracy_is_drawn_from_epoch_0_with_its_intervals(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    before, _ = report_of(run)
    assert "kNN accuracy" not in before.facts and "Not measured." in before.texts
    failed = {"at_seconds": 4000.0, "attempt": 3, "kind": "probe-failed", "step": 40, "reason": SCRIPT}
    run.write_events(3, [attempt_event(3, ATTEMPTS[2]), *probe_events({0: 0.25, 60: 0.5, 20: 0.4}), failed])

    page, text = report_of(run)

    assert page.facts["kNN accuracy"] == "50.0%"
    rows = [cells for cells in page.cells if len(cells) == 5]
    assert [cells[0] for cells in rows] == ["60", "20", "0"]
    assert rows[0][3] == "50.0% (43.1% to 56.9%)"  # 100 of 200, by Wilson
    assert "random weights, kNN" in text and "weights of init_from" not in text
    assert "Top-1 on 200 labelled samples" in text
    assert "1 probes failed" in text
    run.storage.write(run.path("recipe.json"), json.dumps(recipe(init_from="s3://b/w.safetensors").to_json()).encode())
    assert "weights of init_from, kNN" in report_of(run)[1]


def test_the_validations_of_a_fine_tuning_are_drawn_with_their_intervals(tmp_path: Path) -> None:
    run = new_run(tmp_path, finetune=Finetune())
    history = rows(1, TOTAL_STEPS + 1, 1, 1)
    for number, correct in enumerate((80, 120, 110), start=1):
        about = {"validation_samples": 200, "validation_plan": "a plan", "validation_top5": 0.9}
        history[20 * number - 1] |= {"epoch": number - 1, "validation_top1": correct / 200, **about}
    run.write_history(1, 1, history)
    run.write_heartbeat(heartbeat("running", TOTAL_STEPS))

    page, text = report_of(run)

    assert page.facts["Validation top-1"] == "55.0%"
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels.count("accuracy (top-1; top-5) at 3 steps") == 2
    found = [cells for cells in page.cells if len(cells) == 4]
    assert [cells[:2] for cells in found] == [["60", "3"], ["40", "2"], ["20", "1"]]
    assert found[1][2] == "60.0% (53.1% to 66.5%)"  # by Wilson
    assert "200 labelled samples" in text and "before training" not in text
