"""The model on the device: the official code's values in fp32, and noise that is the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import ConvMAE, ConvMAEConfig, PooledEncoder, mask_noise

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden(device: torch.device) -> dict[str, Tensor]:
    files = ("convmae_tiny_inputs.safetensors", "convmae_tiny_outputs.safetensors")
    return {name: value.to(device) for file in files for name, value in load_file(GOLDEN / file).items()}


def official_weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight."): value for name, value in golden.items() if name.startswith("weight.")}


@pytest.fixture(autouse=True)
def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 as such, not TF32."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")


@pytest.mark.parametrize("dense", [False, True])
def test_loss_mask_and_gradients_are_those_of_the_official_code(
    golden: dict[str, Tensor], device: torch.device, dense: bool
) -> None:
    model = ConvMAE(ConvMAEConfig(), dense=dense)
    model.load_official(official_weights(golden))
    model.to(device)

    out = model(golden["input.imgs"], noise=golden["input.noise"])
    out.loss.backward()

    assert out.loss.item() == pytest.approx(golden["out.loss_mse_normpix"].item(), rel=1e-5)
    assert torch.equal(out.mask, golden["out.mask"])
    found = {name.split(".", 1)[1]: value for name, value in gradients(model).items()}
    expected = {name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")}
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert max(errors.values()) < 1e-4, errors


def test_four_views_have_the_loss_masks_and_gradients_of_the_official_code(device: torch.device) -> None:
    files = ("fastconvmae_tiny_inputs.safetensors", "fastconvmae_tiny_outputs.safetensors")
    golden = {name: value.to(device) for file in files for name, value in load_file(GOLDEN / file).items()}
    model = ConvMAE(ConvMAEConfig(views=4, decoder_depth=8))
    model.load_official(official_weights(golden))
    model.to(device)

    out = model(golden["input.imgs"], noise=golden["input.noise"])
    out.loss.backward()

    assert out.loss.item() == pytest.approx(golden["out.loss_mse_normpix"].item(), rel=1e-5)
    assert torch.equal(out.mask.view(2, 4, 196), golden["out.mask"].view(4, 2, 196).transpose(0, 1))
    found = {name.split(".", 1)[1]: value for name, value in gradients(model).items()}
    errors = {
        name: float((found[name] - golden[f"grad.{name}"]).norm() / golden[f"grad.{name}"].norm()) for name in found
    }
    assert len(errors) == sum(name.startswith("grad.") for name in golden)
    assert max(errors.values()) < 1e-4, errors


def test_noise_is_that_of_the_cpu_bit_by_bit(device: torch.device) -> None:
    ids = torch.tensor([0, 7, 2**40 + 1])

    found = mask_noise(2**63 + 5, 3, ids.to(device), 197, device)

    assert torch.equal(found.cpu(), mask_noise(2**63 + 5, 3, ids, 197, "cpu"))


def test_features_are_the_official_tokens_pooled_and_the_same_bits_each_time(
    golden: dict[str, Tensor], device: torch.device
) -> None:
    encoder = PooledEncoder(ConvMAEConfig())
    encoder.load(official_weights(golden))
    encoder.to(device)

    with torch.no_grad():
        found, again = (encoder(golden["input.imgs"]) for _ in range(2))

    mean = golden["dense.stage3_tokens"].mean(1)
    expected = torch.nn.functional.layer_norm(mean, mean.shape[1:], eps=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, again)


def gradients(model: ConvMAE) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def relative_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    errors = torch.stack([(found[name] - value).norm() for name, value in reference.items()])
    return float(errors.norm() / torch.stack([value.norm() for value in reference.values()]).norm())


def test_bf16_errs_as_the_official_pattern_does(golden: dict[str, Tensor], device: torch.device) -> None:
    """Autocast over fp32 weights; the dense reference computes what the official code does, where it does."""

    def computed(*, dense: bool, half: bool) -> ConvMAE:
        model = ConvMAE(ConvMAEConfig(), dense=dense)
        model.load_official(official_weights(golden))
        model.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(golden["input.imgs"], noise=golden["input.noise"]).loss
        loss.backward()
        return model

    exact = gradients(computed(dense=True, half=False))
    official, ours = (computed(dense=dense, half=True) for dense in (True, False))

    assert {value.dtype for value in (*ours.parameters(), *gradients(ours).values())} == {torch.float32}
    theirs = relative_error(gradients(official), exact)
    assert 1e-4 < theirs < 0.1, "else this compares nothing"
    assert relative_error(gradients(ours), exact) < 1.5 * theirs
