"""The process that makes a profile's files, from traces as torch writes them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from small_models import batch, seeded, small
from torch.profiler import ProfilerActivity, profile, record_function
from zero_groups import PROJECT

from jobs.rank import profile_process
from jobs.rank.profile_process import OperatorTimes, made_files, operator_times
from jobs.rank.step_profile import OPERATORS, operator_table


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> profile:
    """Forward and backward, with an annotation, calls within calls of the same name, and a collective."""
    config = small()
    model = seeded(config)
    meeting_point = tmp_path_factory.mktemp("group") / "meeting-point"
    dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=0, world_size=1)
    with profile(activities=[ProfilerActivity.CPU]) as of_torch:
        for _ in range(2):
            with record_function("forward"):
                loss = model(*batch(config)).loss
            loss.backward()
            dist.all_reduce(torch.ones(8), async_op=True).wait()
    dist.destroy_process_group()
    return of_torch


def exported(of_torch: profile, folder: Path) -> Path:
    trace = folder / "trace.json"
    of_torch.export_chrome_trace(str(trace))
    return trace


def test_counts_and_times_are_those_of_torch(recorded: profile, tmp_path: Path) -> None:
    trace = exported(recorded, tmp_path)

    times = made_files(trace, tmp_path / "trace.json.gz")

    ours = {each.name: (each.calls, each.self_cpu_ns, each.cpu_ns) for each in times}
    averages = recorded.key_averages()
    assert ours == {
        each.key: (each.count, round(each.self_cpu_time_total * 1000), round(each.cpu_time_total * 1000))
        for each in averages
    }
    assert len(ours) == len(times) > 50 and ours["forward"][0] == 2
    calls, self_ns, whole_ns = ours["gloo:all_reduce"]
    assert calls == 2 and whole_ns > self_ns == 0
    of_torch = averages.table(sort_by="self_cpu_time_total", row_limit=OPERATORS)
    assert outline(operator_table(times, is_on_gpu=False)) == outline(of_torch)
    assert gzip.decompress((tmp_path / "trace.json.gz").read_bytes()) == trace.read_bytes()


def outline(table: str) -> list[tuple[str, str]]:
    """Names and calls, without times, which are rounded, and in no order, which is open where times are equal."""
    return sorted((line[:55], line.split()[-1]) for line in table.strip().splitlines()[:-1])


def entry(name: str, category: str, begin: str, length: str, operator: int, thread: int = 7) -> dict[str, object]:
    args = {"External id": operator}
    ts, dur = float(begin), float(length)
    return {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": ts, "dur": dur, "args": args}


def test_kernels_count_for_the_operator_that_launched_them_and_for_those_around_it() -> None:
    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            entry("aten::linear", "cpu_op", "1000.000", "150.500", 1),
            entry("aten::addmm", "cpu_op", "1010.000", "100.250", 2),
            entry("cudaLaunchKernel", "cuda_runtime", "1020.000", "10.125", 2, thread=99),
            entry("gemm", "kernel", "1200.000", "300.000", 2, thread=0),
            entry("gemm", "kernel", "1500.500", "20.000", 2, thread=0),
            entry("aten::addmm", "cpu_op", "2000.500", "30.000", 3),
            entry("nccl:all_reduce", "user_annotation", "2010.500", "90.000", 4),
            entry("nccl:all_reduce", "gpu_user_annotation", "2600.500", "40.000", 4, thread=1),
            entry("ncclKernel", "kernel", "2600.500", "40.000", 4, thread=1),
            entry("Memset", "gpu_memset", "2700.500", "5.000", 0, thread=1),
        ]
    }

    times = operator_times(StringIO(json.dumps(trace)))

    assert times == [
        OperatorTimes("aten::linear", False, False, False, 1, 50_250, 150_500, 0, 320_000),
        OperatorTimes("aten::addmm", False, False, False, 2, 120_125, 130_250, 320_000, 320_000),
        OperatorTimes("cudaLaunchKernel", False, False, False, 1, 10_125, 10_125, 0, 0),
        OperatorTimes("gemm", True, False, False, 2, 0, 0, 320_000, 320_000),
        OperatorTimes("nccl:all_reduce", False, True, True, 1, 0, 90_000, 0, 0),
        OperatorTimes("nccl:all_reduce", True, True, False, 1, 0, 0, 40_000, 40_000),
        OperatorTimes("ncclKernel", True, False, False, 1, 0, 0, 40_000, 40_000),
        OperatorTimes("Memset", True, False, False, 1, 0, 0, 5_000, 5_000),
    ]
    lines = operator_table(times, is_on_gpu=True).strip().splitlines()
    assert "Self CUDA" in lines[1] and "CUDA time avg" in lines[1]
    assert [line.split()[0] for line in lines[3:5]] == ["aten::addmm", "gemm"], "by the time on the GPU"
    assert "Self CUDA time total: 365.000us" in lines[-1], "kernels and what is not annotation"


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("kill -9 $$", "was killed by SIGKILL"),
        ("echo 'MemoryError: of it' >&2; exit 1", "failed: MemoryError: of it"),
        ("exit 3", "failed: exit code 3"),
    ],
)
def test_why_it_could_not_is_said(does: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = tmp_path / "python"
    ending.write_text(f"#!/bin/sh\n{does}\n")
    ending.chmod(0o755)
    monkeypatch.setattr(profile_process.sys, "executable", str(ending))

    with pytest.raises(RuntimeError) as caught:
        made_files(tmp_path / "trace.json", tmp_path / "trace.json.gz")

    assert str(caught.value) == f"the process that makes the files {reason}"


RANK = """
import sys, threading
from pathlib import Path
from jobs.rank.profile_process import made_files
thread = threading.Thread(target=made_files, args=[Path(name) for name in sys.argv[1:]])
thread.start()
thread.join()
"""


def test_it_has_little_priority_and_ends_with_its_rank(tmp_path: Path) -> None:
    endless = tmp_path / "trace.json"
    os.mkfifo(endless)
    environ = os.environ | {"PYTHONPATH": str(PROJECT)}
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(endless), str(tmp_path / "trace.json.gz")], env=environ)
    with endless.open("wb"):  # opens once the process does
        (process,) = psutil.Process(rank.pid).children()
        assert process.nice() == 19 and os.sched_getscheduler(process.pid) == os.SCHED_IDLE

        rank.send_signal(signal.SIGKILL)

        rank.wait()
        deadline = time.monotonic() + 60
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
