"""The commit object: what makes a checkpoint exist, and says where everything in it lies. Reads and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, SkipValidation, Strict, TypeAdapter, ValidationError, with_config

from jobs.checkpoint.deepspeed_internals import MOMENTS
from jobs.errors import CheckpointError, DamagedCheckpointError
from jobs.run.rows import LARGEST, Text, Time, fault_rule

CHUNK_BYTES = 1 << 18
"""Each chunk has its own checksum, so that a byte range can be checked without the rest of its file: little is read
beyond what is needed, and a gigabyte of checkpoint takes 32 KB of the commit object."""
OTHERS = "`convmae checkpoints` shows which others are whole"
"""What to do about one that is damaged."""
TRAINED_DTYPE = "F32"
"""Of everything that is trained, and of its moments."""
FORMAT_VERSION = 4
DEEPSPEED_FORMATS = (1, 2, 3)
"""Formats of commits whose files are DeepSpeed's own (jobs.checkpoint.deepspeed_files)."""


Count = Annotated[int, Strict(), Field(ge=0, lt=LARGEST)]
Total = Annotated[float, Strict(), Field(ge=0, lt=LARGEST)]


Range = tuple[Count, Count, Count]
"""Number of a tensor in `Commit.tensors`, the first of some of its elements, and the one after the last."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class StateTensor:
    """One tensor of the model's state dict."""

    name: Text
    shape: tuple[Count, ...]
    dtype: Text
    """As in safetensors; `F32` of all that are trained."""
    same_as: Text = ""
    """Name of the tensor of which this is a second name, in whose place it has no values of its own."""

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(map(int, self.shape))


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class CheckpointFile:
    """One uploaded file."""

    name: SkipValidation[str]
    """Path below the folder of its step: `<claim>-<attempt>/<file>`."""
    bytes: Count
    crc32c: Count
    chunk_bytes: Count = 0
    """Length of the chunks, each with its own CRC32C; the last may be shorter. 0: there are none."""
    chunk_crc32cs: Text = ""
    """The CRC32C of each chunk in order, eight hexadecimal digits each."""
    data_offset: Count = 0
    """Of the first value in the file."""
    trained: tuple[Range, ...] = ()
    """Values that are trained: their weights lie there one after the other, then each of their moments likewise."""
    fixed: tuple[Range, ...] = ()
    """Frozen parameters and buffers, one after the other, after these."""

    def __post_init__(self) -> None:
        # Files are read and deleted by this path, so it must not lead out of the checkpoint.
        if not isinstance(self.name, str) or "\0" in self.name or {"", ".", ".."} & {*self.name.split("/")}:
            raise ValueError(f"{self.name!r} is no path below the folder of a step")
        if self.chunk_bytes and len(self.chunk_checksums()) != -(-self.bytes // self.chunk_bytes):
            raise ValueError(f"{self.name} lacks a checksum for each {self.chunk_bytes} of its {self.bytes} bytes")

    def chunk_checksums(self) -> list[int]:
        """The CRC32C of each chunk."""
        words = self.chunk_crc32cs
        return [int(words[at : at + 8], 16) for at in range(0, len(words), 8)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Commit:
    """The commit object: it makes a checkpoint exist, and has all that is needed to resume from it."""

    step: Count
    """Optimizer steps done, which is also the index of the next one."""
    epoch: Count
    """Epochs finished."""
    world_size: Count
    zero_stage: Count
    precision: Text
    recipe_digest: Text
    dataset_digest: Text
    order_version: Count
    """Version of the rules that deal samples to steps; with digest, seed and step it is the state of the data."""
    seed: Annotated[int, Strict()]
    attempt: Count
    created_at_seconds: Time
    milestone: Annotated[bool, Strict()]
    """Kept permanently."""
    counters: Mapping[str, Total]
    """Run-level metrics that continue to count after a restart."""
    versions: Mapping[str, Text]
    files: tuple[CheckpointFile, ...]
    claim: Count = 0
    """Number of the claim under which its driver worked; higher than that of every earlier driver. 0: unknown."""
    driver: Text = ""
    """Which driver that was, for people."""
    digest: Text = ""
    """Digest of all weights and moments, the same at any world size; empty if they depend on it."""
    tensors: tuple[StateTensor, ...] = ()
    """The model's state dict, trained tensors first. Empty where files are DeepSpeed's own."""
    optimizer_step: Total = 0.0
    """AdamW's step count, for its bias correction."""
    format_version: Count = FORMAT_VERSION

    @property
    def is_of_deepspeed(self) -> bool:
        """Whether its files are DeepSpeed's own, so that they must be looked into to know where a value lies."""
        return self.format_version in DEEPSPEED_FORMATS

    @property
    def bytes(self) -> int:
        """Size of the checkpoint."""
        return sum(file.bytes for file in self.files)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Commit:
        """Read a commit object, also one of an older format.

        Raises:
            CheckpointError: It was written in a format that is not known.
            DamagedCheckpointError: A field is missing, unknown or of another type; names it.
        """
        version = fields.get("format_version")
        if version not in (*DEEPSPEED_FORMATS, FORMAT_VERSION):
            known = f"{', '.join(map(str, DEEPSPEED_FORMATS))} or {FORMAT_VERSION}"
            remedy = "use the version of convmae-pretrain that wrote it"
            raise CheckpointError("format_version", f"must be {known}", version, remedy)
        try:
            return _COMMIT.validate_python(dict(fields))
        except ValidationError as error:
            rule, remedy = f"must have the fields of format {version} ({fault_rule(error)})", OTHERS
            raise DamagedCheckpointError("commit", rule, f"step {fields.get('step')}", remedy) from None


_COMMIT = TypeAdapter(Commit)
"""Validates commits that are read, not those that are built here."""


def stretch_bytes(ranges: Sequence[Range], element_bytes: Sequence[int]) -> int:
    """Bytes of ranges that lie one after the other.

    Args:
        ranges: Of tensors.
        element_bytes: Of each tensor.
    """
    return sum((stop - start) * element_bytes[tensor] for tensor, start, stop in ranges)


def data_bytes(file: CheckpointFile, element_bytes: Sequence[int]) -> int:
    """Bytes of all values in a file."""
    trained, fixed = (stretch_bytes(ranges, element_bytes) for ranges in (file.trained, file.fixed))
    return trained * (1 + len(MOMENTS)) + fixed
