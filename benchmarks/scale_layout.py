"""A checkpoint of a thousand ranks that was never written: where everything would lie, and what each rank would read.

Sizes follow from a model's shapes; places and reads are those of state_layout and state_reading, run on them rank by
rank.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
from restore_rank import Shapes, owned_of

from jobs.checkpoint.checked_files import CheckedFiles
from jobs.checkpoint.commit import CHUNK_BYTES, TRAINED_DTYPE, CheckpointFile, Commit, StateTensor, data_bytes
from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.checkpoint.rank_file import header_of
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.state_layout import StateLayout
from jobs.checkpoint.state_reading import WholeTensors, rooms_of_moments
from jobs.checkpoint.tensor_ranges import ByteRange
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

SHOWN_RANKS = 8
"""Whose plans are made; the others' are like theirs."""


@dataclass(frozen=True)
class Restoring:
    """The work of all ranks together."""

    requests: float
    read_bytes: float
    checkpoint_bytes: int
    commit_bytes: int
    """Of the commit object, which one rank reads."""
    sent_bytes: int
    """Of the same, as it is sent to each rank."""
    plan_seconds: float
    """CPU, of each rank."""


def made_up(groups: list[Shapes], stage: int, world_size: int) -> CheckedFiles:
    """Files of a checkpoint."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    tensors = tuple(StateTensor(name, shape, TRAINED_DTYPE) for name, shape in shapes.items())
    numbers = {name: number for number, name in enumerate(shapes)}
    files = []
    for rank in range(world_size):
        owned = owned_of(groups, stage, rank, world_size)
        trained = tuple((numbers[name], values.start, values.stop) for name, values in owned.items() if values)
        header = len(header_of(tensors, trained, ()))
        name = f"000001-0001/rank-{rank:05d}.safetensors"
        places = CheckpointFile(name, 0, 0, data_offset=header, trained=trained)
        size = header + data_bytes(places, [4] * len(tensors))
        checksums = "0" * 8 * math.ceil(size / CHUNK_BYTES)
        files.append(replace(places, bytes=size, chunk_bytes=CHUNK_BYTES, chunk_crc32cs=checksums))
    commit = Commit(
        step=10, epoch=0, world_size=world_size, zero_stage=stage, precision="fp32", recipe_digest="",
        dataset_digest="", order_version=1, seed=0, attempt=1, created_at_seconds=0.0, milestone=False, counters={},
        versions={}, files=tuple(files), tensors=tensors, optimizer_step=1.0,
    )  # fmt: skip
    return CheckedFiles(RunDirectory(Storage(), "/nowhere/runs/made-up"), commit)


def restoring(groups: list[Shapes], stage: int, before: int, now: int) -> Restoring:
    """The cost of restoring, where `before` ranks wrote and `now` ranks read."""
    files = made_up(groups, stage, before)
    layout = StateLayout(files.run, files.commit)
    tensors = [*layout.weights(), *(tensor for moment in MOMENTS for tensor in layout.moments()[moment].values())]
    needed = files.holding(place for tensor in tensors for place in tensor.byte_ranges(0, tensor.elements))
    left = np.setdiff1d(files.holding(_whole(files)), needed)
    requests = sum(sum(1 for _ in files.requests(part)) for part in np.array_split(left, now)) + 2.0
    read_chunks = float(len(left))
    ranks = sorted({round(at * (now - 1) / (SHOWN_RANKS - 1)) for at in range(SHOWN_RANKS)})
    seconds = 0.0
    for rank in ranks:
        owned = owned_of(groups, stage, rank, now)
        began = time.process_time()
        layout = StateLayout(files.run, files.commit)
        weights = WholeTensors(layout.weights(), files, RankGroup(rank, now)).mine()
        _, copies = rooms_of_moments(layout.moments(), owned, "made-up")
        chunks = files.holding(copy.source for copy in [*weights, *copies])
        mine = list(files.requests(chunks))
        seconds += time.process_time() - began
        requests += len(mine) * now / len(ranks)
        read_chunks += len(chunks) * now / len(ranks)
    stored, sent = len(json.dumps(asdict(files.commit))), len(pickle.dumps(files.commit))
    read = read_chunks * CHUNK_BYTES
    return Restoring(requests, read, files.commit.bytes, stored, sent, seconds / len(ranks))


def _whole(files: CheckedFiles) -> list[ByteRange]:
    url = files.run.path("checkpoints", "step-00000010")
    return [ByteRange(f"{url}/{file.name}", 0, file.bytes) for file in files.commit.files]
