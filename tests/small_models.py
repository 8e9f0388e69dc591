"""Small models of every kind for tests of the forward pass, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor

from model import ConvMAE, ConvMAEConfig

SMALL = {"image_size": (64, 96), "embed_dim": (8, 12, 16), "num_heads": 2, "decoder_dim": 16, "decoder_num_heads": 2}


def small(**changes: object) -> ConvMAEConfig:
    """A model of few channels whose images are not square."""
    return ConvMAEConfig(**{**SMALL, **changes})  # type: ignore[arg-type]


def batch(config: ConvMAEConfig, size: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and their noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, config.in_channels, *config.image_shape, generator=generator)
    return images, torch.rand(size, config.mask_patches, generator=generator)


def seeded(config: ConvMAEConfig, dense: bool = False) -> ConvMAE:
    """A model whose every parameter matters: fresh biases are zero, fresh norms one."""
    torch.manual_seed(0)
    model = ConvMAE(config, dense=dense)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
