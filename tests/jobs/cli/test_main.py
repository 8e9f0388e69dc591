from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import save_file

import jobs
from jobs.checkpoint import checkpoint
from jobs.checkpoint.checkpoint import Commit
from jobs.cli import main
from jobs.cluster.session import Session
from jobs.control import workflow
from jobs.errors import RunFailedError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from model import ConvMAE
from pipeline.order.sample_order import Order
from pipeline.shard.index import IndexRow, ShardIndex
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

MANIFEST = Manifest(
    2, "digest", (), 0, ShardTable.of([ShardEntry("a", 600, 6000, "ab" * 32), ShardEntry("b", 425, 4250, "cd" * 32)])
)
NOWHERE = "127.0.0.1:9"  # the discard port: nobody listens


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    error: str


Convmae = Callable[..., Ended]


@pytest.fixture(autouse=True)
def no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without local stack, cluster or cloud."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "RAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CONVMAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")


@pytest.fixture
def convmae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convmae:
    """The command, in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["convmae", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.main()
        code = caught.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def data(tmp_path: Path) -> str:
    url = str(tmp_path / "data")
    MANIFEST.save(Storage(), url, [])
    return url


@pytest.fixture
def indexed_data(tmp_path: Path) -> str:
    """100 samples in two shards, without their tars."""
    url, entries = str(tmp_path / "indexed"), []
    for shard in ("a", "b"):
        rows = [IndexRow(f"{shard}{n}", 512, 9, 1, 2, 3, n % 2) for n in range(50)]
        index = ShardIndex.from_rows(shard, 5000, "", (), rows)
        entries.append(ShardEntry.of(index))
        Storage().write(entries[-1].index_url(url), index.to_bytes())
    Manifest(2, "digest", (), 0, ShardTable.of(entries)).save(Storage(), url, [])
    return url


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A run root with one run of five steps that finished."""
    root = str(tmp_path / "runs")
    run = RunDirectory.of(Storage(), root, "first")
    run.claim(named_recipe("tiny"))
    row = {"epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
    run.write_history(1, 1, [{"step": step, **row} for step in range(1, 6)])
    event = {"at_seconds": 1.7e9, "attempt": 1, "kind": "start", "step": 0, "reason": "new run"}
    run.write_events(1, [event, event | {"kind": "finished", "reason": "", "step": 5}])
    beat = {"state": "finished", "step": 5, "total_steps": 5, "loss": 0.5, "updated_at_seconds": 1.7e9}
    run.write_heartbeat(beat)
    return root


def assert_refused(ended: Ended, *parts: str) -> None:
    """Exit code 2 and one line that says why."""
    assert ended.code == 2
    assert ended.output == ""
    (line,) = ended.error.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_bad_recipes_are_refused(convmae: Convmae, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("epochs = ")

    assert_refused(convmae("inspect", "tinny"), "recipe", "'tinny'", "did you mean tiny?")
    assert_refused(convmae("pretrain", "tinny"), "did you mean tiny?")
    assert_refused(convmae("submit", "tiny", "epoch=3"), "epoch", "did you mean epochs?")
    assert_refused(convmae("submit", "tiny", "epochs=many"), "epochs", "integer", "'many'")
    assert_refused(convmae("inspect", "tiny", "model.depth=3"), "model.depth", "3 positive whole numbers")
    assert_refused(convmae("inspect", "tiny", "lanes=7"), "lanes", "global_batch_size = 64", "lanes=8")
    assert_refused(convmae("inspect", "tiny", "epochs"), "must be field=value")
    assert_refused(convmae("inspect", str(tmp_path / "bad.toml")), "must be a readable TOML file")


def test_bad_data_is_refused(convmae: Convmae, root: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    roots = f"run_root={root}"

    assert_refused(convmae("pretrain", "tiny", roots), "data", "convmae shard")
    assert_refused(convmae("pretrain", "tiny", roots, f"data={tmp_path}/empty"), "must hold a manifest.json")
    assert_refused(convmae("inspect", "tiny", f"data={tmp_path}/empty"), "must hold a manifest.json")
    assert_refused(convmae("inspect", f"{tmp_path}/empty"), "must hold a manifest.json")
    assert_refused(convmae("inspect", "tiny", "data=s4://bucket/data"), "'s4://bucket/data'", "did you mean s3://?")
    small = ("global_batch_size=2048", "lanes=8")
    assert_refused(convmae("pretrain", "tiny", roots, f"data={data}", *small), "samples", "2048", "1025")
    out = str(tmp_path / "out")
    assert_refused(convmae("shard", str(tmp_path / "empty"), out), "source", "missing or empty")
    assert_refused(convmae("shard", str(tmp_path / "texts"), out), "source", "a.txt")
    assert_refused(convmae("shard", str(tmp_path / "nowhere"), out), "source", "check the path")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_numbers_that_make_no_order_are_refused(convmae: Convmae, data: str) -> None:
    order = ("order", data, "--batch", "24", "--lanes", "6")

    assert_refused(convmae("order", data, "--batch", "24", "--lanes", "7"), "lanes", "must divide", "24")
    assert_refused(convmae("order", data, "--batch", "24"), "--lanes")
    assert_refused(convmae(*order, "--world", "7"), "world_size", "between 1 and lanes 6")
    assert_refused(convmae(*order, "--world", "2", "--rank", "2"), "rank", "0 to 1")
    assert_refused(convmae(*order, "--step", "-1"), "step")
    assert_refused(convmae(*order, "--steps", "none"), "--steps", "valid integer")
    assert_refused(convmae(*order, "--turbo"), "--turbo")
    assert_refused(convmae("order", data, "--batch", "2048", "--lanes", "8"), "samples", "1025")
    assert_refused(convmae("order", f"{data}/nowhere", "--batch", "24", "--lanes", "6"), "must hold a manifest.json")
    assert_refused(convmae(*order), "shard index", "a.index", "missing")
    assert_refused(convmae("inspect", data, "epochs=3"), "'epochs=3'", "--batch")
    assert_refused(convmae("inspect", data, "--lanes", "7"), "lanes", "7")
    assert_refused(convmae("inspect", data, "--batch", "0"), "global_batch_size", "at least 1")
    assert_refused(convmae("inspect", "tiny", "--lanes", "8"), "'--lanes'", "lanes=64")


def test_an_unreachable_object_store_is_told_in_seconds(convmae: Convmae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NOWHERE}")

    assert_refused(convmae("inspect", "tiny", "data=s3://bucket/data"), "must be reachable", "AWS_ENDPOINT_URL")


def test_without_stack_a_place_for_runs_is_asked_for(convmae: Convmae, data: str) -> None:
    assert_refused(convmae("pretrain", "tiny", f"data={data}"), "run_root", "convmae up")
    assert_refused(convmae("list"), "run_root", "convmae up")
    assert_refused(convmae("status", "first"), "run_root", "convmae up")


@pytest.mark.parametrize("command", ["pretrain", "submit"])
def test_without_cluster_no_run_begins(
    convmae: Convmae, root: str, data: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    arguments = (command, "tiny", f"data={data}", f"run_root={root}", "--run", "second")

    assert_refused(convmae(*arguments), "RAY_ADDRESS", "convmae up")
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    assert_refused(convmae(*arguments), "RAY_ADDRESS", "must answer", f"'{NOWHERE}'")

    assert [run.name for run in map(Path, Storage().list_files(root)) if run.parts[0] != "first"] == []


def test_a_port_in_use_is_refused(convmae: Convmae, root: str, data: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = convmae("pretrain", "tiny", f"data={data}", f"run_root={root}", f"metrics_port={port}")

    assert_refused(ended, "metrics_port", str(port), "0 for any free one")


def test_a_run_of_another_recipe_is_refused(
    convmae: Convmae, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "connect", lambda self: None)

    ended = convmae("pretrain", "tiny", f"data={data}", f"run_root={root}", "seed=1", "--run", "first")

    assert_refused(ended, "'first'", "seed: 0 -> 1", "--run")


def test_an_unknown_run_is_answered_with_the_nearest(convmae: Convmae, root: str) -> None:
    for command in ("status", "history", "logs", "stop", "consolidate", "report"):
        assert_refused(convmae(command, "frist", "--run-root", root), "'" + root + "/frist'", "did you mean first?")
    assert_refused(convmae("status", f"file://{root}/frist"), "did you mean first?")
    assert_refused(convmae("status", "No Name", "--run-root", root), "lower-case")


def test_what_does_not_fit_the_run_is_refused(convmae: Convmae, root: str) -> None:
    assert_refused(convmae("stop", "first", "--run-root", root), "first (finished)", "nothing to stop")
    assert_refused(convmae("consolidate", "first", "--run-root", root), "committed checkpoint", "first")
    assert_refused(convmae("consolidate", "first", "--step", "3", "--run-root", root), "step", "none yet")
    assert_refused(convmae("consolidate", "first", "--dtype", "fp8", "--run-root", root), "--dtype", "'fp8'")
    assert_refused(convmae("consolidate", "first", "--shard-bytes", "some"), "--shard-bytes", "256MB")
    several = ("--shard-bytes", "1GB", "--out", "a.safetensors")
    assert_refused(convmae("consolidate", "first", *several), "--out", "must be a folder")


def commit(run: RunDirectory, step: int, folder: Path, milestone: bool = False) -> Path:
    """Save a checkpoint of one file; returns where that is."""
    folder.mkdir(exist_ok=True)
    (folder / "weights.pt").write_bytes(b"weights of %d" % step)
    files = tuple(checkpoint.upload_files(run, step, folder, checkpoint.owner_name(1, 1)))
    checkpoint.write_commit(run, Commit(
        step=step, epoch=step // 2, world_size=3, zero_stage=2, precision="fp32", recipe_digest="", dataset_digest="",
        order_version=1, seed=0, attempt=1, created_at_seconds=1.7e9, milestone=milestone, counters={}, versions={},
        files=files, claim=1, driver="somebody",
    ))  # fmt: skip
    return Path(checkpoint.file_url(run, step, files[0].name))


def test_checkpoints_are_listed_and_every_fault_is_named(convmae: Convmae, root: str, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    paths = [commit(run, step, tmp_path / "local", milestone=step == 2) for step in (2, 4, 6, 8)]
    arguments = ("checkpoints", "first", "--run-root", root)

    ended = convmae(*arguments)
    assert (ended.code, ended.error) == (0, "")
    table = [line.split() for line in ended.output.splitlines()[2:]]
    assert table[0] == ["2", "1", "2023-11-14", "22:13:20", "3", "2", "12", "B", "milestone", "-"]
    assert [(row[0], row[-2], row[-1]) for row in table[1:]] == [(step, "last", "-") for step in "468"]
    assert [row["verified"] for row in json.loads(convmae(*arguments, "--verify", "--json").output)] == [True] * 4

    paths[0].write_bytes(b"weights of 3")
    paths[1].unlink()
    paths[2].write_bytes(b"weights")
    Path(checkpoint.commit_url(run, 8)).write_text("{")
    ended = convmae(*arguments, "--verify")
    rows = json.loads(convmae(*arguments, "--verify", "--json").output)

    assert ended.code == 1
    assert ended.error.splitlines()[-1] == "failed: 4 faults in 4 checkpoints"
    assert [row["verified"] for row in rows] == [False] * 4
    told = ["CRC32C is not that of the commit", "is missing", "has 7 bytes where 12 were written", "a JSON object"]
    for row, path, what in zip(rows, [*paths[:3], checkpoint.commit_url(run, 8)], told, strict=True):
        (fault,) = row["faults"]
        assert str(path) in fault and what in fault and fault in ended.output
    assert convmae(*arguments).code == 1, "an unreadable commit object is seen without --verify"


def test_prune_shows_what_would_go_and_needs_yes(convmae: Convmae, root: str, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    for step in (2, 4, 6, 8):
        commit(run, step, tmp_path / "local")
    arguments = ("prune", "first", "--keep", "1", "--run-root", root)

    ended = convmae(*arguments)
    assert ended.code == 0
    assert [line.split(":")[0] for line in ended.output.splitlines()[:4]] == ["step 2", "step 4", "step 6", "stays"]
    assert "nothing was deleted; --yes deletes 36 B" in ended.output
    assert checkpoint.committed_steps(run) == [2, 4, 6, 8]

    assert "deleted 36 B" in convmae(*arguments, "--yes").output
    assert checkpoint.committed_steps(run) == [8]
    assert convmae(*arguments).output.startswith("nothing to delete")
    assert_refused(convmae("prune", "first", "--keep", "0", "--run-root", root), "--keep")
    assert_refused(convmae("prune", "frist", "--run-root", root), "did you mean first?")


def test_export_and_import_take_weights_out_and_in(convmae: Convmae, root: str, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    config = run.read_recipe().model
    weights = Path(run.path("consolidated", "step-00000005.safetensors"))
    weights.parent.mkdir()
    metadata = {"run": "first", "step": "5", "epoch": "1", "model": json.dumps(dataclasses.asdict(config))}
    save_file(ConvMAE(config).state_dict(), weights, metadata=metadata)
    place = ("--run-root", root)

    ended = convmae("export", "first", "--format", "official", *place)
    official = f"{run.url}/exports/first-step-00000005-official.pth"
    assert ended.output.startswith(f"official: {official} (")
    assert_refused(convmae("export", "first", "--format", "official", *place), "--out", "must not exist yet", "--force")
    out = str(tmp_path / "from-a-file")
    assert convmae("export", str(weights), "--format", "hf", "--out", out).code == 0
    assert (tmp_path / "from-a-file" / "config.json").exists()

    ended = convmae("import", official, str(tmp_path / "start.safetensors"), "--recipe", "tiny")
    assert (ended.code, ended.error) == (0, "")
    assert hashlib.sha256((tmp_path / "start.safetensors").read_bytes()).hexdigest() in ended.output
    assert hashlib.sha256(Path(official).read_bytes()).hexdigest() in ended.output
    assert f"init_from={tmp_path}/start.safetensors" in ended.output
    refused = convmae(
        "import", official, str(tmp_path / "other.safetensors"), "--recipe", "tiny", "model.kernel_size=7"
    )
    assert_refused(refused, "encoder.blocks1.0.attn.weight has shape")

    assert_refused(convmae("export", "frist", "--format", "hf", *place), "did you mean first?")
    assert_refused(convmae("export", "first", "--format", "pdf", *place), "official, backbone, hf, onnx")
    assert_refused(convmae("export", "first", "--step", "9", "--format", "hf", *place), "step", "none yet")
    assert_refused(
        convmae("export", str(weights), "--step", "5", "--format", "hf"), "--step", "not be given with a file"
    )
    assert_refused(convmae("export", f"{tmp_path}/no.safetensors", "--format", "hf"), "must exist")
    assert_refused(convmae("import", f"{tmp_path}/no.pth", f"{tmp_path}/o.safetensors"), "must exist")
    assert_refused(convmae("import", official, f"{tmp_path}/o.pth"), "OUT", "must end in .safetensors")


def test_strict_refuses_damaged_checkpoints_when_it_resumes(
    convmae: Convmae, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(workflow, "train_here", lambda session, plan: asked.append(plan.recipe.on_damaged_checkpoint))
    monkeypatch.setattr(
        workflow, "train_as_job", lambda session, plan, follow, as_json: asked.append(plan.recipe.on_damaged_checkpoint)
    )
    for command in ("pretrain", "submit"):
        for strict in ([], ["--strict"]):
            assert convmae(command, "tiny", f"data={data}", f"run_root={root}", *strict).code == 0

    assert asked == ["previous", "fail"] * 2


def test_resume_takes_the_runs_own_recipe_and_changes_only_where_it_executes(
    convmae: Convmae, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(workflow, "train_as_job", lambda session, plan, follow, as_json: asked.append((plan, follow)))
    run = RunDirectory.of(Storage(), root, "second")
    recipe = named_recipe("tiny").amended({"data": data, "epochs": 7, "run_root": root})
    run.claim(recipe)
    place = ("--run-root", root)

    assert convmae("resume", "second", "max_workers=4", "--follow", *place).code == 0
    assert_refused(
        convmae("resume", "second", "epochs=9", *place), "has another recipe under this name (epochs: 7 -> 9)"
    )
    assert_refused(convmae("resume", "secnod", *place), "did you mean second?")

    ((plan, follow),) = asked
    assert (plan.run.url, plan.recipe, follow) == (run.url, recipe.amended({"max_workers": 4}), True)


def test_a_failed_run_is_one_line_and_exit_code_1(
    convmae: Convmae, root: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: object, plan: object) -> None:
        raise RunFailedError("rank 1: ValueError: boom")

    monkeypatch.setattr(workflow, "train_here", fail)

    ended = convmae("pretrain", "tiny", f"data={data}", f"run_root={root}")

    assert (ended.code, ended.error) == (1, "failed: rank 1: ValueError: boom\n")


def test_inspect_shows_a_data_set(convmae: Convmae, data: str) -> None:
    ended = convmae("inspect", data)

    assert ended.code == 0
    assert MANIFEST.digest in ended.output
    assert "1,025" in ended.output


def test_order_prints_one_json_object_a_line_for_each_step_and_rank(convmae: Convmae, indexed_data: str) -> None:
    arguments = ("--batch", "12", "--lanes", "6", "--block", "8", "--window", "2", "--seed", "5", "--step", "7")
    order = Order(100, 12, 6, 5, 8, 2)

    whole = convmae("order", indexed_data, *arguments, "--steps", "3", "--json")
    shared = convmae("order", indexed_data, *arguments, "--steps", "3", "--world", "4", "--json")
    alone = convmae("order", indexed_data, *arguments, "--world", "4", "--rank", "2")

    assert whole.code == shared.code == alone.code == 0
    rows = [json.loads(line) for line in whole.output.splitlines()]
    expected = [[f"{'ab'[sample // 50]}{sample % 50}" for sample in order.batch(step)] for step in (7, 8, 9)]
    assert [row["keys"] for row in rows] == expected
    assert [(row["step"], row["rank"], row["epoch"]) for row in rows] == [
        (step, 0, order.epoch(step)) for step in (7, 8, 9)
    ]
    parts = [json.loads(line) for line in shared.output.splitlines()]
    assert [(row["step"], row["rank"]) for row in parts] == [(step, rank) for step in (7, 8, 9) for rank in range(4)]
    assert [key for row in parts for key in row["keys"]] == [key for keys in expected for key in keys]
    assert alone.output.split()[-len(parts[2]["keys"]) :] == parts[2]["keys"]


def test_inspect_plans_the_reading_of_a_data_set(convmae: Convmae, indexed_data: str) -> None:
    options = ("--batch", "12", "--lanes", "6", "--block", "8", "--window", "2", "--world", "3", "--labels")

    text = convmae("inspect", indexed_data, *options)
    numbers = json.loads(convmae("inspect", indexed_data, *options, "--json").output)

    assert text.code == 0
    assert numbers["samples"] == 100 and numbers["plan"]["world_size"] == 3
    assert numbers["plan"]["steps_per_epoch"] == Order(100, 12, 6, 0, 8, 2).steps_per_epoch
    assert f"{numbers['plan']['design_effect']:.2f} over shards" in text.output
    assert f"{numbers['plan']['label_design_effect']:.2f} over labels" in text.output
    assert f"{numbers['plan']['gets_per_epoch']} (whole blocks)" in text.output


def test_inspect_shows_what_overrides_make_of_a_recipe(convmae: Convmae, data: str) -> None:
    ended = convmae("inspect", "tiny", f"data={data}", "epochs=3", "model.mask_ratio=0.5")

    lines = [line.split() for line in ended.output.splitlines()]
    assert all(line in lines for line in (["epochs", "3"], ["model.mask_ratio", "0.5"], ["data", data]))


def test_list_shows_every_run(convmae: Convmae, root: str, tmp_path: Path) -> None:
    (row,) = json.loads(convmae("list", "--run-root", root, "--json").output)
    assert (row["run"], row["state"], row["step"], row["loss"]) == ("first", "finished", 5, 0.5)

    table = convmae("list", "--run-root", root).output
    assert all(word in table for word in ("first", "finished", "5/5", "0.5000"))

    assert "0 runs under" in convmae("list", "--run-root", str(tmp_path / "none")).output
    assert json.loads(convmae("list", "--run-root", str(tmp_path / "none"), "--json").output) == []


def test_status_shows_a_run_and_its_events(convmae: Convmae, root: str) -> None:
    status = json.loads(convmae("status", "first", "--run-root", root, "--json").output)
    assert (status["state"], status["step"], status["committed_steps"]) == ("finished", 5, [])
    assert [event["kind"] for event in status["events"]] == ["start", "finished"]

    text = convmae("status", f"file://{root}/first").output
    assert "5 of 5 (100.0%)" in text
    assert text.splitlines()[-1].endswith("attempt 1  finished: step 5")


def test_history_is_one_line_a_step(convmae: Convmae, root: str) -> None:
    rows = [json.loads(line) for line in convmae("history", "first", "--run-root", root, "--json").output.splitlines()]
    assert rows == RunDirectory.of(Storage(), root, "first").read_history()

    lines = convmae("history", "first", "--run-root", root).output.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [
        "step",
        "1",
        "epoch",
        "0",
        "loss",
        "0.500000",
        "lr",
        "1.000e-03",
        "world",
        "2",
        "attempt",
        "1",
    ]


@pytest.mark.parametrize("arguments", [["history"], ["nonsense"], ["list", "--nonsense"], ["shard", "a"]])
def test_misuse_exits_2(convmae: Convmae, arguments: list[str]) -> None:
    ended = convmae(*arguments)

    assert ended.code == 2
    assert "Traceback" not in ended.error


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parent.parent)}
    command = [sys.executable, "-m", "jobs.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_inspect_prints_the_papers_plan() -> None:
    ended = in_a_process("inspect", "convmae_base")

    fields = {line[:30].strip(): line[30:].strip() for line in ended.stdout.splitlines()}
    assert (ended.returncode, ended.stderr) == (0, "")
    assert fields["steps per epoch"] == "312"
    assert fields["total steps"] == f"{312 * 1600:,}"
    assert {"parameters", "FLOPs per image", "bytes per epoch"} <= {field for field, value in fields.items() if value}


def test_bad_input_ends_a_process_with_one_line() -> None:
    ended = in_a_process("pretrain", "tiny", "epoch=3")

    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "did you mean epochs?")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("shard", "PHOTOS", "OUT", "--shard-bytes", "many"), "--shard-bytes: must be a number of bytes"),
        (("shard", "PHOTOS", "OUT", "--shard-bytes", "1MB", "--samples-per-shard", "5"), "give one of the two"),
        (("shard", "PHOTOS", "OUT", "--quality", "0"), "quality: must be from 1 to 100"),
        (("shard", "PHOTOS/{0..3}.tar", "OUT"), "PHOTOS/0.tar"),
        (("index", "PHOTOS"), "must be a tar, a folder of tars or a pattern of them"),
        (("verify", "PHOTOS"), "must hold a manifest.json"),
        (("shard", "PHOTOS", "PHOTOS"), "destination: must not lie in the source's folder"),
        (("shard", "PHOTOS/", "PHOTOS/b/../out"), "destination: must not lie in the source's folder"),
        (("shard", "PHOTOS", "memory://out"), "URL: must be one that every process sees"),
        (("shard", "PHOTOS", "http://127.0.0.1:1/out"), "URL: must be one that can be written"),
        (("shard", "PHOTOS", ""), "URL: must not be empty"),
        (("shard", "", "OUT"), "URL: must not be empty"),
    ],
)
def test_bad_arguments_of_data_set_commands_are_refused_before_anything_starts(
    convmae: Convmae, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"1")
    places = {"PHOTOS": str(tmp_path / "photos"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        arguments = tuple(argument.replace(name, place) for argument in arguments)
        told = told.replace(name, place)

    ended = convmae(*arguments)

    assert ended.code == 2
    assert told in ended.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_finds_a_damaged_manifest(convmae: Convmae, tmp_path: Path, as_json: bool) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version":')

    ended = convmae("verify", str(tmp_path), *(["--json"] if as_json else []))

    assert ended.code == 1
    assert "has a damaged manifest" in ended.error
    if as_json:
        (fault,) = json.loads(ended.output)["faults"]
        assert (fault["shard"], fault["key"], fault["offset"]) == ("manifest.json", None, None)
    else:
        assert "manifest.json: must be readable" in ended.output


def test_a_folder_that_is_gone_is_told_before_anything_is_looked_up_in_it(
    convmae: Convmae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    ended = convmae("list")

    assert ended.code == 2
    assert ended.error.startswith("error: current folder: must exist") and ended.error.count("\n") == 1
