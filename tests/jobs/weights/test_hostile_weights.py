"""Malicious weights and checkpoints: each ends in one line, in bounded time and memory."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.checkpoint.checked_files import with_chunks
from jobs.checkpoint.checkpoint import file_url
from jobs.checkpoint.commit import CheckpointFile
from jobs.checkpoint.deepspeed_files import torch_archive
from jobs.checkpoint.deepspeed_files.torch_archive import LazyTensor, read_archive
from jobs.errors import DamagedCheckpointError, WeightsFileError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated, torch_file
from jobs.weights.initial import import_weights, pinned
from jobs.weights.weight_files import model_json
from model import ConvMAE, ConvMAEConfig
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

CONFIG = ConvMAEConfig()
STATE = ConvMAE(CONFIG).state_dict()
OFFICIAL = ConvMAE(CONFIG).official_state_dict()
NAME = "patch_embed1.proj.weight"
"""Of a tensor of four dimensions."""
WEIGHT = OFFICIAL[NAME]


def refused(path: Path) -> str:
    """The line with which an import is refused; Python prints nothing else."""
    with warnings.catch_warnings(record=True) as told, pytest.raises(WeightsFileError) as caught:
        import_weights(Storage(), str(path), f"{path}.out.safetensors", CONFIG)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 20_000
    assert "weights_only" not in line
    assert told == []
    assert not Path(f"{path}.out.safetensors").exists()
    return line


def saved(path: Path, found: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(found, path)
    return path


def packed(
    pickled: bytes, *, compression: int = zipfile.ZIP_STORED, more: tuple[tuple[str, bytes], ...] = ()
) -> bytearray:
    """An archive as torch.save makes it, of a pickle that it would not make."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), *more):
            archive.writestr(f"a/{name}", data)
    return bytearray(file.getvalue())


def patched(offset: int, value: int) -> bytearray:
    """An archive whose first record has another byte in its headers, counted in the directory's."""
    data = packed(b"\x80\x02N.")
    entry = data.index(b"PK\x01\x02")
    data[entry + offset] = data[offset - 2] = value
    return data


def quantized(value: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop them one day
        return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


# Files of PyTorch


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("exploited",)


@pytest.mark.parametrize("key", [1, ("a",), None], ids=str)
def test_names_that_are_not_strings_are_refused(tmp_path: Path, key: object) -> None:
    path = saved(tmp_path / "a.pth", {"model": {**OFFICIAL, key: torch.zeros(1)}})

    assert "must hold a state dict" in refused(path)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (WEIGHT.to_sparse(), f"{NAME} is sparse_coo"),
        (WEIGHT.to("meta"), f"{NAME} is meta"),
        (quantized(WEIGHT), f"{NAME} is of torch.qint8"),
        (WEIGHT.to(torch.complex64), f"{NAME} is of torch.complex64"),
        (WEIGHT > 0, f"{NAME} is of torch.bool"),
        (WEIGHT.long(), f"{NAME} is of torch.int64"),
        (torch.full_like(WEIGHT, torch.nan), f"must be finite in fp32 ({NAME} is not)"),
        (torch.full_like(WEIGHT, torch.inf), f"must be finite in fp32 ({NAME} is not)"),
        (torch.full_like(WEIGHT, 1e300, dtype=torch.float64), f"must be finite in fp32 ({NAME} is not)"),
    ],
    ids=["sparse", "meta", "quantized", "complex", "bool", "int64", "nan", "inf", "too large for fp32"],
)
def test_tensors_that_are_not_weights_are_refused(tmp_path: Path, value: Tensor, what: str) -> None:
    line = refused(saved(tmp_path / "a.pth", {"model": {**OFFICIAL, NAME: value}}))

    assert what in line.replace("encoder.", "")


def test_a_nested_tensor_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])

    assert "must be" in refused(saved(tmp_path / "a.pth", {"model": {**OFFICIAL, NAME: nested}}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_and_of_an_older_pytorch_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: torch.nn.Parameter(value.to(dtype)) for name, value in OFFICIAL.items()}
    torch.save({"model": state}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)

    import_weights(Storage(), str(tmp_path / "a.pth"), str(tmp_path / "out.safetensors"), CONFIG)

    found = consolidated.of_file(Storage(), str(tmp_path / "out.safetensors"))
    assert torch.equal(found.tensors[f"encoder.{NAME}"], WEIGHT.to(dtype).float())


PICKLES = {
    "an empty stack": b"\x80\x02.",
    "marks": b"\x80\x02" + b"(" * 10**6 + b".",
    "a state of a number": b"\x80\x02cargparse\nNamespace\n)\x81K\x05b.",
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a tensor of numbers": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04K\x05K\x06tR.",
    "a dict of a number": b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
    "a size of a number": b"\x80\x02ctorch\nSize\n(K\x01tR.",
    "a storage of a number": b"\x80\x02K\x01Q.",
    "items of a number": b"\x80\x02K\x01(K\x01K\x02u.",
    "a place that is not there": b"\x80\x02j\xff\xff\xff\xff.",
    "text that is none": b"\x80\x02X\x02\0\0\0\xff\xfe.",
    "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "code": pickle.dumps({"model": Exploit()}, 2),
}
"""By what they make."""


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("form", ["archive", "older"])
def test_pickles_made_by_hand_are_refused(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(packed(PICKLES[name]) if form == "archive" else PICKLES[name])

    assert "must be a whole PyTorch file of tensors alone" in refused(path)


def test_attributes_that_a_file_gives_its_dict_are_not_used(tmp_path: Path) -> None:
    state = b"}(X\x03\0\0\0getK\x05X\x05\0\0\0itemsK\x05ub."
    path = tmp_path / "a.pth"
    path.write_bytes(packed(b"\x80\x02ccollections\nOrderedDict\n)R(X\x05\0\0\0modelK\x05u" + state))

    assert "must hold a state dict" in refused(path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (packed(b"(" * (1 << 24), compression=zipfile.ZIP_DEFLATED), "a/data.pkl is compressed or encrypted"),
        (packed(b"\x80\x02N.", more=(("data/0", bytes(1000)),), compression=zipfile.ZIP_BZIP2), "is compressed"),
        (patched(10, 99), "a/data.pkl is compressed or encrypted"),
        (patched(8, 1), "a/data.pkl is compressed or encrypted"),
        (packed(bytes(torch_archive.LARGEST_PICKLE_BYTES + 1)), "a/data.pkl has 8388609 bytes, more than 8388608"),
    ],
    ids=["deflated", "bzip2", "unknown method", "encrypted", "large"],
)
def test_archives_that_would_unpack_to_more_than_they_are_are_refused(
    tmp_path: Path, data: bytearray, what: str
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(data)

    assert what in refused(path)
    with pytest.raises(DamagedCheckpointError, match=what):
        contents(data)


def test_records_that_overlap_are_refused() -> None:
    data = packed(b"\x80\x02N.", more=(("data/0", bytes(1000)),))
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entries = data[start:end] * 3
    data[start:end] = entries
    data[-22 + 12 : -22 + 16] = len(entries).to_bytes(4, "little")

    with pytest.raises(DamagedCheckpointError, match="its records overlap"):
        contents(data)


def test_a_second_directory_that_only_torch_would_read_is_refused(tmp_path: Path) -> None:
    """Its end gives the offset of the first; Python reads right before the end."""
    large = packed(b"(" * 1000, compression=zipfile.ZIP_DEFLATED)
    path = tmp_path / "a.pth"
    path.write_bytes(large + packed(b"\x80\x02N."))

    assert "its directory is not where its end says" in refused(path)


def test_a_large_pickle_of_an_older_file_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": OFFICIAL}, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch_file, "LARGEST_PICKLE_BYTES", 1000)

    assert "ValueError" in refused(path)


def test_of_many_surplus_tensors_the_first_are_listed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": {**OFFICIAL, **{f"k{n}": torch.zeros(1) for n in range(5000)}}})

    line = refused(path)

    assert "unexpected k0; " in line and "unexpected k29; and 4970 more unexpected)" in line


def test_a_name_does_not_write_lines_of_its_own(tmp_path: Path) -> None:
    name = "\x1b[31m\nerror: fake"

    assert r"unexpected \x1b[31m\nerror: fake)" in refused(saved(tmp_path / "a.pth", {**OFFICIAL, name: WEIGHT}))


# Safetensors


def safetensors(path: Path, header: dict[str, object] | bytes, body: bytes = b"") -> Path:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + body)
    return path


def with_metadata(path: Path, model: str) -> Path:
    save_file(STATE, path, metadata={"format": "pt", "model": model})
    return path


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (json.dumps({**asdict(CONFIG), "decoder_depth": 10**7}), "decoder_depth: must be at most 1000, got 10000000"),
        (json.dumps({**asdict(CONFIG), "image_size": 16 * 10**6}), "image_size: each must be at most 16384"),
        ("[" * 100_000, "must be of a known model"),
        ('{"a":' * 100_000, "must be of a known model"),
        (json.dumps({"masking": "x" * 100_000}), "must be of a known model"),
        *[(f'{{"depth": {"[" * n}{"]" * n}}}', "must be of a known model") for n in range(900, 1000, 9)],
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_model_that_cannot_be_built_is_refused_at_once(tmp_path: Path, model: str, what: str) -> None:
    path = with_metadata(tmp_path / "a.safetensors", model)

    assert what in refused(path)
    with pytest.raises(WeightsFileError, match="must be of a known model"):
        consolidated.of_file(Storage(), str(path))


def test_weights_that_are_not_numbers_are_refused_before_a_run_starts(tmp_path: Path) -> None:
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    model = {f"model.{name}": value for name, value in asdict(CONFIG).items()}
    path = tmp_path / "a.safetensors"
    recipe = named_recipe("tiny").amended({**model, "init_from": str(path)})
    metadata = {"format": "pt", "model": model_json(CONFIG)}
    for value, what in (
        (STATE[f"encoder.{NAME}"].long(), f"encoder.{NAME} is of I64"),
        (torch.full_like(WEIGHT, torch.nan), f"must be finite in fp32 (encoder.{NAME} is not)"),
    ):
        save_file({**STATE, f"encoder.{NAME}": value}, path, metadata=metadata)

        assert what in refused(path)
        with pytest.raises(WeightsFileError) as caught:
            pinned(Storage(), recipe, run)
        assert what in str(caught.value)
    save_file(STATE, path, metadata=metadata)
    assert pinned(Storage(), recipe, run).init_sha256


def test_integers_are_not_exported(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**STATE, f"encoder.{NAME}": WEIGHT.long()}, path, metadata={"model": model_json(CONFIG)})

    with pytest.raises(WeightsFileError, match=r"patch_embed1\.proj\.weight is of torch\.int64"):
        consolidated.of_file(Storage(), str(path))


def test_a_shape_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
    path = safetensors(tmp_path / "a.safetensors", {"__metadata__": {"model": model_json(CONFIG)}, "a": tensor})

    assert "unexpected a" in refused(path)
    with pytest.raises(WeightsFileError, match="must hold tensors that can be made"):
        consolidated.of_file(Storage(), str(path))


# Archives of checkpoints


@dataclass
class InMemory:
    data: bytes

    def read_range(self, url: str, offset: int, length: int) -> bytes:  # noqa: ARG002
        return bytes(self.data[offset : offset + length])


def contents(data: bytes | bytearray) -> Any:
    return read_archive(InMemory(bytes(data)), "a.pt", len(data))


@pytest.mark.parametrize(
    "pickled",
    [
        *PICKLES.values(),
        b"\x80\x02Nr\xff\xff\xff\x00.",  # a table of 128 MB; with 0x7f in its last byte of 32 GB
        b"Np16777215\n.",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02]" + b"]a" * 10**5 + b"0",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NG\x7f\xf0\0\0\0\0\0\0NNtR.",
    ],
    ids=lambda pickled: repr(pickled[:40]),
)
def test_a_pickle_that_asks_for_too_much_or_makes_no_sense_is_damage(pickled: bytes) -> None:
    if pickled in (PICKLES["code"], PICKLES["a state of a number"]):
        contents(packed(pickled))  # inert: neither is done
        return
    with pytest.raises(DamagedCheckpointError, match="cannot be read") as caught:
        contents(packed(pickled))
    assert len(str(caught.value)) < 1000


STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
)


@pytest.mark.parametrize(
    "rest",
    [
        b"K\x00(X\x01\0\0\0at(K\x01tt",
        b"K\x00(K\x02K\x02t(K\x01tt",
        b"K\x00(J\xff\xff\xff\xfft(K\x01tt",
        b"X\x01\0\0\0a(K\x01t(K\x01tt",
    ],
    ids=["a shape of text", "a stride that is shorter", "a negative length", "a place of text"],
)
def test_tensors_that_cannot_be_are_damage(rest: bytes) -> None:
    with pytest.raises(DamagedCheckpointError, match="a tensor whose place, shape and stride are not numbers"):
        contents(packed(b"\x80\x02" + STORAGE + rest + b"R."))


def test_a_tensor_takes_no_state_and_one_without_a_record_is_damage() -> None:
    tensor = STORAGE + b"K\x00(K\x04t(K\x01ttR"

    with pytest.raises(DamagedCheckpointError, match="a state for a tensor"):
        contents(packed(b"\x80\x02" + tensor + b"}X\x05\0\0\0shapeNsb."))
    found = contents(packed(b"\x80\x02" + tensor + b"."))
    assert isinstance(found, LazyTensor)
    with pytest.raises(DamagedCheckpointError, match="it has no record data/0"):
        found.place()
    assert contents(packed(b"\x80\x02" + tensor + b".", more=(("data/0", bytes(16)),))).place().elements == 4


def test_a_store_that_does_not_answer_is_not_damage() -> None:
    class Unreachable:
        def read_range(self, url: str, offset: int, length: int) -> bytes:  # noqa: ARG002
            raise StorageError("storage", "must answer", url, "wait")

    with pytest.raises(StorageError):
        read_archive(Unreachable(), "a.pt", 1000)


# Commits


@dataclass(frozen=True)
class CountingStorage(Storage):
    """Fails if a file is read again and again."""

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        assert offset < 1 << 30, "long after its end"
        return super().read_range(url, offset, length, etag)


def lying(size: int) -> Callable[[Storage, str], int]:
    return lambda storage, url: size


@pytest.mark.parametrize("told", [None, 2**52], ids=["its size", "the size of the commit"])
@pytest.mark.parametrize("size", [2**52, 6])
def test_a_size_that_is_made_up_is_damage_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int | None, size: int
) -> None:
    run = RunDirectory.of(CountingStorage(), str(tmp_path), "first")
    path = Path(file_url(run, 5, "a"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"hello")
    if told is not None:  # it became shorter after it was asked
        monkeypatch.setattr(Storage, "size", lying(size))

    with pytest.raises(DamagedCheckpointError, match=r"it has 5 bytes, not|it ends before byte|it was altered"):
        with_chunks(run, 5, [CheckpointFile("a", size, 0)])
