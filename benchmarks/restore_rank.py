"""One rank of a group that restores checkpoints on gloo, and says what it took.

Reads one JSON case a line from standard input: {run, storage, groups, stage}. `groups` has the shapes of the
parameters of each group. Answers each with a line `done: {...}`: seconds, CPU seconds, requests and bytes of this rank,
and CRC-32s of the weights and of the moments that it got.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from counting_storage import CountingStorage
from torch import Tensor

from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.restore import restore_newest
from jobs.checkpoint.zero_state import owned_ranges
from jobs.run.directory import RunDirectory

Shapes = Mapping[str, tuple[int, ...]]


def owned_of(groups: Iterable[Shapes], stage: int, rank: int, world_size: int) -> dict[str, range]:
    """The parts of a model of these parameters that a rank owns."""
    tensors = [{name: torch.empty(shape, device="meta") for name, shape in group.items()} for group in groups]
    model: Any = SimpleNamespace(named_parameters=lambda: [pair for group in tensors for pair in group.items()])
    params = [{"params": list(group.values())} for group in tensors]
    return owned_ranges(model, params, stage=stage, rank=rank, world_size=world_size)


def crc_of(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """CRC-32 of the bytes of named tensors."""
    found = 0
    for _, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), found)
    return found


def answer(case: dict[str, Any], group: RankGroup) -> dict[str, Any]:
    """Restore once."""
    run = RunDirectory(CountingStorage.from_json(case["storage"]), case["run"])
    owned = owned_of(case["groups"], case["stage"], group.rank, group.world_size)
    CountingStorage.forget()
    group.total(0)  # all begin together
    began, cpu = time.perf_counter(), time.process_time()
    found = restore_newest(run, owned, group, check=lambda _: None, on_damage=lambda *_: None)
    assert found
    state = found.state
    group.total(0)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    moments = [(f"{moment} {name}", value) for moment, all_ in state.moments.items() for name, value in all_.items()]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "requests": CountingStorage.requests,
        "read_bytes": CountingStorage.read_bytes,
        "weights": crc_of(state.weights.items()),
        "moments": crc_of(moments),
    }


def main() -> None:
    """Answer cases until there are no more."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEETING_POINT"], rank=rank, world_size=world_size)
    for line in sys.stdin:
        sys.stdout.write(f"done: {json.dumps(answer(json.loads(line), RankGroup(rank, world_size)))}\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
