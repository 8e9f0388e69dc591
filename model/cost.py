"""The cost of training, counted by hand from the configuration: parameters, and multiply-adds of a micro-batch.

Counted are matrix products, convolutions and attention, two operations per multiply-add; norms, GELU and softmax are
not, as is usual. `tests/model/test_cost.py` compares these numbers with PyTorch's own counter, operation by operation.

Counted is what is computed. In pretraining: visible tokens alone in the encoder, queries, keys and values of mask
tokens once for a micro-batch, the end of the last block for predicted patches. The gradient of a depthwise kernel is
computed as a matrix product over a unit's surroundings (model/depthwise.py) and counted as such. A classifier computes
whole images, by convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.config import CELL_PIXELS, PATCH_PIXELS, ConvMAEConfig


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
    head: int = 0
    """Of a classifier, which has neither fusion nor decoder."""

    @property
    def total(self) -> int:
        """The whole model."""
        return self.stage1 + self.stage2 + self.stage3 + self.fusion + self.decoder + self.head


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
    """With the fusion convolutions, or a classifier's norm; what is handed downstream."""
    decoder: int
    frozen: int
    """Fixed position embeddings, of both, or all before a linear head; counted in none of the others."""
    head: int = 0
    """Of a classifier, which has no decoder."""

    @property
    def trainable(self) -> int:
        """Parameters that the optimiser holds."""
        return self.encoder + self.decoder + self.head


def parameters(config: ConvMAEConfig) -> Parameters:
    """Count parameters without building the model."""
    dim3 = config.embed_dim[2]
    transformer = config.depth[2] * _transformer_block(dim3, config.mlp_ratio[2]) + 2 * dim3
    before = _convolution_stages(config) if config.has_convolutions else _dense(config.patch_values, dim3) + dim3
    tokens = config.class_tokens + config.patches
    position = tokens * dim3
    learned = position if config.position == "learned" else 0
    dim = config.decoder_dim
    decoder = (
        _dense(dim3, dim)
        + dim  # mask token
        + config.decoder_depth * _transformer_block(dim, config.mlp_ratio[0])
        + 2 * dim
        + _dense(dim, config.patch_values)
    )
    return Parameters(encoder=before + transformer + learned, decoder=decoder, frozen=position - learned + tokens * dim)


def flops(config: ConvMAEConfig, images: int) -> Cost:
    """Count the operations of pretraining on a micro-batch, forward and backward.

    Args:
        config: The model's.
        images: In the micro-batch, each masked ``config.views`` times.
    """
    images *= config.views  # views share no operation that is counted: each patch is embedded where it is visible
    if not config.has_convolutions:
        return _mae_flops(config, images)
    dim1, dim2, dim3 = config.embed_dim
    side1 = PATCH_PIXELS // CELL_PIXELS if config.masking == "block" else 1
    cells = images * config.kept * side1**2
    kept = config.kept if config.masking == "block" else config.patches
    patches = images * kept
    forward = replace(
        _stage_flops(config, images, cells, kept),
        fusion=2 * patches * (16 * dim1 + 4 * dim2) * dim3 if config.fusion else 0,
        decoder=_decoder_flops(config, images, kept),
    )
    backward = Flops(
        stage1=2 * forward.stage1
        - _pixel_flops(config, cells)
        + config.depth[0] * _kernel_gradient_flops(cells, dim1, side1, config.kernel_size),
        stage2=2 * forward.stage2 + config.depth[1] * _kernel_gradient_flops(4 * patches, dim2, 2, config.kernel_size),
        stage3=2 * forward.stage3,
        fusion=2 * forward.fusion,
        decoder=2 * forward.decoder,
    )
    return Cost(forward, backward)


def classifier_parameters(config: ConvMAEConfig, classes: int, kind: str) -> Parameters:
    """Count those of a classifier without building it; arguments as of ``Classifier``."""
    dim = config.embed_dim[2]
    before = parameters(replace(config, fusion=False))  # the last norm of the one is as large as that of the other
    positions = (config.class_tokens + config.patches) * dim if config.position == "sincos" else 0
    unused = (config.class_tokens + config.patches) * dim if config.position == "none" else 0
    encoder, head = before.encoder + positions, _dense(dim, classes)
    if kind == "linear":
        return Parameters(encoder=0, decoder=0, frozen=encoder + unused, head=head)
    return Parameters(encoder=encoder, decoder=0, frozen=unused, head=head)


def classifier_flops(config: ConvMAEConfig, images: int, classes: int, kind: str) -> Cost:
    """Count the operations of fine-tuning on a micro-batch, forward and backward.

    Args:
        config: The model's.
        images: In the micro-batch.
        classes: Outputs of the head.
        kind: As of ``Classifier``; with ``linear`` there are gradients of the head's weights alone.
    """
    head = 2 * images * config.embed_dim[2] * classes
    if config.has_convolutions:
        cells = images * config.patches * (PATCH_PIXELS // CELL_PIXELS) ** 2
        stages, pixels = _stage_flops(config, images, cells, config.patches), _pixel_flops(config, cells)
        stage1, stage3 = 2 * stages.stage1 - pixels, 2 * stages.stage3
    else:
        stages, pixels = _vit_flops(config, images, config.patches)
        stage1, stage3 = 0, 2 * stages.stage3 - pixels
    forward = replace(stages, head=head)
    if kind == "linear":
        return Cost(forward, Flops(0, 0, 0, 0, 0, head=head))
    return Cost(forward, Flops(stage1, 2 * stages.stage2, stage3, 0, 0, head=2 * head))


def _stage_flops(config: ConvMAEConfig, images: int, cells: int, kept: int) -> Flops:
    """The three stages forward, over all `cells` and over `kept` patches of each image."""
    dim1, dim2, dim3 = config.embed_dim
    ratio1, ratio2, ratio3 = config.mlp_ratio
    depth1, depth2, depth3 = config.depth
    patches = images * kept
    return Flops(
        stage1=_pixel_flops(config, cells) + depth1 * _conv_block_flops(cells, dim1, ratio1, config.kernel_size),
        stage2=2 * 4 * patches * 4 * dim1 * dim2
        + depth2 * _conv_block_flops(4 * patches, dim2, ratio2, config.kernel_size),
        stage3=2 * patches * (4 * dim2 * dim3 + dim3**2) + images * depth3 * _transformer_flops(kept, dim3, ratio3),
        fusion=0,
        decoder=0,
    )


def _pixel_flops(config: ConvMAEConfig, cells: int) -> int:
    """The first embedding, whose input needs no gradient."""
    return 2 * cells * CELL_PIXELS**2 * config.in_channels * config.embed_dim[0]


def _vit_flops(config: ConvMAEConfig, images: int, kept: int) -> tuple[Flops, int]:
    """An MAE's encoder over `kept` patches of each image, and of that the embedding, whose input needs no gradient."""
    dim = config.embed_dim[2]
    pixels = 2 * images * kept * config.patch_values * dim
    blocks = images * config.depth[2] * _transformer_flops(kept + 1, dim, config.mlp_ratio[2])
    return Flops(0, 0, pixels + blocks, 0, 0), pixels


def _mae_flops(config: ConvMAEConfig, images: int) -> Cost:
    stages, pixels = _vit_flops(config, images, config.kept)
    decoder = _decoder_flops(config, images, config.kept + 1)
    forward = replace(stages, decoder=decoder)
    return Cost(forward, Flops(0, 0, 2 * stages.stage3 - pixels, 0, 2 * decoder))


def _decoder_flops(config: ConvMAEConfig, images: int, seen: int) -> int:
    """`seen` tokens of an image come from the encoder."""
    dim, ratio, depth = config.decoder_dim, config.mlp_ratio[0], config.decoder_depth
    tokens = config.class_tokens + config.patches
    predicted = config.patches - config.kept if config.masking == "block" else config.patches
    embedded = 2 * images * seen * config.embed_dim[2] * dim
    first = _qkv_flops(tokens + images * seen, dim) + images * _mix_flops(tokens, tokens, dim, ratio)
    whole = images * _transformer_flops(tokens, dim, ratio)
    spared = images * (_mix_flops(tokens, tokens, dim, ratio) - _mix_flops(predicted, tokens, dim, ratio))
    return embedded + first + (depth - 1) * whole - spared + 2 * images * predicted * dim * config.patch_values


def _dense(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _convolution_stages(config: ConvMAEConfig) -> int:
    """Operations of stages 1 and 2, all embeddings, and fusion."""
    dim1, dim2, dim3 = config.embed_dim
    pixels = CELL_PIXELS**2 * config.in_channels
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
