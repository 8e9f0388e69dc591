"""The cost of pretraining, counted by hand from the configuration: parameters, and multiply-adds of a micro-batch.

Counted are matrix products, convolutions and attention, two operations per multiply-add; norms, GELU and softmax are
not, as is usual. `tests/model/test_cost.py` compares these numbers with PyTorch's own counter, operation by operation.

Counted is what is computed: visible tokens alone in the encoder, queries, keys and values of mask tokens once for a
micro-batch, the end of the last block for predicted patches. The gradient of a depthwise kernel is computed as a
matrix product over a unit's surroundings (model/depthwise.py) and counted as such.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import CELL_PIXELS, PATCH_PIXELS, ConvMAEConfig

_PATCH_VALUES = PATCH_PIXELS**2 * 3


@dataclass(frozen=True)
class Flops:
    """Operations by part of the model."""

    stage1: int
    stage2: int
    stage3: int
    """With patch_embed4; of an MAE, with its patch embedding."""
    fusion: int
    decoder: int
    """With decoder_embed and the prediction head."""

    @property
    def total(self) -> int:
        """The whole model."""
        return self.stage1 + self.stage2 + self.stage3 + self.fusion + self.decoder


@dataclass(frozen=True)
class Cost:
    """Operations for one micro-batch."""

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
        """Parameters that the optimiser holds."""
        return self.encoder + self.decoder


def parameters(config: ConvMAEConfig) -> Parameters:
    """Count parameters without building the model."""
    dim3 = config.embed_dim[2]
    transformer = config.depth[2] * _transformer_block(dim3, config.mlp_ratio[2]) + 2 * dim3
    before = _convolution_stages(config) if config.has_convolutions else _dense(_PATCH_VALUES, dim3) + dim3
    tokens = config.class_tokens + config.patches
    position = tokens * dim3
    learned = position if config.position == "learned" else 0
    dim = config.decoder_dim
    decoder = (
        _dense(dim3, dim)
        + dim  # mask token
        + config.decoder_depth * _transformer_block(dim, config.mlp_ratio[0])
        + 2 * dim
        + _dense(dim, _PATCH_VALUES)
    )
    return Parameters(encoder=before + transformer + learned, decoder=decoder, frozen=position - learned + tokens * dim)


def flops(config: ConvMAEConfig, images: int) -> Cost:
    """Count the operations of pretraining on a micro-batch, forward and backward.

    Args:
        config: The model's.
        images: In the micro-batch.
    """
    if not config.has_convolutions:
        return _mae_flops(config, images)
    dim1, dim2, dim3 = config.embed_dim
    ratio1, ratio2, ratio3 = config.mlp_ratio
    depth1, depth2, depth3 = config.depth
    side1 = PATCH_PIXELS // CELL_PIXELS if config.masking == "block" else 1
    cells = images * config.kept * side1**2
    kept = config.kept if config.masking == "block" else config.patches
    patches = images * kept
    pixels = 2 * cells * CELL_PIXELS**2 * 3 * dim1
    forward = Flops(
        stage1=pixels + depth1 * _conv_block_flops(cells, dim1, ratio1, config.kernel_size),
        stage2=2 * 4 * patches * 4 * dim1 * dim2
        + depth2 * _conv_block_flops(4 * patches, dim2, ratio2, config.kernel_size),
        stage3=2 * patches * (4 * dim2 * dim3 + dim3**2) + images * depth3 * _transformer_flops(kept, dim3, ratio3),
        fusion=2 * patches * (16 * dim1 + 4 * dim2) * dim3 if config.fusion else 0,
        decoder=_decoder_flops(config, images, kept),
    )
    backward = Flops(
        stage1=2 * forward.stage1 - pixels + depth1 * _kernel_gradient_flops(cells, dim1, side1, config.kernel_size),
        stage2=2 * forward.stage2 + depth2 * _kernel_gradient_flops(4 * patches, dim2, 2, config.kernel_size),
        stage3=2 * forward.stage3,
        fusion=2 * forward.fusion,
        decoder=2 * forward.decoder,
    )
    return Cost(forward, backward)


def _mae_flops(config: ConvMAEConfig, images: int) -> Cost:
    dim, tokens = config.embed_dim[2], config.kept + 1
    pixels = 2 * images * config.kept * _PATCH_VALUES * dim
    blocks = images * config.depth[2] * _transformer_flops(tokens, dim, config.mlp_ratio[2])
    decoder = _decoder_flops(config, images, tokens)
    forward = Flops(0, 0, pixels + blocks, 0, decoder)
    return Cost(forward, Flops(0, 0, pixels + 2 * blocks, 0, 2 * decoder))


def _decoder_flops(config: ConvMAEConfig, images: int, seen: int) -> int:
    """`seen` tokens of an image come from the encoder."""
    dim, ratio, depth = config.decoder_dim, config.mlp_ratio[0], config.decoder_depth
    tokens = config.class_tokens + config.patches
    predicted = config.patches - config.kept if config.masking == "block" else config.patches
    embedded = 2 * images * seen * config.embed_dim[2] * dim
    first = _qkv_flops(tokens + images * seen, dim) + images * _mix_flops(tokens, tokens, dim, ratio)
    whole = images * _transformer_flops(tokens, dim, ratio)
    spared = images * (_mix_flops(tokens, tokens, dim, ratio) - _mix_flops(predicted, tokens, dim, ratio))
    return embedded + first + (depth - 1) * whole - spared + 2 * images * predicted * dim * _PATCH_VALUES


def _dense(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _convolution_stages(config: ConvMAEConfig) -> int:
    """Operations of stages 1 and 2, all embeddings, and fusion."""
    dim1, dim2, dim3 = config.embed_dim
    pixels = CELL_PIXELS**2 * 3
    embeddings = sum(_dense(i, o) + 2 * o for i, o in ((pixels, dim1), (4 * dim1, dim2), (4 * dim2, dim3)))
    blocks = sum(
        config.depth[stage] * _conv_block(config.embed_dim[stage], config.mlp_ratio[stage], config.kernel_size)
        for stage in (0, 1)
    )
    fusion = _dense(16 * dim1, dim3) + _dense(4 * dim2, dim3) if config.fusion else 0
    return embeddings + _dense(dim3, dim3) + blocks + fusion


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
    """Cost of a depthwise kernel's gradient beyond the convolution: a token meets all its surroundings."""
    return 2 * tokens * dim * ((side + kernel_size - 1) ** 2 - kernel_size**2)


def _transformer_flops(tokens: int, dim: int, ratio: int) -> int:
    return _qkv_flops(tokens, dim) + _mix_flops(tokens, tokens, dim, ratio)


def _qkv_flops(tokens: int, dim: int) -> int:
    return 2 * tokens * 3 * dim**2


def _mix_flops(wanted: int, tokens: int, dim: int, ratio: int) -> int:
    """All of a block but queries, keys and values, for the wanted ones of an image's tokens."""
    return 2 * wanted * (1 + 2 * ratio) * dim**2 + 2 * 2 * wanted * tokens * dim
