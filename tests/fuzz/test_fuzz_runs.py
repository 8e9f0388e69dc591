"""Run directories whose files a broken disk, another release or a stranger has changed, as the commands see them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from committed import save
from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import json_documents, json_lines
from probe_events import probe_events

from jobs.cli.main import app
from jobs.control import lease
from jobs.errors import RunFailedError
from jobs.export.run_tables import TABLE_SUFFIXES, export_tables
from jobs.recipe.named_recipes import named_recipe
from jobs.report.report import write_report
from jobs.run import roots
from jobs.run.directory import RunDirectory
from jobs.stack.ports import Ports
from jobs.stack.record import Stack
from pipeline.store.lease import Holder, current_lease
from pipeline.store.storage import Storage

Draw = Callable[[st.SearchStrategy[Any]], Any]

HEARTBEAT = {
    "state": "running",
    "updated_at_seconds": 1.7e9,
    "step": 3,
    "total_steps": 400,
    "steps_per_epoch": 16,
    "attempt": 1,
    "restarts": 0,
    "world_size": 2,
    "target_world_size": 2,
    "quarantined": 1,
    "loss": 0.5,
    "learning_rate": 1e-3,
    "images_per_second": 120.5,
    "device_flops_per_second": 2e12,
    "mfu_ratio": 0.4,
    "devices": "2 x A10 (data sheet)",
    "data_wait_ratio": 0.01,
    "eta_seconds": 300.0,
    "worker_seconds_total": 60.0,
    "last_step_at_seconds": 1.7e9,
    "checkpoint_at_seconds": 1.7e9,
    "checkpoint_seconds": 0.5,
    "checkpoint_interval_seconds": 60.0,
    "probe_epoch": 1,
    "probe_accuracies": {"knn_20": 0.5},
    "probe_control": {"knn_20": 0.25},
    "device": "cpu",
    "metrics_url": "http://127.0.0.1:1/metrics",
}
EVENTS = [
    {"at_seconds": 1.7e9, "attempt": 1, "kind": "start", "step": 0, "world_size": 2, "steps_redone": 0}
    | {"step_flops": 4e12, "peak_flops_per_second": 1e13, "devices": "2 x A10 (data sheet)"},
    {
        "at_seconds": 1.7e9 + 5,
        "attempt": 1,
        "kind": "checkpoint",
        "step": 2,
        "bytes": 5,
        "stall_seconds": 0.1,
        "duration_seconds": 1.0,
    },
    {
        "at_seconds": 1.7e9 + 9,
        "attempt": 1,
        "kind": "restart",
        "step": 3,
        "reason": "a rank died",
        "steps_redone": 1,
        "down_seconds": 4.0,
        "world_size": 2,
    },
    *probe_events({0: 0.25, 4: 0.5}),
    {"at_seconds": 1.7e9 + 20, "attempt": 1, "kind": "finished", "step": 4},
]
HISTORY = [
    {
        "step": step,
        "epoch": 0,
        "loss": 1 / step,
        "learning_rate": 1e-3,
        "world_size": 2,
        "attempt": 1,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.01,
    }
    for step in range(1, 5)
]
QUARANTINE = [
    {"step": 2, "id": 7, "fault": "checksum", "url": "s3://b/x.tar", "reason": "altered", "substitute": 8, "attempt": 1}
]
LEFT_OUT = [{"first_step": 2, "last_step": 2}]


@dataclasses.dataclass(frozen=True)
class Example:
    """Files of a run that are not as they were written, and what is typed."""

    changed: Mapping[str, bytes | None]
    """By path; None: it is gone."""
    command: tuple[str, ...]


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("status", "RUN"),
    ("status", "RUN", "--json"),
    ("history", "RUN"),
    ("history", "RUN", "--json"),
    ("quarantine", "RUN"),
    ("quarantine", "RUN", "--json"),
    ("checkpoints", "RUN"),
    ("checkpoints", "RUN", "--verify", "--json"),
    ("prune", "RUN"),
    ("stop", "RUN"),
    ("diff", "RUN", "RUN"),
    ("diff", "RUN", "RUN", "--json"),
    ("list", "--run-root", "ROOT"),
    ("list", "--run-root", "ROOT", "--json"),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with something of everything."""
    folder = tmp_path_factory.mktemp("fuzzed")
    local = folder / "local"
    local.mkdir()
    (local / "rank-0.pt").write_bytes(b"state")
    run = RunDirectory.of(Storage(), str(folder / "runs"), "first")
    run.claim(named_recipe("tiny"))
    run.write_heartbeat(HEARTBEAT)
    run.write_events(1, EVENTS)
    run.write_history(1, 1, HISTORY)
    run.write_quarantine(1, QUARANTINE)
    run.write_left_out(LEFT_OUT)
    for step in (2, 4):
        save(run, local, step)
    claim = {**dataclasses.asdict(Holder.here("drives the run")), "beat": 3, "age_seconds": 12.5, "over": False}
    run.storage.write(run.path("claims", "claim-000001.json"), json.dumps(claim).encode())
    return run


def files_of(run: RunDirectory) -> dict[str, Any]:
    """Path and content of every file of a run that commands read: rows of those with a line each."""
    found: dict[str, Any] = {}
    for path in sorted(Path(run.url).rglob("*.json*")):
        text = path.read_text()
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        found[str(path.relative_to(run.url))] = rows
    return found


@st.composite
def examples(draw: Draw, files: Mapping[str, Any]) -> Example:
    """One to three files changed, and now and then one that no release wrote."""
    changed: dict[str, bytes | None] = {}
    for path in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True)):
        content = files[path]
        if draw(st.integers(0, 9)) == 0:
            changed[path] = None
        else:
            changed[path] = draw(
                json_lines(content) if isinstance(content, list) and path.endswith("l") else json_documents(content)
            )
    strays = st.sampled_from(
        (
            "events/x.jsonl",
            "events/attempt-99999999999999999999.jsonl",
            "history/x.jsonl",
            "quarantine/.jsonl",
            "commits/step-x.json",
            "commits/step-00000003.json",
            f"commits/step-{'9' * 30}.json",
            "claims/claim-x.json",
            f"claims/claim-{'9' * 30}.json",
            "stop-request.json",
            "checkpoints/step-00000009/000001-0001/x.pt",
            "consolidated/step-9.safetensors",
        )
    )
    if draw(st.integers(0, 3)) == 0:
        changed[draw(strays)] = draw(st.sampled_from((b"", b"{}\n", b"x")))
    return Example(changed, draw(st.sampled_from(COMMANDS)))


@contextlib.contextmanager
def changed_files(run: RunDirectory, changed: Mapping[str, bytes | None]) -> Iterator[None]:
    """The run with these files, until the end of the block."""
    before: dict[Path, bytes | None] = {}
    for name, data in changed.items():
        path = Path(run.path(name))
        before[path] = path.read_bytes() if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(data)
    try:
        yield
    finally:
        for path, data in before.items():
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(data)


def typed(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Type a command in this process; returns its exit code, 1 for a run that failed, and standard output.

    Raises:
        UserError: What ends a command with one line and exit code 2.
    """
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            code = app(list(arguments), standalone_mode=False) or 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except RunFailedError as error:
            assert len(str(error).splitlines()) == 1
            code = 1
    return code, out.getvalue()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a heartbeat to move."""
    monkeypatch.setattr(lease, "FLUSH_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)


def test_commands_that_look_at_a_run_say_what_is_damaged(
    fuzz: Fuzz, sound: RunDirectory, tmp_path: Path, quick: None
) -> None:
    environment = {"CONVMAE_HOME": str(tmp_path), "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    root = sound.url.rpartition("/")[0]

    def run_commands(example: Example) -> None:
        places = {"RUN": f"file://{sound.url}", "ROOT": root}
        arguments = [places.get(word, word) for word in example.command]
        with changed_files(sound, example.changed), reading_only(Path(root), tmp_path):
            code, out = typed(arguments, environment)
        assert code in (0, 1)
        for line in out.splitlines() if "--json" not in arguments else []:
            assert line.isprintable() or not set(line) & set(map(chr, range(32)))
        if arguments[-1] == "--json" and arguments[0] not in ("history", "quarantine"):
            json.loads(out)
        elif arguments[-1] == "--json":
            assert all(isinstance(json.loads(line), dict) for line in out.splitlines())

    fuzz(run_commands, examples(files_of(sound)), batch=15)


def test_a_report_is_written_or_says_what_is_damaged(fuzz: Fuzz, sound: RunDirectory, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    recipe = named_recipe("tiny").amended({"data": str(data)}).to_json()
    skipped = [{"path": "a.jpg", "reason": "it is empty"}, {"path": "b.jpg", "reason": "not an image file"}]
    files = {name: content for name, content in files_of(sound).items() if not name.startswith("claims")}

    def run_reports(given: tuple[Example, bytes]) -> None:
        example, lines = given
        (data / "skipped.jsonl").write_bytes(lines)
        changed = {"recipe.json": json.dumps(recipe).encode(), **example.changed}
        with changed_files(sound, changed):
            try:
                url = write_report(sound)
                page = Path(url).read_text()
            finally:
                Path(sound.path("report.html")).unlink(missing_ok=True)
        assert page.rstrip().endswith("</html>")
        assert "<script>alert" not in page

    write_report(sound)  # the first one imports and compiles what draws, and looks for fonts: no example's time
    fuzz(run_reports, st.tuples(examples(files), json_lines(skipped)), batch=8)


def test_tables_of_a_run_are_written_or_say_what_is_damaged(fuzz: Fuzz, sound: RunDirectory, tmp_path: Path) -> None:
    def run_exports(example: Example) -> None:
        with changed_files(sound, example.changed):
            for name in TABLE_SUFFIXES:
                written = export_tables(sound, name, sound.storage, str(tmp_path / name), force=True)
                assert len(written) == 3

    export_tables(sound, "metrics", sound.storage, str(tmp_path / "metrics"))  # the first one imports what writes
    fuzz(run_exports, examples(files_of(sound)), batch=30)


def test_the_driver_of_a_run_is_named_whatever_its_claims_hold(fuzz: Fuzz, sound: RunDirectory, quick: None) -> None:
    files = files_of(sound)
    claimed = {name: content for name, content in files.items() if name.startswith(("claims", "heartbeat"))}

    def run_claims(example: Example) -> None:
        with changed_files(sound, example.changed):
            ruler = current_lease(sound.storage, sound.path("claims"))
            assert ruler is None or isinstance(ruler.text, str)
            assert ruler is None or ruler.holder is None or ruler.holder.is_dead_here() in (True, False)
            assert lease.is_live(sound) in (True, False)

    fuzz(run_claims, examples(claimed), batch=80)


def test_what_a_driver_reads_of_its_predecessors_is_rows_or_refused(fuzz: Fuzz, sound: RunDirectory) -> None:
    def run_records(example: Example) -> None:
        from jobs.run.record import RunRecord

        with changed_files(sound, example.changed):
            record = RunRecord(sound, sound.read_events())
            record.begin_attempt()
            assert record.attempt >= 1 and record.quarantined >= 0
            for row in sound.read_left_out():
                assert isinstance(row, dict)

    fuzz(run_records, examples(files_of(sound)), batch=80)


# What commands remember on this machine

ENDED = {"pid": 2**22 - 1, "namespace": "1:2", "boot": "x", "started": 5}
STACK = {
    "settings": {
        "home": "/nonexistent",
        "run_dir": "/nonexistent/run",
        "stack_id": "abc",
        "num_cpus": 2,
        "prometheus_binary": None,
        "ports": {field.name: 20000 + number for number, field in enumerate(dataclasses.fields(Ports))},
        "access_key": "key",
        "secret_key": "secret",
        "internal_key": "internal",
    },
    "keeper": ENDED,
    "services": {name: {"process": ENDED, "starts": 1, "gave_up": False} for name in ("s3", "ray")},
    "environment": {"AWS_ACCESS_KEY_ID": "x"},
}


def test_what_commands_remember_may_be_anything(fuzz: Fuzz, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def remembered_files(given: tuple[bytes, bytes]) -> None:
        (tmp_path / "run-roots.json").write_bytes(given[0])
        (home / "stack.json").write_bytes(given[1])
        assert isinstance(roots.remembered(tmp_path, "head:6379"), str)
        roots.remember(tmp_path, "head:6379", "s3://b/runs")
        assert roots.remembered(tmp_path, "head:6379") == "s3://b/runs"
        assert Stack.load(home) is None

    fuzz(remembered_files, st.tuples(json_documents({"head:6379": "s3://b/old"}), json_documents(STACK)), batch=100)
    shutil.rmtree(home)
