from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import in_a_namespace_of_its_own
import psutil
import pytest

from pipeline.host.process_identity import ProcessIdentity

TELLS = """
import json, sys
from dataclasses import asdict
from pipeline.host.process_identity import ProcessIdentity
print(json.dumps(asdict(ProcessIdentity.here())), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_lives_until_it_has_ended_even_if_it_is_not_waited_for(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(sleeper.pid)
    assert (identity.alive(), identity.has_ended()) == (True, False)
    assert identity.process() == psutil.Process(sleeper.pid)

    sleeper.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert (identity.alive(), identity.has_ended()) == (False, True)

    sleeper.wait()
    assert (identity.alive(), identity.has_ended()) == (False, True)


def test_the_start_is_that_of_the_kernel_to_the_tick(sleeper: subprocess.Popen[bytes]) -> None:
    began = ProcessIdentity.of(sleeper.pid).started / os.sysconf("SC_CLK_TCK")
    assert psutil.boot_time() + began == pytest.approx(psutil.Process(sleeper.pid).create_time(), abs=1.0)
    sleeper.kill()
    sleeper.wait()


def test_one_with_the_same_pid_that_began_at_another_time_has_taken_its_number() -> None:
    here = ProcessIdentity.here()
    earlier = replace(here, started=here.started - 1)

    assert here.alive() and not here.has_ended()
    assert earlier.has_ended() and not earlier.alive() and earlier.process() is None


@pytest.mark.parametrize("change", [{"boot": "another"}, {"namespace": "4:1"}, {"boot": ""}, {"started": -1}])
@pytest.mark.parametrize("pid", [os.getpid(), 4_194_399], ids=["ours", "above-the-largest-of-Linux"])
def test_of_another_boot_or_namespace_nothing_is_known(change: dict[str, object], pid: int) -> None:
    elsewhere = replace(ProcessIdentity.here(), pid=pid, **change)  # type: ignore[arg-type]

    assert not elsewhere.is_judged_here()
    assert (elsewhere.alive(), elsewhere.has_ended(), elsewhere.process()) == (False, False, None)


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    mine = ProcessIdentity.of(os.getpid(), tmp_path)

    assert mine == ProcessIdentity(os.getpid())
    assert not mine.has_ended() and not ProcessIdentity.here().has_ended(tmp_path)


@pytest.mark.skipif(not in_a_namespace_of_its_own.is_allowed(), reason="this machine makes no PID namespaces")
@pytest.mark.parametrize("unshare", [in_a_namespace_of_its_own.UNSHARE, in_a_namespace_of_its_own.SHOWS_THE_OUTER_PROC])
def test_a_process_of_another_pid_namespace_is_not_judged(unshare: tuple[str, ...]) -> None:
    with in_a_namespace_of_its_own.running(TELLS, unshare=unshare) as process:
        assert process.stdout
        there = ProcessIdentity.of_json(json.loads(process.stdout.readline()))
        assert there.pid == 1, "which here is another process"
        assert (there.alive(), there.has_ended()) == (False, False)


def test_an_identity_goes_through_json_and_what_is_missing_is_not_known() -> None:
    here = ProcessIdentity.here()

    assert ProcessIdentity.of_json(json.loads(json.dumps(asdict(here)))) == here
    assert ProcessIdentity.of_json({"pid": 7, "boot": 3, "started": "x", "host": "y"}) == ProcessIdentity(7)
    assert ProcessIdentity.of_json({"pid": True, "create_time": time.time()}) == ProcessIdentity(0)


def test_a_name_with_brackets_and_blanks_is_skipped(tmp_path: Path) -> None:
    script = tmp_path / "a) S 1 (b"
    script.write_text("#!/bin/sh\nread line\n")
    script.chmod(0o755)
    with subprocess.Popen([str(script)], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 10
        while "a) S 1 (b" not in Path(f"/proc/{process.pid}/stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ProcessIdentity.of(process.pid).alive()
        assert process.stdin
        process.stdin.close()
