from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.checkpoint.rank_group import RankGroup
from jobs.errors import CheckpointError, ExportError, WeightsFileError
from jobs.export import onnx_export
from jobs.export.formats import Source, export
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated
from jobs.weights.consolidated import ClassifierHead, Weights
from jobs.weights.initial import import_weights, load_initial_weights, pinned
from jobs.weights.weight_files import model_json
from model import Backbone, Classifier, ConvMAE, ConvMAEConfig
from pipeline.errors import UserError
from pipeline.host.local_files import sha256_of
from pipeline.store.storage import Storage

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = ConvMAEConfig()
SMALL = ConvMAEConfig(
    image_size=64, embed_dim=(8, 12, 16), num_heads=2, decoder_dim=16, decoder_num_heads=2, depth=(1, 1, 2)
)
ENCODER_MODULES = ("patch_embed1", "patch_embed2", "patch_embed3", "patch_embed4", "blocks1", "blocks2", "blocks3")


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    """A state dict of the official pretraining class."""
    golden = load_file(GOLDEN / "convmae_tiny_inputs.safetensors")
    return {name.removeprefix("weight."): value for name, value in golden.items() if name.startswith("weight.")}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {
        **load_file(GOLDEN / "convmae_tiny_inputs.safetensors"),
        **load_file(GOLDEN / "convmae_tiny_outputs.safetensors"),
    }


@pytest.fixture(scope="module")
def weights(official: dict[str, Tensor]) -> Weights:
    model = ConvMAE(CONFIG)
    model.load_official(official)
    return Weights(CONFIG, model.state_dict(), {"run": "first", "step": "400", "epoch": "25"})


def random_weights(config: ConvMAEConfig) -> Weights:
    torch.manual_seed(0)
    return Weights(config, ConvMAE(config).state_dict(), {"run": "first", "step": "4"})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with a history and a picture, whose step 4 was consolidated."""
    run = RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")
    model = {f"model.{name}": value for name, value in dataclasses.asdict(SMALL).items()}
    run.claim(named_recipe("tiny").amended({**model, "data": "s3://bucket/photographs|1"}))
    row = {"epoch": 0, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}
    run.write_history(1, 1, [{"step": step, "loss": 1 / step, **row} for step in range(1, 9)])
    Image.new("RGB", (8, 8)).save(Path(run.url) / "reconstructions.png")
    (Path(run.url) / "consolidated").mkdir()
    path = Path(run.path("consolidated", "step-00000004.safetensors"))
    chosen = random_weights(SMALL)
    save_file(dict(chosen.tensors), path, metadata={**chosen.metadata, "model": model_json(SMALL)})
    return run


def test_the_official_file_has_the_official_names_and_values(
    weights: Weights, official: dict[str, Tensor], tmp_path: Path
) -> None:
    (written,) = export(Source.of(weights, None), "official", Storage(), str(tmp_path))

    assert Path(written.url).name == "first-step-00000400-official.pth"
    loaded = torch.load(written.url, weights_only=True)
    assert loaded["model"].keys() == official.keys()
    for name, value in official.items():
        assert torch.equal(loaded["model"][name], value), name
    # What the official fine-tuning class adds is its head; what it lacks belongs to the decoder and the fusion.
    encoder = {name for name in loaded["model"] if name.split(".")[0] in (*ENCODER_MODULES, "pos_embed", "norm")}
    others = {name.split(".")[0] for name in set(loaded["model"]) - encoder}
    assert all(name.startswith(("decoder_", "mask_token", "stage")) for name in others)
    block, convolution_block, embedding, linear, norm = 12, 14, 4, 2, 2
    assert len(encoder) == 2 * convolution_block + 2 * block + 3 * embedding + linear + norm + 1  # the position


def test_the_backbone_file_gives_the_official_maps(weights: Weights, golden: dict[str, Tensor], tmp_path: Path) -> None:
    (written,) = export(
        Source.of(weights, None), "backbone", Storage(), str(tmp_path / "there" / "backbone.safetensors")
    )
    assert written.url == str(tmp_path / "there" / "backbone.safetensors")
    loaded, strict = Backbone(CONFIG), Backbone(CONFIG)

    loaded.load(load_file(written.url))
    strict.load_state_dict(load_file(written.url), strict=True)

    with torch.no_grad():
        stage1, _, stage3 = loaded(golden["input.imgs"])
    torch.testing.assert_close(stage1[:, :, ::4, ::4], golden["dense.stage1_every_4th_place"])
    torch.testing.assert_close(stage3.flatten(2).mT, golden["dense.stage3_tokens"], rtol=1e-5, atol=1e-5)


def test_the_hugging_face_folder_is_loaded_as_its_card_says(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    weights = consolidated.of_run(run)

    written = export(Source.of(weights, run), "hf", Storage(), str(folder))

    names = {
        "README.md", "config.json", "loss.png", "model.safetensors", "preprocessor_config.json", "reconstructions.png",
    }  # fmt: skip
    assert {Path(file.url).name for file in written} == {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_sizes"], config["image_size"]) == ("convmae", [8, 12, 16], [64, 64])
    card = (folder / "README.md").read_text()
    (code,) = [part.split("```")[0] for part in card.split("```python\n")[1:2]]
    names_of_code: dict[str, object] = {}
    exec(
        code.replace('"config.json"', f'"{folder}/config.json"').replace('"model.s', f'"{folder}/model.s'),
        names_of_code,
    )
    model = names_of_code["model"]
    assert isinstance(model, ConvMAE)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights.tensors[name]), name
    assert card.startswith("---\nlibrary_name: pytorch")
    assert "loss at the last step: 0.2500" in card, "of the step that was exported, not of the last one trained"
    assert "![loss over steps](loss.png)" in card and "(reconstructions.png)" in card
    assert "| `data` | s3://bucket/photographs\\|1 |" in card and "| `model.depth` | [1, 1, 2] |" in card
    assert Image.open(folder / "loss.png").size == (1200, 450)


MEAN, STD = [0.5, 0.25, 0.125], [0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("record", "mean", "std"),
    [
        ({"image_mean": json.dumps(MEAN), "image_std": json.dumps(STD)}, MEAN, STD),
        ({}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
    ids=["measured", "of an earlier release"],
)
def test_every_export_says_what_its_images_are_normalised_by(
    record: dict[str, str], mean: list[float], std: list[float], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    weights = dataclasses.replace(random_weights(SMALL), metadata={"run": "first", **record})
    written = {
        name: export(Source.of(weights, None), name, Storage(), str(tmp_path / name))
        for name in ("official", "backbone", "hf", "onnx")
    }

    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    with safe_open(written["backbone"][0].url, "pt") as file:
        backbone = file.metadata()
    records = [
        torch.load(written["official"][0].url, weights_only=True)["convmae_pretrain"],
        backbone,
        json.loads((tmp_path / "hf" / "config.json").read_text())["pretraining"],
        {prop.key: prop.value for prop in onnx.load(written["onnx"][0].url).metadata_props},
    ]
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == (mean, std)
    for found in records:
        assert (json.loads(found["image_mean"]), json.loads(found["image_std"])) == (mean, std)


def test_a_model_of_gray_images_is_exported_as_such(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    record = {"run": "first", "image_mean": "[0.4]", "image_std": "[0.2]"}
    weights = dataclasses.replace(random_weights(dataclasses.replace(SMALL, in_channels=1)), metadata=record)
    source = Source.of(weights, None)

    export(source, "hf", Storage(), str(tmp_path / "hf"))
    (onnx,) = export(source, "onnx", Storage(), str(tmp_path / "onnx"))

    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_channels"] == 1
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["image_mean"] == [0.4]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Images are gray" in card and "(B, 1, H, W)" in card
    (given,) = onnxruntime.InferenceSession(onnx.url).get_inputs()
    assert given.shape[1:] == [1, 64, 64]
    with pytest.raises(ExportError, match=r"model.in_channels: must be 3 in the official code, got 1"):
        export(source, "official", Storage(), str(tmp_path / "official"))


def test_a_file_on_its_own_has_a_card_without_pictures(weights: Weights, tmp_path: Path) -> None:
    export(Source.of(weights, None), "hf", Storage(), str(tmp_path / "hf"))

    assert not (tmp_path / "hf" / "loss.png").exists()
    assert ".png" not in (tmp_path / "hf" / "README.md").read_text()


def test_onnx_computes_what_pytorch_does_for_any_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    weights = random_weights(SMALL)

    (written,) = export(Source.of(weights, None, "64x96"), "onnx", Storage(), str(tmp_path))

    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    backbone = Backbone(SMALL)
    backbone.load(weights.tensors)
    found = onnxruntime.InferenceSession(written.url).run(["stage1", "stage2", "stage3"], {"images": images.numpy()})
    with torch.no_grad():
        for one, other in zip(backbone.eval()(images), found, strict=True):
            torch.testing.assert_close(one, torch.from_numpy(other), rtol=1e-3, atol=1e-4)


MAE = dataclasses.replace(SMALL, embed_dim=(0, 0, 16), depth=(0, 0, 2), fusion=False)


def classifier_weights(config: ConvMAEConfig, kind: str) -> Weights:
    """Of a classifier whose every weight and statistic matters."""
    torch.manual_seed(0)
    model = Classifier(config, 3, kind=kind)
    tensors = {name: value.float().uniform_(0.1, 0.9) for name, value in model.head.state_dict(prefix="head.").items()}
    tensors.pop("head.0.num_batches_tracked", None)
    head = ClassifierHead(kind, ("cat", "dog", "caf\u00e9"))
    return Weights(config, model.state_dict() | tensors, {"run": "tuned", "step": "4"}, head)


@pytest.mark.parametrize(("config", "kind"), [(SMALL, "full"), (MAE, "linear")], ids=["convmae", "mae-linear"])
def test_onnx_of_a_classifier_gives_logits_and_the_names_of_their_classes(
    tmp_path: Path, config: ConvMAEConfig, kind: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    weights = classifier_weights(config, kind)

    (written,) = export(Source.of(weights, None), "onnx", Storage(), str(tmp_path))

    session = onnxruntime.InferenceSession(written.url)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    assert [output.name for output in session.get_outputs()] == ["logits"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["cat", "dog", "caf\u00e9"]
    with torch.no_grad():
        expected = weights.classifier()(images)
    assert expected.shape == (3, 3) and expected.std(0).min() > 0
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
    assert not written.note


def test_the_backbone_of_a_classifier_says_that_it_has_no_head(tmp_path: Path) -> None:
    weights = classifier_weights(SMALL, "full")

    (written,) = export(Source.of(weights, None), "backbone", Storage(), str(tmp_path))

    assert written.note == "the encoder of the classifier, without its head"
    assert not [name for name in load_file(written.url) if "head" in name or "fc_norm" in name]
    assert not export(Source.of(random_weights(SMALL), None), "backbone", Storage(), str(tmp_path / "plain"))[0].note


def test_onnx_that_differs_from_pytorch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("torch.onnx.export", lambda maps, images, path, **_: path.write_bytes(b"another model"))
    monkeypatch.setattr(onnx_export, "largest_difference", lambda *_: float("nan"))

    with pytest.raises(ExportError, match="must agree with PyTorch"):
        export(Source.of(random_weights(SMALL), None), "onnx", Storage(), str(tmp_path))

    assert list(tmp_path.iterdir()) == []


def test_without_its_packages_onnx_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)

    with pytest.raises(ExportError, match=r"'onnxruntime'; pip install 'convmae-pretrain\[export\]'"):
        export(Source.of(random_weights(SMALL), None), "onnx", Storage(), str(tmp_path))


@pytest.mark.parametrize("name", ["official", "hf"])
def test_a_target_that_exists_is_refused_unless_forced(weights: Weights, tmp_path: Path, name: str) -> None:
    source = Source.of(weights, None)
    export(source, name, Storage(), str(tmp_path / "out"))

    with pytest.raises(ExportError, match="--out: must not exist yet"):
        export(source, name, Storage(), str(tmp_path / "out"))
    assert export(source, name, Storage(), str(tmp_path / "out"), force=True)


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"kernel_size": 7}, "official", "model.kernel_size: must be 5 in the official code, got 7"),
        ({"fusion": False}, "official", "model.fusion: must be True in the official code"),
        ({"image_size": (64, 96)}, "official", "model.image_size: must be square"),
        ({"embed_dim": (0, 0, 16), "depth": (0, 0, 2), "fusion": False}, "backbone", "must have convolution stages"),
        ({"embed_dim": (0, 0, 16), "depth": (0, 0, 2), "fusion": False}, "onnx", "must have convolution stages"),
        ({}, "coreml", "--format: must be one of official, backbone, hf, onnx, metrics, metrics-csv, got 'coreml'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, changes: dict[str, object], name: str, message: str
) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]

    with pytest.raises(ExportError) as refused:
        export(Source.of(random_weights(config), None), name, Storage(), str(tmp_path))

    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["0", "100", "64x", "large", "64x100"])
def test_sizes_that_cannot_be_are_refused(size: str) -> None:
    with pytest.raises(UserError, match="--image-size: must be a side or HEIGHTxWIDTH, multiples of 16"):
        Source.of(random_weights(SMALL), None, size)


def test_a_consolidated_file_that_was_altered_is_refused(run: RunDirectory) -> None:
    path = Path(run.path("consolidated", "step-00000004.safetensors"))
    Path(f"{path}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    assert consolidated.of_run(run, 4).metadata["step"] == "4"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsFileError, match=r"must have the SHA-256 in step-00000004\.safetensors\.sha256"):
        consolidated.of_run(run)

    Path(f"{path}.sha256").unlink()
    path.write_bytes(data[:-100])
    with pytest.raises(WeightsFileError, match="must be a whole safetensors file"):
        consolidated.of_run(run)
    with pytest.raises(CheckpointError, match="step: must be a committed checkpoint, got 5"):
        consolidated.of_run(run, 5)
    with pytest.raises(WeightsFileError, match="weights: must exist"):
        consolidated.of_file(Storage(), f"{path}.gone.safetensors")


@pytest.mark.parametrize("keep", [{}, {"epoch": 1599, "args": argparse.Namespace(lr=1.5e-4), "scaler": {}}])
def test_an_official_file_makes_the_round_trip(
    official: dict[str, Tensor], tmp_path: Path, keep: dict[str, object]
) -> None:
    """With what the official main_pretrain.py keeps beside the weights."""
    torch.save({"model": official, **keep}, tmp_path / "official.pth")
    out = str(tmp_path / "there" / "start.safetensors")

    imported = import_weights(Storage(), str(tmp_path / "official.pth"), out, CONFIG)

    assert imported.source_sha256 == sha256_of(tmp_path / "official.pth")
    weights = consolidated.of_file(Storage(), out)
    assert weights.metadata["source_sha256"] == imported.source_sha256
    model = ConvMAE(CONFIG)
    model.load_state_dict(dict(weights.tensors), strict=True)
    for name, value in model.official_state_dict().items():
        assert torch.equal(value, official[name]), name
    with pytest.raises(WeightsFileError, match="OUT: must not exist yet"):
        import_weights(Storage(), str(tmp_path / "official.pth"), out, CONFIG)


def test_weights_of_another_architecture_are_refused_with_every_name(
    official: dict[str, Tensor], tmp_path: Path
) -> None:
    wrong = {name: value for name, value in official.items() if name != "mask_token"} | {"cls_token": torch.zeros(1)}
    torch.save({"model": wrong}, tmp_path / "official.pth")
    config = dataclasses.replace(CONFIG, kernel_size=7)

    with pytest.raises(WeightsFileError) as refused:
        import_weights(Storage(), str(tmp_path / "official.pth"), str(tmp_path / "out.safetensors"), config)

    for part in ("missing decoder.mask_token", "unexpected cls_token", "blocks1.0.attn.weight has shape (16, 1, 5, 5)"):
        assert part in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploited"),)  # type: ignore[return-value]


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Exploit()}, tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")

    for name in ("bad", "text", "numbers"):
        with pytest.raises(WeightsFileError, match=r"must be a whole PyTorch file of tensors|must hold a state dict"):
            import_weights(Storage(), str(tmp_path / f"{name}.pth"), str(tmp_path / "out.safetensors"), CONFIG)
    assert not (tmp_path / "exploited").exists()


def test_a_run_keeps_the_digest_of_what_it_started_from(run: RunDirectory, tmp_path: Path) -> None:
    start = run.path("consolidated", "step-00000004.safetensors")
    recipe = run.read_recipe().amended({"init_from": start})
    other = RunDirectory.of(Storage(), str(tmp_path / "runs"), "second")

    began = pinned(Storage(), recipe, other)

    assert began.init_sha256 == sha256_of(Path(start))
    ConvMAE(SMALL).load_state_dict(load_initial_weights(Storage(), began, RankGroup()), strict=True)
    other.claim(began)
    Path(start).write_bytes(Path(start).read_bytes()[:-1] + b"x")
    assert pinned(Storage(), recipe, other) == began, "it is the run's by now; its checkpoints count"
    with pytest.raises(WeightsFileError, match="init_from: must be the file with SHA-256"):
        load_initial_weights(Storage(), began, RankGroup())
    Path(start).unlink()
    assert pinned(Storage(), recipe, other) == began
    with pytest.raises(WeightsFileError, match="weights: must exist"):
        pinned(Storage(), recipe, RunDirectory.of(Storage(), str(tmp_path / "runs"), "third"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.depth": [1, 1, 3]}, "missing encoder.blocks3.2.norm1.weight"),
        ({"model.num_heads": 4}, "must be of a model with num_heads = 4, not 2"),
    ],
)
def test_a_start_from_another_architecture_is_refused(
    run: RunDirectory, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    start = run.path("consolidated", "step-00000004.safetensors")
    other = RunDirectory.of(Storage(), str(tmp_path / "runs"), "second")

    with pytest.raises(WeightsFileError) as refused:
        pinned(Storage(), run.read_recipe().amended({"init_from": start, **changes}), other)

    assert message in str(refused.value)
