from __future__ import annotations

import pytest
import torch
from model_traffic import convolution_backward_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Classifier, ConvMAE, ConvMAEConfig
from model.config import PRESETS
from model.cost import classifier_flops, classifier_parameters, flops, parameters

CONFIGS = [
    ConvMAEConfig(),
    ConvMAEConfig(image_size=(64, 96), mask_ratio=0.6, kernel_size=7, depth=(2, 2, 3), mlp_ratio=(8, 8, 4)),
    ConvMAEConfig(fusion=False, image_size=128, position="learned", decoder_dim=64),
    ConvMAEConfig(masking="random", image_size=96, position="none"),
    ConvMAEConfig.preset("tiny"),
    ConvMAEConfig.preset("base"),
    ConvMAEConfig.preset("mae_base"),
    ConvMAEConfig(embed_dim=(0, 0, 32), depth=(0, 0, 2), fusion=False, image_size=(64, 96), decoder_depth=1),
    ConvMAEConfig(views=4),
    ConvMAEConfig(in_channels=1),
    ConvMAEConfig(in_channels=5, embed_dim=(0, 0, 32), depth=(0, 0, 2), fusion=False, image_size=64),
    ConvMAEConfig(views=3, mask_ratio=2 / 3, masking="random", image_size=96),
    ConvMAEConfig(views=2, mask_ratio=0.5, embed_dim=(0, 0, 32), depth=(0, 0, 2), fusion=False, image_size=64),
]


def counted(config: ConvMAEConfig, size: int) -> tuple[dict[str, int], int]:
    """Per module forward, and in total forward and backward, by PyTorch's counter on tensors without values."""
    with torch.device("meta"):
        model = ConvMAE(config)
        images, noise = (
            torch.empty(size, config.in_channels, *config.image_shape),
            torch.empty(size, config.mask_patches),
        )
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        loss = model(images, noise=noise).loss
        forward = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        loss.backward()
    return forward, counter.get_total_flops()


def of_modules(forward: dict[str, int], *prefixes: str) -> int:
    """Flops of direct children of encoder or decoder; deeper modules are already in them, blocks are lists without."""
    wanted = 0
    for name, count in forward.items():
        part, _, child = name.removeprefix("ConvMAE.").partition(".")
        is_block = child.count(".") == 1 and "blocks" in child
        if part in ("encoder", "decoder") and child.split(".")[0] in prefixes and ("." not in child or is_block):
            wanted += count
    return wanted


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.embed_dim[2]}-{config.masking}")
def test_flops_are_exactly_those_that_pytorch_counts(config: ConvMAEConfig) -> None:
    size = 3
    cost = flops(config, size)

    forward, total = counted(config, size)

    assert of_modules(forward, "patch_embed1", "blocks1") == cost.forward.stage1
    assert of_modules(forward, "patch_embed2", "blocks2") == cost.forward.stage2
    assert (
        of_modules(forward, "patch_embed", "patch_embed3", "patch_embed4", "blocks3", "blocks") == cost.forward.stage3
    )
    assert of_modules(forward, "stage1_output_decode", "stage2_output_decode") == cost.forward.fusion
    assert forward["ConvMAE.decoder"] == cost.forward.decoder
    assert forward["Global"] == cost.forward.total
    assert total == cost.training


def test_views_cost_what_as_many_masked_images_cost() -> None:
    one, four = (ConvMAEConfig.preset("base", views=views) for views in (1, 4))

    assert flops(four, 16) == flops(one, 64)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"fusion": False, "position": "learned", "kernel_size": 9}], ids=str)
def test_parameters_are_those_of_the_model(name: str, changes: dict[str, object]) -> None:
    config = ConvMAEConfig.preset(name, **changes)
    with torch.device("meta"):
        model = ConvMAE(config)

    count = parameters(config)

    def size_of(module: torch.nn.Module, trainable: bool) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad == trainable)

    assert count.encoder == size_of(model.encoder, True)
    assert count.decoder == size_of(model.decoder, True)
    assert count.frozen == size_of(model, False)
    assert count.trainable == count.encoder + count.decoder


def test_masked_patches_cost_nothing_in_the_convolution_stages() -> None:
    sparse, nearly_dense = (ConvMAEConfig.preset("base", mask_ratio=ratio) for ratio in (0.75, 0.006))
    kept_fraction = sparse.kept / nearly_dense.kept

    few, many = flops(sparse, 1), flops(nearly_dense, 1)

    assert sparse.kept * 4 == sparse.patches
    for name in ("stage1", "stage2", "fusion"):
        for direction in ("forward", "backward"):
            cost, whole = (getattr(getattr(of, direction), name) for of in (few, many))
            assert cost == pytest.approx(whole * kept_fraction)


@pytest.mark.parametrize("kind", ["full", "linear"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.embed_dim[2]}-{config.masking}")
def test_a_classifiers_flops_and_parameters_are_those_that_pytorch_counts(config: ConvMAEConfig, kind: str) -> None:
    size, classes = 3, 7
    with torch.device("meta"):
        model, images = (
            Classifier(config, classes, kind=kind),
            torch.empty(size, config.in_channels, *config.image_shape),
        )
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        logits = model.train()(images)
        forward = counter.get_total_flops()
        logits.sum().backward()

    cost, count = classifier_flops(config, size, classes, kind), classifier_parameters(config, classes, kind)

    assert cost.forward.total == forward
    assert cost.training == counter.get_total_flops()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    assert count.trainable == sum(size for size, is_trained in sizes if is_trained)
    assert count.frozen == sum(size for size, is_trained in sizes if not is_trained)
