"""A checkpoint of a thousand ranks that was never written: where everything would lie, and what each rank would read.

Places and sizes are made up as DeepSpeed lays them out; the rules are those of zero_layout and zero_state, which are
run on them rank by rank.
"""

from __future__ import annotations

import itertools
import math
import pickle
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from restore_rank import Shapes, owned_of

from jobs.checkpoint.checked_files import CheckedFiles
from jobs.checkpoint.checkpoint import CHUNK_BYTES, CheckpointFile, Commit, file_url
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.torch_archive import ByteRange, Record, TensorPlace
from jobs.checkpoint.zero_files import FilesFound, ModelFile, OptimizerFile
from jobs.checkpoint.zero_layout import ZeroFiles
from jobs.checkpoint.zero_reading import WholeTensors, rooms_of_moments
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

_ALIGNED = 64
_HEAD_BYTES, _TAIL_BYTES = 4096, 20_000
"""Before the first record (pickle), and behind the last (directory)."""
SHOWN_RANKS = 8
"""Whose plans are made; the others' are like theirs."""


@dataclass(frozen=True)
class Restoring:
    """The work of all ranks together."""

    requests: float
    read_bytes: float
    checkpoint_bytes: int
    sent_bytes: int
    """Bytes sent to each rank: commit and places."""
    plan_seconds: float
    """CPU, of each rank."""


def _vectors(groups: list[Shapes], stage: int, rank: int, world_size: int) -> list[int]:
    """Elements of each group's vector of a rank."""
    if stage == 3:
        return [sum(math.ceil(math.prod(shape) / world_size) for shape in group.values()) for group in groups]
    totals = [sum(math.prod(shape) for shape in group.values()) for group in groups]
    shares = [math.ceil(total / (2 * world_size)) * 2 for total in totals]
    return [min(share, max(0, total - rank * share)) for total, share in zip(totals, shares, strict=True)]


def made_up(groups: list[Shapes], stage: int, world_size: int) -> tuple[CheckedFiles, FilesFound]:
    """Files of a checkpoint, and what a look into them would find."""
    run = RunDirectory(Storage(), "/nowhere/runs/made-up")
    sizes: dict[str, int] = {}
    found: dict[str, Any] = {}
    for rank in range(world_size):
        name = f"000001-0001/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        url, offset, vectors = run.path("checkpoints", "step-00000010", name), _HEAD_BYTES, []
        for number, elements in enumerate(_vectors(groups, stage, rank, world_size) * 3):
            record = Record(url, f"archive/data/{number}", offset, 4 * elements)
            vectors.append(TensorPlace(record, "F32", (elements,), 0))
            offset = -(-(offset + 4 * elements) // _ALIGNED) * _ALIGNED + _ALIGNED
        count = len(groups)
        moments = {moment: tuple(vectors[count * at : count * (at + 1)]) for at, moment in enumerate(MOMENTS, 1)}
        is_first = {"ranks": world_size, "step": 1.0} if rank == 0 else {}
        found[name] = OptimizerFile(stage == 3, tuple(vectors[:count]), moments, **is_first)
        sizes[name] = offset + _TAIL_BYTES
        if stage == 3 or rank == 0:
            name = f"000001-0001/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            found[name] = ModelFile({}, tuple(groups)) if rank == 0 else ModelFile({})
            module = 0 if stage == 3 else 4 * sum(math.prod(shape) for group in groups for shape in group.values())
            sizes[name] = _HEAD_BYTES + module + _TAIL_BYTES
    commit = Commit(
        step=10, epoch=0, world_size=world_size, zero_stage=stage, precision="fp32", recipe_digest="",
        dataset_digest="", order_version=1, seed=0, attempt=1, created_at_seconds=0.0, milestone=False, counters={},
        versions={}, files=tuple(_file(name, size) for name, size in sizes.items()),
    )  # fmt: skip
    return CheckedFiles(run, commit), found


def _file(name: str, size: int) -> CheckpointFile:
    return CheckpointFile(name, size, 0, CHUNK_BYTES, "0" * 8 * -(-size // CHUNK_BYTES))


def restoring(groups: list[Shapes], stage: int, before: int, now: int) -> Restoring:
    """The cost of restoring, where `before` ranks wrote and `now` ranks read."""
    files, found = made_up(groups, stage, before)
    url_sizes = {file_url(files.run, files.commit.step, file.name): file.bytes for file in files.commit.files}
    ends = [ByteRange(url, at, 1) for url, size in url_sizes.items() for at in (0, size - 1)]
    optimizers = [file for file in found.values() if isinstance(file, OptimizerFile)]
    places = [place for file in optimizers for place in (*file.masters, *itertools.chain(*file.moments.values()))]
    # A look reads the chunk of every vector's header.
    headers = (ByteRange(place.record.url, place.record.offset - 1, 1) for place in places)
    looks = files.holding([*ends, *headers])
    needed = files.holding([*ends, *(place.byte_range for place in places)])
    left = np.setdiff1d(files.holding(ByteRange(url, 0, size) for url, size in url_sizes.items()), needed)
    requests = len(looks) + sum(sum(1 for _ in files.requests(part)) for part in np.array_split(left, now)) + 2
    read_chunks = float(len(looks) + len(left))
    sent = pickle.dumps(files.commit), pickle.dumps(dict(found))
    ranks = sorted({round(at * (now - 1) / (SHOWN_RANKS - 1)) for at in range(SHOWN_RANKS)})
    seconds = 0.0
    for rank in ranks:
        began = time.process_time()
        layout = ZeroFiles(files.run, files.commit, found)
        owned = owned_of(groups, stage, rank, now)
        weights = WholeTensors(layout.weights(), files, RankGroup(rank, now)).mine()
        _, copies = rooms_of_moments(layout.moments(), owned, "made-up")
        chunks = files.holding(copy.source for copy in [*weights, *copies])
        mine = list(files.requests(chunks))
        seconds += time.process_time() - began
        requests += len(mine) * now / len(ranks)
        read_chunks += len(chunks) * now / len(ranks)
    return Restoring(requests, read_chunks * CHUNK_BYTES, files.commit.bytes, sum(map(len, sent)), seconds / len(ranks))
