"""The process that makes a profile's files from the trace as torch writes it, so that the rank can train meanwhile.

Python's part of torch's profiler holds the interpreter's lock for 50 us an operator. This process works on the trace in
its place: it compresses it, and adds up the times of each operator as `torch.profiler.profile.key_averages` does. It
takes what CPU time nothing else wants, imports no torch, and ends with its rank.
"""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from jobs.run.own_code import module_command, module_environ
from pipeline.host.idle_cpu import take_idle_cpu

_PR_SET_PDEATHSIG = 1
_OPERATORS = ("cpu_op", "user_annotation")
"""Categories whose `External id` is their own; that of any other is the operator's which launched it."""
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
_COLLECTIVES = ("gloo:", "mpi:", "nccl:", "ucc:", "xccl:")
"""How torch.distributed calls its work, which begins in one thread and may end in another: no part of what is there."""
_LEFT_OUT = (
    "profiler::_record_function_enter",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
    "aten::is_leaf",
    "aten::output_nr",
    "aten::_version",
)
"""Of torch's table."""


@dataclass
class OperatorTimes:
    """All calls of an operator; of a kernel, those on the GPU."""

    name: str
    is_on_gpu: bool
    is_annotation: bool
    is_collective: bool
    calls: int = 0
    self_cpu_ns: int = 0
    cpu_ns: int = 0
    self_gpu_ns: int = 0
    gpu_ns: int = 0


def made_files(trace: Path, compressed: Path) -> list[OperatorTimes]:
    """Have a process make them, and wait for it.

    Args:
        trace: As torch has written it.
        compressed: To be written.

    Returns:
        What the trace has of each operator.

    Raises:
        RuntimeError: Why it could not.
    """
    command = module_command(sys.executable, __name__, str(trace), str(compressed), str(os.getpid()))
    process = subprocess.run(command, capture_output=True, check=False, text=True, env=module_environ(os.environ))
    if process.returncode < 0:
        raise RuntimeError(f"the process that makes the files was killed by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(f"the process that makes the files failed: {said[-1]}")
    return [OperatorTimes(**times) for times in json.loads(process.stdout)]


@dataclass(slots=True)
class _Entry:
    """Of the trace: a call of an operator, or what a GPU did."""

    name: str
    category: str
    thread: int
    begin_ns: int
    end_ns: int
    operator: int
    own_gpu_ns: int = 0
    gpu_ns: int = 0
    parts: list[_Entry] = field(default_factory=list)
    is_repeated: bool = False
    """Nothing but a call within one of the same name, which counts in its place."""

    @property
    def ns(self) -> int:
        return self.end_ns - self.begin_ns

    @property
    def is_on_gpu(self) -> bool:
        return self.category in _ON_GPU

    @property
    def is_annotation(self) -> bool:
        return self.category.endswith("user_annotation")

    @property
    def is_collective(self) -> bool:
        return self.category == "user_annotation" and self.name.startswith(_COLLECTIVES)


def operator_times(trace: TextIO) -> list[OperatorTimes]:
    """What a trace of torch has of each operator, as `key_averages` says of the profile that it is of.

    Args:
        trace: In JSON, as torch writes it without Python.
    """
    entries = sorted(_read(trace), key=lambda entry: (entry.begin_ns, -entry.end_ns))
    _add_gpu(entries)
    calls = [entry for entry in entries if not entry.is_on_gpu and not entry.is_collective]
    calls.sort(key=lambda entry: entry.thread)
    for _, of_thread in groupby(calls, key=lambda entry: entry.thread):
        _nest(of_thread)
    _join_repeated(calls)
    for call in reversed(calls):  # parts come after what they are parts of
        call.gpu_ns = call.own_gpu_ns + sum(part.gpu_ns for part in call.parts)
    return _added_up(entries)


def _read(trace: TextIO) -> list[_Entry]:
    entries: list[_Entry] = []

    def take(fields: dict[str, Any]) -> dict[str, Any] | None:
        """Keep an entry in a form that needs little memory, and nothing of it in the tree that `json` makes."""
        if "ph" not in fields:
            return fields
        if fields["ph"] == "X" and fields["cat"] != "Trace" and fields["name"] not in _LEFT_OUT:
            begin_ns = int(fields["ts"] * 1000)
            thread, operator = int(fields["tid"]), fields.get("args", {}).get("External id", 0)
            end_ns = begin_ns + int(fields["dur"] * 1000)
            entries.append(_Entry(sys.intern(fields["name"]), fields["cat"], thread, begin_ns, end_ns, operator))
        return None

    # As binary fractions the microseconds of three months would have lost their nanoseconds.
    json.load(trace, object_hook=take, parse_float=Decimal)
    return entries


def _add_gpu(entries: Iterable[_Entry]) -> None:
    """Give operators the time of the kernels that they launched, and calls of CUDA the thread of their operator."""
    operators = {entry.operator: entry for entry in entries if entry.category in _OPERATORS}
    for entry in entries:
        operator = None if entry.category in _OPERATORS else operators.get(entry.operator)
        if operator is None:
            continue
        if not entry.is_on_gpu:
            entry.thread = operator.thread
        elif not operator.is_collective:
            operator.own_gpu_ns += entry.ns


def _nest(calls: Iterable[_Entry]) -> None:
    """Find which calls of a thread are part of which, from the first to the last."""
    under_way: list[_Entry] = []
    for call in calls:
        while under_way and (call.begin_ns >= under_way[-1].end_ns or call.end_ns > under_way[-1].end_ns):
            under_way.pop()
        if under_way:
            under_way[-1].parts.append(call)
        under_way.append(call)


def _join_repeated(calls: Iterable[_Entry]) -> None:
    for call in calls:
        while not call.is_repeated and len(call.parts) == 1 and call.parts[0].name == call.name:
            (same,) = call.parts
            call.parts, call.own_gpu_ns, same.is_repeated = same.parts, same.own_gpu_ns, True


def _added_up(entries: Iterable[_Entry]) -> list[OperatorTimes]:
    found: dict[tuple[str, bool, bool], OperatorTimes] = {}
    for entry in entries:
        if entry.is_repeated:
            continue
        key = entry.name, entry.is_on_gpu, entry.is_annotation
        times = found.get(key)
        if times is None:
            times = found[key] = OperatorTimes(*key, entry.is_collective)
        times.calls += 1
        if entry.is_on_gpu:
            times.self_gpu_ns += entry.ns
            times.gpu_ns += entry.ns
            continue
        times.cpu_ns += entry.ns
        if not entry.is_collective:
            times.self_cpu_ns += entry.ns - sum(part.ns for part in entry.parts)
            times.self_gpu_ns += entry.own_gpu_ns
            times.gpu_ns += entry.gpu_ns
    return list(found.values())


def main() -> None:
    """Read the trace named by the first argument, write it compressed to the second one, and say what is in it."""
    trace, compressed, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    take_idle_cpu()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != rank:
        return
    with trace.open("rb") as plain, gzip.open(compressed, "wb", compresslevel=6) as packed:
        shutil.copyfileobj(plain, packed)
    with trace.open(encoding="utf-8") as text:
        times = operator_times(text)
    json.dump([asdict(each) for each in times], sys.stdout)


if __name__ == "__main__":
    main()
