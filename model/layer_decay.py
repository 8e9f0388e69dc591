"""Layer-wise decay of the learning rate, as the official fine-tuning has it."""

from __future__ import annotations

from model.classifier import Classifier


def layer_scales(model: Classifier, decay: float) -> dict[str, float]:
    """The factor of each trained parameter's learning rate, by name.

    Layer 0 is all before stage 3: embeddings, positions, and the blocks of stages 1 and 2. Each block of stage 3 is a
    layer; what follows the last one has a factor of 1.

    Args:
        model: A classifier.
        decay: Factor from a layer to the one below, in (0, 1].

    Source: util/lr_decay.py of github.com/Alpha-VL/ConvMAE, and of github.com/facebookresearch/mae for plain ViTs.
    """
    blocks = "blocks3" if model.config.has_convolutions else "blocks"
    last = model.config.depth[2] + 1
    return {
        name: decay ** (last - _layer(name, blocks, last))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _layer(name: str, blocks: str, last: int) -> int:
    part, _, rest = name.partition(".")
    if part != "encoder":
        return last
    stage, _, place = rest.partition(".")
    return int(place.partition(".")[0]) + 1 if stage == blocks else 0
