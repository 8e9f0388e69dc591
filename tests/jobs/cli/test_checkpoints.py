"""Commands on checkpoints and weights, on a machine without stack and cluster."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from command_line import Typed, assert_refused
from safetensors.torch import save_file
from zero_material import upload_files

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.run.directory import RunDirectory
from model import ConvMAE
from pipeline.store.storage import Storage


def commit(run: RunDirectory, step: int, folder: Path, milestone: bool = False) -> Path:
    """Save a checkpoint of one file; returns the file's path."""
    folder.mkdir(exist_ok=True)
    (folder / "weights.pt").write_bytes(b"weights of %d" % step)
    files = tuple(upload_files(run, step, folder, checkpoint.owner_name(1, 1)))
    checkpoint.write_commit(run, Commit(
        step=step, epoch=step // 2, world_size=3, zero_stage=2, precision="fp32", recipe_digest="", dataset_digest="",
        order_version=1, seed=0, attempt=1, created_at_seconds=1.7e9, milestone=milestone, counters={}, versions={},
        files=files, claim=1, driver="somebody",
    ))  # fmt: skip
    return Path(checkpoint.file_url(run, step, files[0].name))


def test_checkpoints_are_listed_and_every_fault_is_named(typed: Typed, root: str, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    paths = [commit(run, step, tmp_path / "local", milestone=step == 2) for step in (2, 4, 6, 8)]
    arguments = ("checkpoints", "first", "--run-root", root)

    ended = typed(*arguments)
    assert (ended.code, ended.error) == (0, "")
    table = [line.split() for line in ended.output.splitlines()[2:]]
    assert table[0] == ["2", "1", "2023-11-14", "22:13:20", "3", "2", "12", "B", "milestone", "-"]
    assert [(row[0], row[-2], row[-1]) for row in table[1:]] == [(step, "last", "-") for step in "468"]
    assert [row["verified"] for row in json.loads(typed(*arguments, "--verify", "--json").output)] == [True] * 4

    paths[0].write_bytes(b"weights of 3")
    paths[1].unlink()
    paths[2].write_bytes(b"weights")
    Path(checkpoint.commit_url(run, 8)).write_text("{")
    ended = typed(*arguments, "--verify")
    rows = json.loads(typed(*arguments, "--verify", "--json").output)

    assert ended.code == 1
    assert ended.error.splitlines()[-1] == "failed: 4 faults in 4 checkpoints"
    assert [row["verified"] for row in rows] == [False] * 4
    told = ["CRC32C is not that of the commit", "is missing", "has 7 bytes where 12 were written", "a JSON object"]
    for row, path, what in zip(rows, [*paths[:3], checkpoint.commit_url(run, 8)], told, strict=True):
        (fault,) = row["faults"]
        assert str(path) in fault and what in fault and fault in ended.output
    assert typed(*arguments).code == 1, "an unreadable commit object is seen without --verify"


def test_prune_shows_what_it_would_delete_and_needs_yes(typed: Typed, root: str, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    for step in (2, 4, 6, 8):
        commit(run, step, tmp_path / "local")
    arguments = ("prune", "first", "--keep", "1", "--run-root", root)

    ended = typed(*arguments)
    assert ended.code == 0
    assert [line.split(":")[0] for line in ended.output.splitlines()[:4]] == ["step 2", "step 4", "step 6", "stays"]
    assert "nothing was deleted; --yes deletes 36 B" in ended.output
    assert checkpoint.committed_steps(run) == [2, 4, 6, 8]

    assert "deleted 36 B" in typed(*arguments, "--yes").output
    assert checkpoint.committed_steps(run) == [8]
    assert typed(*arguments).output.startswith("nothing to delete")
    assert_refused(typed("prune", "first", "--keep", "0", "--run-root", root), "--keep")
    assert_refused(typed("prune", "frist", "--run-root", root), "did you mean first?")


def test_weights_are_exported_and_imported(typed: Typed, root: str, tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), root, "first")
    config = run.read_recipe().model
    weights = Path(run.path("consolidated", "step-00000005.safetensors"))
    weights.parent.mkdir()
    metadata = {"run": "first", "step": "5", "epoch": "1", "model": json.dumps(dataclasses.asdict(config))}
    save_file(ConvMAE(config).state_dict(), weights, metadata=metadata)
    place = ("--run-root", root)

    ended = typed("export", "first", "--format", "official", *place)
    official = f"{run.url}/exports/first-step-00000005-official.pth"
    assert ended.output.startswith(f"official: {official} (")
    assert_refused(typed("export", "first", "--format", "official", *place), "--out", "must not exist yet", "--force")
    out = str(tmp_path / "from-a-file")
    assert typed("export", str(weights), "--format", "hf", "--out", out).code == 0
    assert (tmp_path / "from-a-file" / "config.json").exists()

    ended = typed("import", official, str(tmp_path / "start.safetensors"), "--recipe", "tiny")
    assert (ended.code, ended.error) == (0, "")
    assert hashlib.sha256((tmp_path / "start.safetensors").read_bytes()).hexdigest() in ended.output
    assert hashlib.sha256(Path(official).read_bytes()).hexdigest() in ended.output
    assert f"init_from={tmp_path}/start.safetensors" in ended.output
    refused = typed("import", official, str(tmp_path / "other.safetensors"), "--recipe", "tiny", "model.kernel_size=7")
    assert_refused(refused, "encoder.blocks1.0.attn.weight has shape")

    assert_refused(typed("export", "frist", "--format", "hf", *place), "did you mean first?")
    assert_refused(typed("export", "first", "--format", "pdf", *place), "official, backbone, hf, onnx")
    assert_refused(typed("export", "first", "--step", "9", "--format", "hf", *place), "step", "none yet")
    assert_refused(typed("export", str(weights), "--step", "5", "--format", "hf"), "--step", "not be given with a file")
    assert_refused(typed("export", f"{tmp_path}/no.safetensors", "--format", "hf"), "must exist")
    assert_refused(typed("import", f"{tmp_path}/no.pth", f"{tmp_path}/o.safetensors"), "must exist")
    assert_refused(typed("import", official, f"{tmp_path}/o.pth"), "OUT", "must end in .safetensors")


def test_what_a_run_recorded_is_exported_as_tables(typed: Typed, root: str, tmp_path: Path) -> None:
    place = ("--run-root", root)

    ended = typed("export", "first", "--format", "metrics", *place)
    assert (ended.code, ended.error) == (0, "")
    assert [line.split()[:2] for line in ended.output.splitlines()] == [
        ["metrics:", f"{root}/first/exports/first-metrics/{name}.parquet"]
        for name in ("accuracies", "events", "history")
    ]
    assert typed("export", "first", "--format", "metrics-csv", "--out", str(tmp_path / "out"), *place).code == 0
    assert (tmp_path / "out" / "history.csv").read_text().startswith('"step","epoch","attempt","superseded"')

    assert_refused(typed("export", "first", "--format", "metrics", *place), "--out: must not exist yet")
    assert_refused(typed("export", "first", "--format", "metrics", "--step", "3", *place), "--step", "leave it out")
    assert_refused(typed("export", "first", "--format", "metric", *place), "--format", "metrics-csv")
