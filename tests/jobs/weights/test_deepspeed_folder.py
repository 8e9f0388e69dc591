"""Checkpoints that DeepSpeed wrote in any program become weights that a run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_s3 import LocalS3, local_s3
from zero_material import Material, model_material, write_zero_files

from jobs.errors import DamagedCheckpointError, WeightsFileError
from jobs.weights import consolidated
from jobs.weights.initial import import_weights
from model import ConvMAE, ConvMAEConfig
from pipeline.store.storage import Storage

CONFIG = ConvMAEConfig(image_size=32, depth=(1, 1, 1), decoder_depth=1)


@pytest.fixture(scope="module")
def model() -> ConvMAE:
    torch.manual_seed(0)
    return ConvMAE(CONFIG)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalS3]:
    (tmp_path / "s3").mkdir()
    with local_s3(tmp_path / "s3") as server:
        yield server


def official(model: ConvMAE) -> Material:
    """As the official code names its parameters."""
    named = model.official_state_dict()
    frozen = {name: value for name, value in named.items() if name.endswith("pos_embed")}
    return Material([{name: value for name, value in named.items() if name not in frozen}], frozen, {})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_of_every_stage_are_put_together(model: ConvMAE, tmp_path: Path, stage: int) -> None:
    write_zero_files(tmp_path / "saved" / "global_step10", model_material(model), stage, 3)
    (tmp_path / "saved" / "latest").write_text("global_step10")
    out = str(tmp_path / "start.safetensors")

    done = import_weights(Storage(), str(tmp_path / "saved"), out, CONFIG, kind="deepspeed")

    found = consolidated.of_file(Storage(), out)
    assert found.metadata["source_sha256"] == done.source_sha256
    assert found.tensors.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found.tensors[name], value), name


def test_they_come_from_a_store_and_by_official_names(model: ConvMAE, tmp_path: Path, server: LocalS3) -> None:
    write_zero_files(tmp_path / "saved", official(model), 2, 2)
    for path in (tmp_path / "saved").iterdir():
        server.storage.upload(path, f"{server.url}/saved/{path.name}")
    out = f"{server.url}/start.safetensors"

    import_weights(server.storage, f"{server.url}/saved", out, CONFIG, kind="deepspeed")

    found = consolidated.of_file(server.storage, out)
    for name, value in model.state_dict().items():
        assert torch.equal(found.tensors[name], value), name


def test_a_folder_without_such_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    out = str(tmp_path / "start.safetensors")

    with pytest.raises(WeightsFileError, match=r"FOLDER: must hold files named \*_optim_states\.pt"):
        import_weights(Storage(), str(tmp_path / "saved"), out, CONFIG, kind="deepspeed")
    (tmp_path / "saved" / "latest").write_text("../elsewhere")
    with pytest.raises(
        WeightsFileError, match=r"FOLDER: must name a folder beside it in `latest`, got '\.\./elsewhere'"
    ):
        import_weights(Storage(), str(tmp_path / "saved"), out, CONFIG, kind="deepspeed")
    with pytest.raises(WeightsFileError, match="--format: must be file or deepspeed, got 'zero'"):
        import_weights(Storage(), str(tmp_path / "saved"), out, CONFIG, kind="zero")


def test_a_file_that_is_cut_off_is_named(model: ConvMAE, tmp_path: Path) -> None:
    write_zero_files(tmp_path / "saved", model_material(model), 2, 2)
    (path, *_) = sorted((tmp_path / "saved").glob("*rank_1*"))
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(DamagedCheckpointError, match=path.name):
        import_weights(Storage(), str(tmp_path / "saved"), str(tmp_path / "o.safetensors"), CONFIG, kind="deepspeed")
