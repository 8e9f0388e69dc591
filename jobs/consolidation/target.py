"""Target of a consolidation: type, size and place of the files; and the consolidated weights that it made."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.checkpoint import checkpoint
from jobs.consolidation.file_layout import DTYPES, FILE_NAME, INDEX_NAME
from jobs.errors import CheckpointError
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class WrittenFile:
    """One file of a consolidation."""

    url: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ConsolidatedWeights:
    """The consolidated weights of a step."""

    url: str
    """Of the file, or of the folder that holds several."""
    step: int
    files: tuple[WrittenFile, ...]
    kept: int = 0
    """Files that already existed and were whole."""
    kept_bytes: int = 0
    """Of the other files: bytes that an earlier call had written."""
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Target:
    """What a consolidation is to make, checked.

    Raises:
        CheckpointError: Options that do not fit together.
    """

    dtype: str = "fp32"
    """`fp32`, `bf16` or `fp16`, of floating-point tensors."""
    shard_bytes: int | None = None
    """No file is larger; None: one file."""
    out: str = ""
    """URL of a `.safetensors` file or of a folder; empty: the run directory."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CheckpointError("--dtype", "must be fp32, bf16 or fp16", self.dtype, "correct it")
        if self.shard_bytes is not None and self.out.endswith(".safetensors"):
            raise CheckpointError("--out", "must be a folder when --shard-bytes is given", self.out, "give a folder")

    def url(self, run: RunDirectory, step: int) -> str:
        """Of the one file, or of the folder of several."""
        if self.out:
            out = self.out
            is_file = self.shard_bytes is not None or out.endswith(".safetensors")
            return out if is_file else Storage.join(out, FILE_NAME)
        name = checkpoint.folder_name(step) + ("" if self.dtype == "fp32" else f"-{self.dtype}")
        return run.path("consolidated", name if self.shard_bytes is not None else f"{name}.safetensors")

    def marks(self, url: str) -> tuple[str, ...]:
        """Objects of which any exists if, and only if, all is finished."""
        if self.shard_bytes is None:
            return (f"{url}.sha256",)
        return (Storage.join(url, INDEX_NAME), Storage.join(url, f"{FILE_NAME}.sha256"))

    def is_finished(self, storage: Storage, url: str) -> bool:
        """Whether the files are finished; a checksum whose file was deleted does not count."""
        if self.shard_bytes is None and not storage.exists(url):
            return False
        return any(storage.exists(mark) for mark in self.marks(url))

    def found(self, storage: Storage, url: str, step: int) -> ConsolidatedWeights:
        """The finished files."""
        urls = [url]
        if self.shard_bytes is not None:
            names = [name for name in storage.list_names(url) if name.endswith(".safetensors")]
            urls = [Storage.join(url, name) for name in names]
        files = tuple(WrittenFile(file, storage.size(file), recorded_sha256(storage, file)) for file in urls)
        return ConsolidatedWeights(url, step, files, kept=len(files))


ONE_FILE = Target()
"""All weights in fp32 in one file of the run directory."""
SEVERAL_FILES = Target(shard_bytes=0)
"""The same as a folder of files of any size, which suffices to ask whether it exists."""


def consolidated_url(run: RunDirectory, step: int) -> str:
    """Where the consolidated fp32 weights of `step` are."""
    return ONE_FILE.url(run, step)


def recorded_sha256(storage: Storage, url: str) -> str:
    """The checksum in the `.sha256` beside a file; empty if there is none."""
    try:
        words = storage.read(f"{url}.sha256").decode(errors="replace").split()
    except FileNotFoundError:
        return ""
    return words[0] if words else ""
