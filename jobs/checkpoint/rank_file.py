"""One rank's part of the state as one safetensors file, copied off the device in one go.

Training stands still for the copy into this machine's memory alone; from there the file is uploaded as it is, past any
disk. Each trained tensor of which the rank owns values gives three flat ranges, `weight/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME`; what is not trained is `fixed/NAME`. The metadata say for each NAME its shape and the range.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs.checkpoint.commit import TRAINED_DTYPE, CheckpointFile, Range, StateTensor, data_bytes
from jobs.checkpoint.deepspeed_internals import (
    MOMENTS,
    adam_slots,
    frozen_values,
    owned_slices,
    trained_parameters,
    whole_shape,
)
from jobs.checkpoint.tensor_ranges import ITEM_BYTES
from jobs.checkpoint.zero_state import TORCH_DTYPES
from pipeline.host.memory_file import MemoryFile

if TYPE_CHECKING:
    import deepspeed

logger = logging.getLogger(__name__)

_ALIGNMENT = 8
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass
class CopyRoom:
    """Memory for one copy, and how many need what is in it."""

    path: Path
    """Of its file here."""
    content: memoryview
    """The same bytes."""
    file: MemoryFile | None = None
    """What the path is of, which exists as long as this does."""
    claims: int = 0


@dataclass(frozen=True)
class RankPart:
    """A rank's part of a checkpoint, ready to be uploaded or held.

    Concurrency: `claim` and `release` are the training thread's.
    """

    room: CopyRoom
    """Its memory, which later copies use again once nobody needs it."""
    places: CheckpointFile
    """Where values lie in it; the name is that of the file alone, and size and checksums are missing."""
    tensors: tuple[StateTensor, ...] = ()
    """The model's state dict; the same on every rank."""
    optimizer_step: float = 0.0

    @property
    def path(self) -> Path:
        """Of its file here."""
        return self.room.path

    @property
    def content(self) -> memoryview:
        """The bytes of the file."""
        return self.room.content

    def claim(self) -> None:
        """Need the bytes as they are."""
        self.room.claims += 1

    def release(self) -> None:
        """Need them no longer."""
        self.room.claims -= 1


class RankFile:
    """The file of one rank, with room for the values of one save after the other.

    Owns: memory for the whole file, page-locked where values come from a GPU, from the first save on; more than once
        where copies are needed at the same time: one that is uploaded, one that is held, one that is made.
    Concurrency: the training thread's.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, rank: int) -> None:
        """Lay it out; copies nothing.

        Args:
            engine: Whose state is saved.
            rank: Of this process.
        """
        self._engine, self._rank = engine, rank
        self._tensors = state_tensors(engine)
        numbers = {tensor.name: number for number, tensor in enumerate(self._tensors)}
        owned = (piece for _, pieces in owned_slices(engine) for piece in pieces)
        trained = tuple((numbers[piece.name], piece.start, piece.start + piece.length) for piece in owned)
        fixed = tuple((numbers[name], start, start + len(values)) for name, start, values in fixed_values(engine, rank))
        self._header = header_of(self._tensors, trained, fixed)
        self._places = CheckpointFile(
            f"rank-{rank:05d}.safetensors", 0, 0, data_offset=len(self._header), trained=trained, fixed=fixed
        )
        self._rooms: list[CopyRoom] = []

    @property
    def bytes(self) -> int:
        """Size of a copy."""
        return len(self._header) + data_bytes(self._places, self._item_bytes())

    def copied(self) -> RankPart:
        """Copy the values as they are now, and wait until all are here. No communication."""
        unused = next((room for room in self._rooms if not room.claims), None)
        chosen = unused or self._reserved()
        room = torch.frombuffer(chosen.content, dtype=torch.uint8)
        place = len(self._header)
        for values in self._values():
            count = values.numel() * values.element_size()
            # A GPU's copies run on its stream, one after the other; the host waits once, below.
            room[place : place + count].copy_(values.view(torch.uint8), non_blocking=True)
            place += count
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        assert place == len(room)
        return RankPart(chosen, self._places, self._tensors, self._optimizer_step())

    def _values(self) -> Iterator[Tensor]:
        """Flat, in the order of the file."""
        slices = owned_slices(self._engine)
        for kind in ("", *MOMENTS):
            for flat, pieces in slices:
                # AdamW has no moments before its first step.
                source = adam_slots(self._engine, flat).get(kind) if kind else flat.detach()
                for piece in pieces:
                    part = slice(piece.offset, piece.offset + piece.length)
                    yield flat.new_zeros(piece.length) if source is None else source[part]
        for _, _, values in fixed_values(self._engine, self._rank):
            yield values

    def _optimizer_step(self) -> float:
        steps = [adam_slots(self._engine, flat).get("step", 0.0) for flat, _ in owned_slices(self._engine)]
        return float(steps[0]) if steps else 0.0

    def _item_bytes(self) -> list[int]:
        return [ITEM_BYTES[tensor.dtype] for tensor in self._tensors]

    def _reserved(self) -> CopyRoom:
        file = MemoryFile("convmae-checkpoint", self.bytes)
        file.memory[: len(self._header)] = self._header
        if self._engine.device.type == "cuda":
            _lock_pages(file, self._engine.device)
        self._rooms.append(room := CopyRoom(file.path, memoryview(file.memory), file))
        return room


def _lock_pages(file: MemoryFile, device: torch.device) -> None:
    """Have a GPU copy straight into a file's memory, which it does not where pages may move."""
    place = torch.frombuffer(file.memory, dtype=torch.uint8).data_ptr()
    failed = int(torch.cuda.cudart().cudaHostRegister(place, file.size, 0))  # type: ignore[no-untyped-call]
    if failed:
        logger.warning("memory for checkpoints is not page-locked (CUDA error %d); copies take longer", failed)
        with contextlib.suppress(RuntimeError):  # the error would otherwise be that of the next kernel
            torch.zeros(1, device=device).add_(1)


def state_tensors(engine: deepspeed.DeepSpeedEngine) -> tuple[StateTensor, ...]:
    """The model's state dict, trained tensors first, in the order in which they lie in the optimizer's groups."""
    trained = trained_parameters(engine)
    found = {name: StateTensor(name, shape, TRAINED_DTYPE) for name, shape in trained.items()}
    first_names: dict[int, str] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            known = found[first]
            found[name] = StateTensor(name, known.shape, known.dtype, same_as=first)
        elif name not in found:
            found[name] = StateTensor(name, whole_shape(parameter), DTYPE_NAMES[parameter.dtype])
    for name, buffer in _buffers(engine):
        found[name] = StateTensor(name, tuple(buffer.shape), DTYPE_NAMES[buffer.dtype])
    return tuple(found.values())


def fixed_values(engine: deepspeed.DeepSpeedEngine, rank: int) -> Iterator[tuple[str, int, Tensor]]:
    """What is not trained and this rank writes: a tensor's name, the first element, and the values, flat."""
    trained = trained_parameters(engine)
    for name, parameter in engine.module.named_parameters():
        if name not in trained:
            start, values = frozen_values(parameter, rank)
            if len(values):
                yield name, start, values
    for name, buffer in _buffers(engine):
        if rank == 0 and buffer.numel():
            yield name, 0, buffer.detach().contiguous().reshape(-1)


def _buffers(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    saved = engine.module.state_dict().keys()
    return ((name, buffer) for name, buffer in engine.module.named_buffers() if name in saved)


def header_of(tensors: Sequence[StateTensor], trained: Sequence[Range], fixed: Sequence[Range]) -> bytes:
    """A safetensors file up to its first value; a multiple of eight bytes.

    Args:
        tensors: Of the state dict, which the ranges number.
        trained: Whose weights and moments are in the file.
        fixed: Frozen parameters and buffers in the file.
    """
    entries: dict[str, object] = {}
    place = 0
    kinds = [("weight", trained), *((moment, trained) for moment in MOMENTS), ("fixed", fixed)]
    for kind, ranges in kinds:
        for number, start, stop in ranges:
            tensor = tensors[number]
            end = place + (stop - start) * ITEM_BYTES[tensor.dtype]
            entries[f"{kind}/{tensor.name}"] = {
                "dtype": tensor.dtype, "shape": [stop - start], "data_offsets": [place, end],
            }  # fmt: skip
            place = end
    said = {
        tensors[number].name: json.dumps({"shape": tensors[number].shape, "range": [start, stop]})
        for number, start, stop in (*trained, *fixed)
    }
    text = json.dumps({"__metadata__": {"format": "pt", **said}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
