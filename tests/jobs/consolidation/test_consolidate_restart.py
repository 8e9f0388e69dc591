"""Consolidations that are interrupted, and repeated calls that resume them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counting_storage import CountingStorage
from local_s3 import local_s3
from made_up_run import PART_BYTES, STEP, assert_bit_equal, flip, left_behind, made, make_run, tensors_of
from testbed import is_consolidated
from zero_material import commit_state, random_material

from jobs.consolidation.copy_tasks import Done, HashFile, Task
from jobs.consolidation.target import ConsolidatedWeights, Target, consolidated_url
from jobs.consolidation.writer import ConsolidationProgress
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store import parted_journal, parted_write
from pipeline.store.storage import Storage


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path, 2, 2)


def test_whole_files_of_an_interrupted_call_are_kept_and_others_remade(run: RunDirectory) -> None:
    target = Target(shard_bytes=12_000)
    first = made(run, target)
    Path(first.url, "model.safetensors.index.json").unlink()
    urls = [Path(file.url) for file in first.files]
    urls[1].unlink()
    flip(lambda path: 5000)(urls[2])
    Path(f"{urls[3]}.sha256").unlink()
    times = [path.stat().st_mtime_ns if path.exists() else 0 for path in urls]

    seen: list[ConsolidationProgress] = []
    again = made(run, target, on_progress=lambda _, now: seen.append(now))

    assert again.files == first.files
    assert again.kept == len(urls) - 3
    changed = [path.stat().st_mtime_ns != before for path, before in zip(urls, times, strict=True)]
    assert [number for number, is_new in enumerate(changed) if is_new] == [1, 2, 3]
    assert seen[-1].done == seen[-1].total > seen[-1].kept > 0


def test_a_fault_leaves_finished_files_and_nothing_that_looks_complete(run: RunDirectory) -> None:
    target = Target(shard_bytes=12_000)

    def dies_half_way(work: Any, storage: Storage, url: str, tasks: Iterator[Task], **_: Any) -> Iterator[Done]:
        for number, task in enumerate(tasks):
            if number == 9:
                raise OSError("the store is away")
            yield work(storage, url, task)

    with pytest.raises(OSError, match="away"):
        made(run, target, fan_out=dies_half_way)

    names = {name.rpartition("/")[2] for name in left_behind(run)}
    assert "model.safetensors.index.json" not in names
    assert not [name for name in names if name.endswith(".parts")]
    assert made(run, target).kept > 0


def test_a_call_resumes_after_a_kill_in_the_middle(run: RunDirectory) -> None:
    program = (
        "import sys, time\n"
        "from jobs.consolidation import consolidate\n"
        "from jobs.consolidation.target import Target\n"
        "from jobs.run.directory import RunDirectory\n"
        "from pipeline.store.storage import Storage\n"
        "def slowly(stage, now):\n"
        "    print(now.done, flush=True)\n"
        "    time.sleep(0.02)\n"
        f"target = Target(shard_bytes=12_000)\n"
        f"run = RunDirectory(Storage(), {run.url!r})\n"
        f"consolidate.consolidate(run, target=target, part_bytes={PART_BYTES}, on_progress=slowly)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        next(line for line in process.stdout if int(line) >= 11)
        process.kill()
    target = Target(shard_bytes=12_000)
    assert not any(run.storage.exists(mark) for mark in target.marks(target.url(run, STEP)))

    began = time.monotonic()
    result = made(run, target)

    assert result.kept > 0
    assert time.monotonic() - began < 10  # the dead one's claim is taken over at once on its own machine
    assert_bit_equal(tensors_of(result), tensors_of(made(run)))
    assert not [name for name in left_behind(run) if name.endswith(".parts") or ".claims" in name]


HALF_WAY = """
import json, os, sys, time
from jobs.consolidation.consolidate import consolidate
from jobs.run.directory import RunDirectory
from pipeline.store import parted_journal
from pipeline.store.storage import Storage
parted_journal.SAVE_SECONDS = 0.0
run = RunDirectory(Storage.from_json(json.loads(os.environ["STORAGE"])), sys.argv[1])

def stop(stage, now):
    if now.done >= int(sys.argv[3]):
        time.sleep(600)

consolidate(run, part_bytes=int(sys.argv[2]), on_progress=stop)
"""


def cut_off(run: RunDirectory, part_bytes: int, written_parts: int) -> list[dict[str, Any]]:
    """Consolidate in another process, kill that when its journal has so many parts, and return them."""
    environment = {**os.environ, "STORAGE": json.dumps(run.storage.to_json())}
    command = [sys.executable, "-c", HALF_WAY, run.url, str(part_bytes), str(written_parts)]
    process = subprocess.Popen(command, env=environment)
    noted: list[dict[str, Any]] = []
    while len(noted) < written_parts:
        assert process.poll() is None
        time.sleep(0.02)
        if run.storage.exists(journal_url(run)):
            noted = json.loads(run.storage.read(journal_url(run)))["parts"]
    process.kill()
    process.wait()
    assert not run.storage.exists(consolidated_url(run, STEP))
    return list(json.loads(run.storage.read(journal_url(run)))["parts"])


def journal_url(run: RunDirectory) -> str:
    return run.path("consolidated", f".step-{STEP:08d}.safetensors.parts.json")


class Traffic:
    """What goes over the wire of a consolidation, and of which parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[int] = []
        write_part = parted_write.write_part

        def count(storage: Storage, target: Any, number: int, offset: int, data: bytes) -> Any:
            self.sent.append(number)
            return write_part(storage, target, number, offset, data)

        monkeypatch.setattr(parted_write, "write_part", count)

    def of(self, run: RunDirectory, **options: Any) -> tuple[ConsolidatedWeights, list[int], int]:
        """A consolidation, the numbers of the parts that it sent, and the bytes that it read."""
        self.sent.clear()
        CountingStorage.read_bytes = 0
        counted = RunDirectory(CountingStorage.from_json(run.storage.to_json()), run.url)
        return made(counted, **options), sorted(self.sent), CountingStorage.read_bytes


def test_a_single_file_on_s3_is_resumed_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(monkeypatch)
    part_bytes = 5 << 20
    (tmp_path / "s3").mkdir()
    with local_s3(tmp_path / "s3") as server:
        run = RunDirectory.of(server.storage, f"{server.url}/runs", "killed")
        material = random_material(5_000_000, tensor_elements=1 << 20)
        commit_state(run, named_recipe("tiny"), material, step=STEP, stage=1, world_size=2)
        out = Target(out=f"{server.url}/whole/model.safetensors")
        whole, sent_at_first, read_at_first = traffic.of(run, target=out, part_bytes=part_bytes)
        kept = {part["number"] for part in cut_off(run, part_bytes, 2)}

        result, sent, read = traffic.of(run, part_bytes=part_bytes)

        assert sent_at_first == [1, 2, 3, 4]
        assert sent == sorted(set(sent_at_first) - kept)
        content = run.storage.read(whole.url)
        kept_bytes = sum(len(content[(number - 1) * part_bytes : number * part_bytes]) for number in kept)
        assert result.kept_bytes == kept_bytes
        assert read <= read_at_first - 0.9 * kept_bytes, "what a chunk of another part holds is read again"
        assert run.storage.read(result.url) == content
        assert result.files[0].sha256 == whole.files[0].sha256
        names = run.storage.list_names(run.path("consolidated"))
        assert {name for name in names if ".claims" not in name} == {
            "step-00000007.safetensors",
            "step-00000007.safetensors.sha256",
        }
        assert open_uploads(run.storage, server.url) == []

        for name in ("", ".sha256"):
            run.storage.delete(f"{result.url}{name}")
        cut_off(run, part_bytes, 1)
        assert len(open_uploads(run.storage, server.url)) == 1
        _, sent, _ = traffic.of(run, part_bytes=6 << 20)
        assert sent == [1, 2, 3, 4], "other parts: none of the old ones fits"
        assert open_uploads(run.storage, server.url) == []


def open_uploads(storage: Storage, url: str) -> list[str]:
    def listed(filesystem: Any, path: str) -> list[str]:
        answer = filesystem.call_s3("list_multipart_uploads", Bucket=filesystem.split_path(path)[0])
        return [upload["Key"] for upload in answer.get("Uploads") or ()]

    return storage.attempt(url, listed)


def test_a_single_local_file_is_resumed_after_a_kill(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(monkeypatch)
    whole, sent_at_first, _ = traffic.of(run, target=Target(out=f"{run.url}/whole.safetensors"))
    kept = cut_off(run, PART_BYTES, 4)
    (hidden,) = Path(run.path("consolidated")).glob(".*.parts")
    lost = kept[1]["number"]
    flip(lambda _: int(kept[1]["offset"]) + 100)(hidden)

    result, sent, _ = traffic.of(run)

    assert sent == sorted({*sent_at_first} - {part["number"] for part in kept} | {lost})
    assert result.files[0].sha256 == whole.files[0].sha256
    assert left_behind(run) == ["step-00000007.safetensors", "step-00000007.safetensors.sha256"]


def test_a_file_that_was_not_read_back_is_not_made_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parted_journal, "SAVE_SECONDS", 0.0)
    traffic = Traffic(monkeypatch)

    def dies_before_reading_back(
        work: Any, storage: Storage, url: str, tasks: Iterator[Task], **_: Any
    ) -> Iterator[Done]:
        for task in tasks:
            if isinstance(task, HashFile):
                raise OSError("the store is away")
            yield work(storage, url, task)

    with pytest.raises(OSError, match="away"):
        made(run, fan_out=dies_before_reading_back)
    assert not is_consolidated(run, STEP)

    result, sent, _ = traffic.of(run)

    assert sent == []
    assert result.files[0].sha256 == hashlib.sha256(Path(result.url).read_bytes()).hexdigest()
    assert left_behind(run) == ["step-00000007.safetensors", "step-00000007.safetensors.sha256"]


def test_parts_of_a_checkpoint_that_was_made_again_are_not_kept(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(run, PART_BYTES, 3)
    other = random_material(9000, seed=1, tensor_elements=2500)
    commit_state(run, named_recipe("tiny"), other, step=STEP, stage=2, world_size=2)

    result = made(run)

    assert result.kept_bytes == 0
    assert_bit_equal(tensors_of(result), tensors_of(made(run, Target(out=f"{tmp_path}/fresh.safetensors"))))
    assert_bit_equal({"weight.0": tensors_of(result)["weight.0"]}, {"weight.0": other.groups[0]["weight.0"]})
