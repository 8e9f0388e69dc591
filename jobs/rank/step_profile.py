"""A profile of some steps of one rank, asked for while it trains: operators by torch, and a flame graph by py-spy.

Nothing of it exists outside these steps, but for a process that makes the files, and a thread that brings them to the
store.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity
from torch.profiler.profiler import _KinetoProfile

from jobs.rank.profile_process import OperatorTimes, made_files
from jobs.run.directory import RunDirectory
from jobs.run.profile_request import ProfileRequest
from pipeline.host.scratch import scratch_folder

logger = logging.getLogger(__name__)

TRACE_NAME, OPERATORS_NAME, FLAME_NAME = "trace.json.gz", "operators.txt", "flame.svg"
RAW_NAME = "trace.json"
OPERATORS = 100
"""Lines of the table."""
SAMPLES_PER_SECOND = 100
FLAME_SECONDS = 30.0
"""For py-spy to write what it has seen."""
CLOSE_SECONDS = 120.0
"""For which the end of a run waits for its last profile."""

Done = Callable[[int, str, Sequence[str], str], None]
"""Is given the last step, the folder's URL, the names of files, and what is missing."""
Failed = Callable[[str], None]
"""Is given the reason."""


class StepProfile:
    """The profile of a rank, from the end of one step to the end of a later one.

    Owns: torch's profiler and py-spy's process until `finish`; then a thread, until all files are in the store.
    Concurrency: called by the training thread, whose operators torch records. Failure: reported, never raised.
    Blocking: `finish` while torch writes the trace, some 3 us an operator; `close` until all is in the store, or for
        `CLOSE_SECONDS`.
    """

    def __init__(self, request: ProfileRequest, run: RunDirectory, device: torch.device) -> None:
        """Begin to record.

        Args:
            request: What is asked for.
            run: Of the rank; the result goes there.
            device: Where it trains.
        """
        self.request, self._run, self._is_on_gpu = request, run, device.type == "cuda"
        self._steps_left = request.steps
        self._folder = scratch_folder()
        gpu = [ProfilerActivity.CUDA] if self._is_on_gpu else []
        # What `torch.profiler.profile` adds is a schedule, and a cycle that keeps all of it until a collection.
        self._profile: _KinetoProfile | None = _KinetoProfile(
            activities=[ProfilerActivity.CPU, *gpu], experimental_config=_ExperimentalConfig(trace_only=True)
        )
        self._profile.start()
        self._flames = FlameGraph(Path(self._folder.name, FLAME_NAME))
        self._thread: threading.Thread | None = None

    @property
    def is_recording(self) -> bool:
        """Whether `finish` is yet to come."""
        return self._profile is not None

    def stepped(self) -> bool:
        """Note one more step; whether it was the last one."""
        self._steps_left -= 1
        return self._steps_left == 0

    def finish(self, step: int, done: Done, failed: Failed) -> None:
        """Record no more, and have the files made and brought to the store, beside the steps that follow.

        What torch holds is written here, since its writer lets no other thread of Python run.

        Args:
            step: The last one that was recorded.
            done: Called once all is in the store.
            failed: Called in its place.
        """
        assert self._profile
        self._flames.stop()
        fault: Exception | None = None
        try:
            self._profile.stop()
            self._profile.export_chrome_trace(str(Path(self._folder.name, RAW_NAME)))
        except Exception as error:
            fault = error
        self._profile = None  # and with it what was recorded
        self._thread = threading.Thread(
            target=self._write, args=(fault, step, done, failed), name="convmae-profile", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread, but not without end: what makes the files has only the CPU time that others leave."""
        if self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _write(self, fault: Exception | None, step: int, done: Done, failed: Failed) -> None:
        try:
            with self._folder as name:
                note = self._flames.missing()
                if fault:
                    raise fault
                times = made_files(Path(name, RAW_NAME), Path(name, TRACE_NAME))
                Path(name, OPERATORS_NAME).write_text(operator_table(times, self._is_on_gpu), "utf-8")
                names = [TRACE_NAME, OPERATORS_NAME, *([] if note else [FLAME_NAME])]
                url = self._run.path("profiles", f"step-{step:08d}-rank-{self.request.rank:04d}")
                for each in names:
                    self._run.storage.write(self._run.storage.join(url, each), Path(name, each).read_bytes())
        except Exception as error:
            logger.warning("the profile could not be written", exc_info=True)
            failed(f"{type(error).__name__}: {error}")
            return
        done(step, url, names, note)


def operator_table(times: Sequence[OperatorTimes], is_on_gpu: bool) -> str:
    """The operators that take most time by themselves, as torch prints them.

    Args:
        times: Of each.
        is_on_gpu: Whether what counts is the time of the GPU.
    """
    averages = EventList([_average(each, is_on_gpu) for each in times])  # type: ignore[no-untyped-call]
    order = "self_cuda_time_total" if is_on_gpu else "self_cpu_time_total"
    table: str = averages.table(sort_by=order, row_limit=OPERATORS)  # type: ignore[no-untyped-call]
    return table + "\n"


def _average(times: OperatorTimes, is_on_gpu: bool) -> FunctionEventAvg:
    average = FunctionEventAvg()
    vars(average).update(
        key=times.name,
        count=times.calls,
        node_id=-1,
        is_async=times.is_collective,
        is_user_annotation=times.is_annotation,
        device_type=DeviceType.CUDA if times.is_on_gpu else DeviceType.CPU,
        use_device="cuda" if is_on_gpu else None,
        self_cpu_time_total=times.self_cpu_ns / 1000,
        cpu_time_total=times.cpu_ns / 1000,
        self_device_time_total=times.self_gpu_ns / 1000,
        device_time_total=times.gpu_ns / 1000,
    )
    return average


class FlameGraph:
    """A picture of where this process spends its time in Python, where py-spy is installed and may look at it."""

    def __init__(self, path: Path) -> None:
        """Have py-spy look, if it is there.

        Args:
            path: To be written, as SVG.
        """
        self._path, self._process = path, None
        self._why_not = "py-spy is not installed on the rank's node"
        command = shutil.which("py-spy") or shutil.which("py-spy", path=sysconfig.get_path("scripts"))
        if command is None:
            return
        try:
            arguments = ["record", "--pid", str(os.getpid()), "--output", str(path), "--duration", "unlimited"]
            self._process = subprocess.Popen(
                [command, *arguments, "--rate", str(SAMPLES_PER_SECOND), "--nonblocking"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except OSError as error:
            self._why_not = str(error)

    def stop(self) -> None:
        """Have it write what it has seen; does not wait."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def missing(self) -> str:
        """Waits for the file; why there is none, empty where there is."""
        if self._process is None:
            return f"no {FLAME_NAME}: {self._why_not}"
        try:
            said = self._process.communicate(timeout=FLAME_SECONDS)[0].strip().splitlines()
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = self._process.communicate()[0].strip().splitlines() or ["py-spy did not end"]
        if self._path.is_file():
            return ""
        nothing = "py-spy saw nothing in so short a time; profile more steps"
        return f"no {FLAME_NAME}: {next((line for line in said if 'rror' in line), nothing)}"
