"""Layer-wise decay of the learning rate, as the official fine-tuning has it."""

from __future__ import annotations

from torch import nn

from model.encoder import Encoder
from model.vit import ViTEncoder


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor of each trained parameter's learning rate, by name.

    Layer 0 is all before stage 3: embeddings, positions, and the blocks of stages 1 and 2. Each block of stage 3 is a
    layer; what follows the last one has a factor of 1.

    Args:
        model: A classifier, or any other module that has one of our encoders in it.
        decay: Factor from a layer to the one below, in (0, 1].

    Source: util/lr_decay.py of github.com/Alpha-VL/ConvMAE, and of github.com/facebookresearch/mae for plain ViTs.
    """
    (prefix, encoder), *others = (
        (f"{name}.", part) for name, part in model.named_modules() if isinstance(part, Encoder | ViTEncoder)
    )
    assert not others
    stage = "blocks3" if isinstance(encoder, Encoder) else "blocks"
    last = len(list(encoder.get_submodule(stage).children())) + 1
    return {
        name: decay ** (last - (_layer(name.removeprefix(prefix), stage) if name.startswith(prefix) else last))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _layer(name: str, blocks: str) -> int:
    stage, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) + 1 if stage == blocks else 0
