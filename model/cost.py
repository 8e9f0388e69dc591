"""What one image costs, counted by hand from the configuration: parameters and multiply-adds of pretraining.

Counted are matrix products, convolutions and attention, two operations per multiply-add; norms, GELU and softmax are
not, as is usual. `tests/model/test_cost.py` holds these numbers against PyTorch's own counter, operation by operation.

Only visible tokens are counted, as only they are computed. The gradient of a depthwise kernel is computed as a matrix
product over a unit's surroundings (model/depthwise.py) and counted as such.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import CELL_PIXELS, PATCH_PIXELS, ConvMAEConfig


@dataclass(frozen=True)
class Flops:
    """Operations for one image, by part of the model."""

    stage1: int
    stage2: int
    stage3: int
    """With patch_embed4."""
    fusion: int
    decoder: int
    """With decoder_embed and the prediction head."""

    @property
    def total(self) -> int:
        """The whole model."""
        return self.stage1 + self.stage2 + self.stage3 + self.fusion + self.decoder


@dataclass(frozen=True)
class Cost:
    """Operations for one image."""

    forward: Flops
    backward: Flops
    """Gradients for inputs and weights: twice the forward, but for the first embedding, as pixels need no gradient."""

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward.total + self.backward.total


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    encoder: int
    """With the fusion convolutions; what is handed downstream."""
    decoder: int
    frozen: int
    """Fixed position embeddings, of both; counted in neither of the other two."""

    @property
    def trainable(self) -> int:
        """What the optimiser holds."""
        return self.encoder + self.decoder


def parameters(config: ConvMAEConfig) -> Parameters:
    """Count parameters without building the model."""
    dim1, dim2, dim3 = config.embed_dim
    pixels = CELL_PIXELS**2 * 3
    embeddings = sum(_dense(i, o) + 2 * o for i, o in ((pixels, dim1), (4 * dim1, dim2), (4 * dim2, dim3)))
    ratio1, ratio2, ratio3 = config.mlp_ratio
    depth1, depth2, depth3 = config.depth
    blocks = (
        depth1 * _conv_block(dim1, ratio1, config.kernel_size)
        + depth2 * _conv_block(dim2, ratio2, config.kernel_size)
        + depth3 * _transformer_block(dim3, ratio3)
    )
    fusion = _dense(16 * dim1, dim3) + _dense(4 * dim2, dim3) if config.fusion else 0
    position = config.patches * dim3
    learned = position if config.position == "learned" else 0
    dim = config.decoder_dim
    decoder = (
        _dense(dim3, dim)
        + dim  # mask token
        + config.decoder_depth * _transformer_block(dim, config.mlp_ratio[0])
        + 2 * dim
        + _dense(dim, PATCH_PIXELS**2 * 3)
    )
    return Parameters(
        encoder=embeddings + _dense(dim3, dim3) + blocks + fusion + 2 * dim3 + learned,
        decoder=decoder,
        frozen=position - learned + config.patches * dim,
    )


def flops_per_image(config: ConvMAEConfig) -> Cost:
    """Count the operations of pretraining on one image, forward and backward."""
    dim1, dim2, dim3 = config.embed_dim
    ratio1, ratio2, ratio3 = config.mlp_ratio
    depth1, depth2, depth3 = config.depth
    side1 = PATCH_PIXELS // CELL_PIXELS if config.masking == "block" else 1
    cells = config.kept * side1**2
    patches = config.kept if config.masking == "block" else config.patches
    predicted = config.patches - patches if config.masking == "block" else config.patches
    pixels = 2 * cells * CELL_PIXELS**2 * 3 * dim1
    forward = Flops(
        stage1=pixels + depth1 * _conv_block_flops(cells, dim1, ratio1, config.kernel_size),
        stage2=2 * 4 * patches * 4 * dim1 * dim2
        + depth2 * _conv_block_flops(4 * patches, dim2, ratio2, config.kernel_size),
        stage3=2 * patches * (4 * dim2 * dim3 + dim3**2) + depth3 * _transformer_flops(patches, dim3, ratio3),
        fusion=2 * patches * (16 * dim1 + 4 * dim2) * dim3 if config.fusion else 0,
        decoder=2 * patches * dim3 * config.decoder_dim
        + config.decoder_depth * _transformer_flops(config.patches, config.decoder_dim, config.mlp_ratio[0])
        + 2 * predicted * config.decoder_dim * PATCH_PIXELS**2 * 3,
    )
    backward = Flops(
        stage1=2 * forward.stage1 - pixels + depth1 * _kernel_gradient_flops(cells, dim1, side1, config.kernel_size),
        stage2=2 * forward.stage2 + depth2 * _kernel_gradient_flops(4 * patches, dim2, 2, config.kernel_size),
        stage3=2 * forward.stage3,
        fusion=2 * forward.fusion,
        decoder=2 * forward.decoder,
    )
    return Cost(forward, backward)


def _dense(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _conv_block(dim: int, ratio: int, kernel_size: int) -> int:
    norms = 2 * 2 * dim
    depthwise = (kernel_size**2 + 1) * dim
    return norms + 2 * _dense(dim, dim) + depthwise + _dense(dim, ratio * dim) + _dense(ratio * dim, dim)


def _transformer_block(dim: int, ratio: int) -> int:
    norms = 2 * 2 * dim
    return norms + _dense(dim, 3 * dim) + _dense(dim, dim) + _dense(dim, ratio * dim) + _dense(ratio * dim, dim)


def _conv_block_flops(tokens: int, dim: int, ratio: int, kernel_size: int) -> int:
    return 2 * tokens * ((2 + 2 * ratio) * dim + kernel_size**2) * dim


def _kernel_gradient_flops(tokens: int, dim: int, side: int, kernel_size: int) -> int:
    """What a depthwise kernel's gradient costs beyond the convolution: a token meets all its surroundings."""
    return 2 * tokens * dim * ((side + kernel_size - 1) ** 2 - kernel_size**2)


def _transformer_flops(tokens: int, dim: int, ratio: int) -> int:
    return 2 * tokens * (4 + 2 * ratio) * dim**2 + 2 * 2 * tokens**2 * dim
