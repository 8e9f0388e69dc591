"""Weights as people have them: each form of the official weights becomes the same file, or is refused with a remedy."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.errors import WeightsFileError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from jobs.weights import consolidated
from jobs.weights.initial import Imported, import_weights, pinned
from jobs.weights.weight_files import model_json
from model import ConvMAE, ConvMAEConfig
from model.weights import to_bands
from pipeline.store.storage import Storage

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = ConvMAEConfig()
SEED = 7
FUSION = ("stage1_output_decode", "stage2_output_decode")

State = dict[str, Tensor]


def golden(kind: str) -> State:
    found = load_file(GOLDEN / f"convmae_tiny_{'inputs' if kind in ('weight', 'input') else 'outputs'}.safetensors")
    return {name.removeprefix(f"{kind}."): value for name, value in found.items() if name.startswith(f"{kind}.")}


OFFICIAL = golden("weight")
ENCODER = {name: value for name, value in OFFICIAL.items() if "decoder" not in name and name != "mask_token"}
"""As it is published."""
DECODER = {name: value for name, value in OFFICIAL.items() if name not in ENCODER}
HEAD = {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10), "head.0.num_batches_tracked": torch.tensor(3)}


def prefixed(prefix: str, state: State = OFFICIAL) -> State:
    return {prefix + name: value for name, value in state.items()}


def imported(path: Path, **options: Any) -> Imported:
    out = f"{path}.out.safetensors"
    return import_weights(Storage(), str(path), out, CONFIG, force=True, **options)


def taken(path: Path, **options: Any) -> State:
    """The initial weights of a run, by official names."""
    model = ConvMAE(CONFIG)
    model.load_state_dict(dict(consolidated.of_file(Storage(), imported(path, **options).url).tensors), strict=True)
    return model.official_state_dict()


def same(state: State, expected: State) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def save(path: Path, found: object, **options: bool) -> Path:
    torch.save(found, path, **options)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "with all that training keeps": lambda path: save(
        path,
        {
            "model": OFFICIAL,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
            "epoch": 799,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(batch_size=64, lr=None, output_dir="out"),
        },
    ),
    "bare": lambda path: save(path, OFFICIAL),
    "legacy": lambda path: save(path, {"model": OFFICIAL}, _use_new_zipfile_serialization=False),
    "legacy and bare": lambda path: save(path, OFFICIAL, _use_new_zipfile_serialization=False),
    "state_dict": lambda path: save(path, {"state_dict": OFFICIAL, "epoch": 3}),
    "module": lambda path: save(path, {"module": OFFICIAL, "global_steps": 3}),
    "nested twice": lambda path: save(path, {"model": {"state_dict": OFFICIAL}}),
    "ordered": lambda path: save(path, {"model": collections.OrderedDict(OFFICIAL)}),
    "parameters": lambda path: save(path, {n: torch.nn.Parameter(value) for n, value in OFFICIAL.items()}),
    "other name": lambda path: save(path.with_name("sp ace é.bin"), {"model": OFFICIAL}),
    "no suffix": lambda path: save(path.with_name("weights"), {"model": OFFICIAL}),
    "DistributedDataParallel": lambda path: save(path, {"model": prefixed("module.")}),
    "compiled": lambda path: save(path, {"model": prefixed("_orig_mod.")}),
    "both": lambda path: save(path, {"model": prefixed("module._orig_mod.")}),
    "Lightning": lambda path: save(path, {"state_dict": prefixed("model.")}),
    "backbone": lambda path: save(path, {"state_dict": prefixed("backbone.")}),
    "encoder": lambda path: save(path, prefixed("encoder.")),
    "ours": lambda path: save(path, {"module." + n: v for n, v in ours(OFFICIAL).items()}),
    "some prefixed": lambda path: save(path, {**prefixed("module.", ENCODER), **DECODER}),
    "with a head": lambda path: save(path, {"model": {**OFFICIAL, **HEAD}}),
    "safetensors": lambda path: safetensors(path.with_name("a.safetensors"), OFFICIAL),
    "safetensors, prefixed": lambda path: safetensors(path.with_name("a.safetensors"), prefixed("module.")),
    "safetensors, another name": lambda path: safetensors(path, OFFICIAL),
}  # fmt: skip


def ours(state: State) -> State:
    model = ConvMAE(CONFIG)
    model.load_official(state)
    return model.state_dict()


def safetensors(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, path, metadata=metadata)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_official_weights_is_taken(form: str, tmp_path: Path) -> None:
    assert same(taken(FORMS[form](tmp_path / "a.pth")), OFFICIAL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_encoder_of_another_precision_is_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"model": {name: value.to(dtype) for name, value in ENCODER.items()}})

    state = taken(path, fresh_decoder_seed=SEED)

    assert all(torch.equal(state[name], value.to(dtype).float()) for name, value in ENCODER.items())


@pytest.mark.parametrize("state", [ENCODER, prefixed("module.", ENCODER), {**ENCODER, **HEAD}, OFFICIAL], ids=len)
def test_an_encoder_gets_the_decoder_that_a_run_of_the_seed_begins_with(state: State, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"model": state})

    found = taken(path, fresh_decoder_seed=SEED)

    torch.manual_seed(SEED)
    fresh = ConvMAE(CONFIG).official_state_dict()
    assert same(found, {**fresh, **ENCODER})


def test_the_imported_encoder_computes_what_the_official_one_does(tmp_path: Path) -> None:
    """The last stage of the official encoder on golden images."""
    model = ConvMAE(CONFIG)
    path = save(tmp_path / "a.pth", {"model": ENCODER})
    model.load_state_dict(dict(consolidated.of_file(Storage(), imported(path, fresh_decoder_seed=0).url).tensors))

    with torch.no_grad():
        stage3 = model.encode_dense(golden("input")["imgs"])[2].flatten(2).transpose(1, 2)

    torch.testing.assert_close(stage3, golden("dense")["stage3_tokens"], rtol=1e-4, atol=1e-4)


def test_the_same_import_writes_the_same_bytes_whatever_was_drawn_before(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"model": ENCODER})
    before = torch.random.get_rng_state()

    first = imported(path, fresh_decoder_seed=SEED)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(100)
    again = imported(path, fresh_decoder_seed=SEED)
    other = imported(path, fresh_decoder_seed=SEED + 1)

    assert first.sha256 == again.sha256 != other.sha256
    assert consolidated.of_file(Storage(), other.url).metadata["fresh_decoder_seed"] == str(SEED + 1)


def test_a_run_can_start_from_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"model": ENCODER})
    done = imported(path, fresh_decoder_seed=SEED)
    fields = {f"model.{name}": getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    recipe = named_recipe("tiny").amended({**fields, "init_from": done.url})

    began = pinned(Storage(), recipe, RunDirectory.of(Storage(), str(tmp_path / "runs"), "first"))

    assert began.init_sha256 == done.sha256


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(WeightsFileError) as caught:
        imported(path, **options)
    assert not Path(f"{path}.out.safetensors").exists()
    return str(caught.value)


@pytest.mark.parametrize("state", [ENCODER, prefixed("module.", ENCODER), {**ENCODER, **HEAD}], ids=len)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_an_encoder_alone_is_refused_with_the_option_that_takes_it(kind: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    (save(path, {"model": state}) if kind == "pth" else safetensors(path, state))

    line = refused(path)

    count = len(OFFICIAL) - len(ENCODER)
    assert f"must have a decoder (it is an encoder alone, {count} tensors of pretraining are missing)" in line
    assert "--fresh-decoder" in line


def test_an_encoder_without_fusion_gets_that_too(tmp_path: Path) -> None:
    bare = {name: value for name, value in ENCODER.items() if not name.startswith(FUSION)}
    path = save(tmp_path / "a.pth", bare)

    assert "--fresh-decoder" in refused(path)
    assert "the fusion of stages, 4" in imported(path, fresh_decoder_seed=SEED).notes[-1]
    found = taken(path, fresh_decoder_seed=SEED)
    assert all(torch.equal(found[name], value) for name, value in bare.items())


@pytest.mark.parametrize("options", [{}, {"fresh_decoder_seed": SEED}], ids=["as it is", "fresh"])
def test_what_is_wrong_with_an_encoder_is_said_first(options: dict[str, int], tmp_path: Path) -> None:
    name = "norm.weight"
    without = {key: value for key, value in ENCODER.items() if key != name}
    half = {key: value for key, value in ENCODER.items() if key != "stage1_output_decode.bias"}

    assert "missing encoder.norm.weight" in refused(save(tmp_path / "a.pth", without), **options)
    assert "missing encoder.stage1_output_decode.bias" in refused(save(tmp_path / "b.pth", half), **options)
    misshapen = save(tmp_path / "c.pth", {**ENCODER, name: torch.zeros(3)})
    assert "encoder.norm.weight has shape (3,)" in refused(misshapen, **options)
    surplus = save(tmp_path / "d.pth", {**ENCODER, "neck.weight": torch.zeros(3)})
    assert "unexpected neck.weight" in refused(surplus, **options)


def test_a_file_of_part_of_a_decoder_is_damaged(tmp_path: Path) -> None:
    part = {name: value for name, value in OFFICIAL.items() if name != "decoder_norm.bias"}

    assert "missing decoder.decoder_norm.bias" in refused(save(tmp_path / "a.pth", part))


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_fine_tuned_classifier_is_called_that(prefix: str, tmp_path: Path) -> None:
    """As published: a norm of averaged patches in place of the encoder's, no fusion, and a head."""
    tuned = {name: value for name, value in ENCODER.items() if not name.startswith((*FUSION, "norm."))} | HEAD
    tuned |= {f"fc_norm.{part}": ENCODER[f"norm.{part}"] for part in ("weight", "bias")}

    for options in ({}, {"fresh_decoder_seed": SEED}):
        line = refused(save(tmp_path / "a.pth", {"model": prefixed(prefix, tuned)}), **options)
        assert "missing encoder.norm.weight" in line
        assert "this is a fine-tuned classifier: give the file of its pretraining" in line


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    both = {**OFFICIAL, **prefixed("module.")}

    assert "must hold each tensor once (" in refused(save(tmp_path / "a.pth", both))


def test_norms_of_another_decoder_are_not_taken_for_the_encoders(tmp_path: Path) -> None:
    state = {**{name: value for name, value in OFFICIAL.items() if name != "norm.weight"}}
    state["decoder.norm.weight"] = OFFICIAL["norm.weight"]

    line = refused(save(tmp_path / "a.pth", state))

    assert "missing encoder.norm.weight" in line and "unexpected decoder.norm.weight" in line


def test_heads_of_attention_are_compared_if_a_file_states_them(tmp_path: Path) -> None:
    other = ConvMAEConfig(num_heads=2)
    path = safetensors(tmp_path / "a.safetensors", ours(OFFICIAL), {"model": model_json(other)})

    assert "must be of a model with num_heads = 4, not 2" in refused(path, fresh_decoder_seed=SEED)


def test_the_command_says_what_it_did_in_a_line_each(tmp_path: Path) -> None:
    model = named_recipe("tiny").model
    torch.manual_seed(3)
    state = ConvMAE(model).official_state_dict()
    encoder = {name: value for name, value in state.items() if "decoder" not in name and name != "mask_token"}
    path = save(tmp_path / "a.pth", {"model": {**prefixed("module.", encoder), "module.head.bias": torch.zeros(2)}})
    words = ["import", str(path), str(tmp_path / "a.safetensors"), "--recipe", "tiny"]

    failed = CliRunner().invoke(app, words)
    ended = CliRunner().invoke(app, [*words, "--fresh-decoder", "seed=5"])

    assert failed.exit_code != 0
    assert ended.exit_code == 0, ended.output
    assert ended.output.splitlines()[:3] == [
        f"without their prefix module.: {len(encoder)} names",
        "skipped: 1 tensors of a head (module.head.bias)",
        f"fresh from seed 5: the decoder, {len(state) - len(encoder)} tensors",
    ]
    torch.manual_seed(5)
    fresh = ConvMAE(model).state_dict()["decoder.mask_token"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["decoder.mask_token"], fresh)


def test_official_weights_become_those_of_a_model_for_gray_images(tmp_path: Path) -> None:
    source, out = tmp_path / "official.pth", str(tmp_path / "gray.safetensors")
    torch.save({"model": OFFICIAL}, source)
    config = ConvMAEConfig(in_channels=1)

    import_weights(Storage(), str(source), out, config)

    weights = consolidated.of_file(Storage(), out)
    assert weights.config == config and weights.statistics == ((0.449,), (0.226,))
    embedding, prediction = OFFICIAL["patch_embed1.proj.weight"], OFFICIAL["decoder_pred.weight"]
    found = weights.tensors
    torch.testing.assert_close(found["encoder.patch_embed1.proj.weight"], embedding.sum(1, keepdim=True))
    expected = torch.stack([prediction[channel::3] for channel in range(3)]).mean(0)
    torch.testing.assert_close(found["decoder.decoder_pred.weight"], expected)
    ConvMAE(config).load_state_dict(dict(found), strict=True)


def test_our_own_file_becomes_gray_in_the_same_way(tmp_path: Path) -> None:
    source, out = tmp_path / "ours.safetensors", str(tmp_path / "gray.safetensors")
    model = ConvMAE(CONFIG)
    record = {"image_mean": "[0.5, 0.4, 0.3]", "image_std": "[0.3, 0.2, 0.1]"}
    save_file(model.state_dict(), source, metadata={"model": model_json(CONFIG), **record})

    import_weights(Storage(), str(source), out, ConvMAEConfig(in_channels=1))

    weights = consolidated.of_file(Storage(), out)
    assert weights.statistics == ((0.4,), (0.2,))
    expected = to_bands(model.state_dict(), 1)
    assert all(torch.equal(value, expected[name]) for name, value in weights.tensors.items())
