"""Two drivers of one run, as processes, on a real S3 server: one commits, the other is refused by name."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from patience import wait_until
from testbed import Command, small_recipe

from jobs.checkpoint import checkpoint
from jobs.checkpoint.check import faults_of
from jobs.stack.record import Stack

STEPS = 8
DRIVERS = 3
COMMITTER = """
import os, sys, time
from pathlib import Path
from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.errors import OvertakenError
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

url, claim, local, steps = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
run = RunDirectory(Storage.from_environment(os.environ), url)
print("ready", flush=True)
begin = float(sys.stdin.readline())
for step in range(1, steps + 1):
    content, owner, files = b"%d of driver %d" % (step, claim) * 1000, checkpoint.owner_name(claim, 1), []
    for name in ("a", "b"):
        (local / name).write_bytes(content)
        places = CheckpointFile(name, 0, 0)
        files.append(checkpoint.upload(run, step, local / name, places, content=memoryview(content), owner=owner))
    time.sleep(max(0.0, begin + 0.4 * step - time.time()))
    try:
        checkpoint.write_commit(run, Commit(
            step=step, epoch=0, world_size=1, zero_stage=1, precision="fp32", recipe_digest="", dataset_digest="",
            order_version=1, seed=0, attempt=1, created_at_seconds=0.0, milestone=False, counters={}, versions={},
            files=tuple(files), claim=claim, driver=f"driver-{claim}"))
        print("committed", step, flush=True)
    except OvertakenError as error:
        print("refused", step, error, flush=True)
"""
HOLDER = """
import os, sys, time
from pipeline.store.lease import hold_lease
from pipeline.errors import LeaseHeldError
from pipeline.store.storage import Storage

storage = Storage.from_environment(os.environ)
try:
    with hold_lease(storage, sys.argv[1], "drives", on_wait=str, keeps_number=True, dead_seconds=10) as claim:
        print("holds", claim.number, flush=True)
        while True:
            time.sleep(0.2)
            claim.check()
except LeaseHeldError as error:
    print("refused", error, flush=True)
"""


def script(convmae: Command, text: str, *arguments: str) -> subprocess.Popen[str]:
    environment = convmae.environment(**convmae.stack.environment())
    command = [sys.executable, "-c", text, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_of_drivers_that_commit_the_same_step_the_newest_claim_wins_whole(convmae: Command, tmp_path: Path) -> None:
    run = convmae.run("raced")
    committers = []
    for claim in range(1, DRIVERS + 1):
        (local := tmp_path / f"local-{claim}").mkdir()
        committers.append(script(convmae, COMMITTER, run.url, str(claim), str(local), str(STEPS)))
    assert [first_line(process) for process in committers] == ["ready\n"] * DRIVERS
    begin = f"{time.time() + 0.2}\n"
    with ThreadPoolExecutor(DRIVERS) as threads:
        ends = threads.map(lambda process: process.communicate(begin, timeout=120), committers)
        told = [out.splitlines() for out, _ in ends]

    assert [process.returncode for process in committers] == [0] * DRIVERS
    assert checkpoint.committed_steps(run) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        commit = checkpoint.read_commit(run, step)
        assert commit.claim == DRIVERS
        assert faults_of(run, commit) == []
        expected = b"%d of driver %d" % (step, DRIVERS) * 1000
        assert {run.storage.read(checkpoint.file_url(run, step, file.name)) for file in commit.files} == {expected}
    assert told[-1] == [f"committed {step}" for step in range(1, STEPS + 1)]
    refused = [line for lines in told[:-1] for line in lines if line.startswith("refused")]
    assert refused, "they did not race"
    assert all("committed at this step by driver-" in line for line in refused)


@pytest.mark.slow
def test_one_that_is_stopped_loses_its_lease_and_finds_out(convmae: Command) -> None:
    """Alive, but silent: as one on another machine that cannot reach the store."""
    folder = convmae.run("leased").path("claims")
    first = script(convmae, HOLDER, folder)
    assert first_line(first) == "holds 1\n"
    second = script(convmae, HOLDER, folder)
    refusal = first_line(second)
    assert "refused" in refusal and f"process {first.pid}, drives" in refusal and "the lease is" in refusal
    first.send_signal(signal.SIGSTOP)
    third = script(convmae, HOLDER, folder)
    assert first_line(third) == "holds 2\n"
    first.send_signal(signal.SIGCONT)
    lost = first_line(first)
    assert "was taken over by" in lost and f"process {third.pid}" in lost
    third.kill()
    for process in (first, second, third):
        process.communicate(timeout=30)


@pytest.mark.slow
def test_two_pretrain_commands_of_one_run_at_once_train_it_once(
    convmae: Command, data: str, local_stack: Stack
) -> None:
    arguments = ("pretrain", *small_recipe(data, epochs=6, checkpoint_every_steps=10), "--run", "twice")
    both = [convmae.start(*arguments) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]

    winner, loser = sorted(range(2), key=lambda index: both[index].returncode)
    assert (both[winner].returncode, both[loser].returncode) == (0, 2), ends
    (line,) = [line for line in ends[loser][1].splitlines() if line.startswith("error: ")]
    assert f"process {both[winner].pid}, drives the run" in line and "the lease is" in line
    run = convmae.run("twice")
    wait_until("the end", lambda: run.read_heartbeat().get("state") == "finished", 10)
    assert [row["step"] for row in run.read_history()] == list(range(1, 49))
    assert {checkpoint.read_commit(run, step).claim for step in checkpoint.committed_steps(run)} == {1}
