"""The model as the official code writes it: whole maps, multiplied by the mask inside each convolution block.

The sparse form is compared with this one, and whole images are encoded by it for downstream tasks. It reads the
parameters of encoders and decoders and has none of its own.

Letters: B images, C channels, H and W rows and columns of a stage's map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import ConvBlock, PatchEmbed, branches, drop_path, run
from model.decoder import Decoder
from model.encoder import Encoder
from model.masking import Mask
from model.position import interpolated
from model.vit import ViTEncoder


class Features(NamedTuple):
    """The pyramid of one batch."""

    stage1: Tensor
    """(B, C1, H/4, W/4)."""
    stage2: Tensor
    """(B, C2, H/8, W/8)."""
    stage3: Tensor
    """(B, C3, H/16, W/16), before the final norm, as the official detector takes it."""

    @property
    def pooled(self) -> Tensor:
        """(B, C3, H/32, W/32), rounded up: what a feature pyramid network takes as its coarsest level."""
        return functional.max_pool2d(self.stage3, 2, ceil_mode=True)


def features(encoder: Encoder, images: Tensor, noise: Tensor | None = None) -> Features:
    """Encode whole images.

    Args:
        encoder: With convolution stages.
        images: (B, in_channels, H, W), of any size that is a multiple of 16.
        noise: (B, blocks, 2) in [0, 1) for stochastic depth; None: from PyTorch's generator, where there is any.
    """
    noises = _of_blocks(noise)
    x1 = _stage1(encoder, images, None, noises)
    x2 = _stage2(encoder, x1, None, noises)
    x3 = _stage3_input(encoder, x2)
    for block in encoder.blocks3:
        x3 = run(block, x3, None, next(noises), recompute="stage3" in encoder.recompute)
    return Features(x1, x2, x3.mT.reshape(*x3.mT.shape[:2], *(side // 2 for side in x2.shape[2:])))


def last_tokens(encoder: Encoder | ViTEncoder, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """(B, L, C): patches after the last block, before the final norm; of whole images, as ``features``.

    Without the class token, where there is one: both official fine-tunings leave it out of their mean.
    """
    if isinstance(encoder, ViTEncoder):
        return _vit_tokens(encoder, images, None, noise)[:, 1:]
    return features(encoder, images, noise).stage3.flatten(2).mT


def encode(encoder: Encoder | ViTEncoder, images: Tensor, mask: Mask) -> Tensor:
    """The result of ``encoder(images, mask.kept)``, computed for all patches."""
    return _encode(encoder, images, mask) if isinstance(encoder, Encoder) else _encode_vit(encoder, images, mask)


def decode(decoder: Decoder, latent: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
    """The result of ``decoder(latent, visible, None, grid)``, each block computed for all tokens of all images."""
    ahead, position = decoder.class_tokens, decoder.position(grid)
    places = functional.pad(visible + ahead, (ahead, 0))[..., None]
    x = decoder.decoder_embed(latent)
    hidden = decoder.mask_token.to(x.dtype).expand(x.shape[0], position.shape[1], -1)
    x = hidden.scatter(1, places.expand_as(x), x) + position
    for block in decoder.decoder_blocks:
        x = block(x)
    prediction: Tensor = decoder.decoder_pred(decoder.decoder_norm(x))
    return prediction[:, ahead:]


def _encode(encoder: Encoder, images: Tensor, mask: Mask) -> Tensor:
    units = (side // encoder.config.mask_pixels for side in images.shape[2:])
    visible = (1 - mask.mask).to(images.dtype).view(-1, 1, *units)
    if encoder.config.masking == "block":
        visible1, visible2 = (functional.interpolate(visible, scale_factor=scale) for scale in (4, 2))
        x1 = _stage1(encoder, images, visible1, _of_blocks(None))
        x2 = _stage2(encoder, x1, visible2, _of_blocks(None))
    else:
        x1 = _stage1(encoder, images, visible, _of_blocks(None)) * visible
        x2 = _stage2(encoder, x1, None, _of_blocks(None))
    tokens = [_stage3_input(encoder, x2)]
    if encoder.config.fusion:
        fusions = ((encoder.stage1_output_decode, x1), (encoder.stage2_output_decode, x2))
        tokens += [_convolve(fuse, x).flatten(2).transpose(1, 2) for fuse, x in fusions]
    if encoder.config.masking == "block":
        tokens = [x.take_along_dim(mask.kept[..., None], dim=1) for x in tokens]
    x3, *fused = tokens
    for block in encoder.blocks3:
        x3 = block(x3)
    for x in fused:
        x3 = x3 + x
    out: Tensor = encoder.norm(x3)
    return out


def _encode_vit(encoder: ViTEncoder, images: Tensor, mask: Mask) -> Tensor:
    out: Tensor = encoder.norm(_vit_tokens(encoder, images, mask.kept))
    return out


def _vit_tokens(encoder: ViTEncoder, images: Tensor, kept: Tensor | None, noise: Tensor | None = None) -> Tensor:
    """(B, 1 + K, C) before the final norm, the class token first; every patch where ``kept`` is None."""
    maps = _convolve(encoder.patch_embed.proj, images)
    position = interpolated(encoder.pos_embed, encoder.grid, (maps.shape[2], maps.shape[3]), class_tokens=1)
    x = maps.flatten(2).transpose(1, 2) + position[:, 1:]
    if kept is not None:
        x = x.take_along_dim(kept[..., None], dim=1)
    first = (encoder.cls_token + position[:, :1]).to(x.dtype)
    x = torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)
    for block, of_block in zip(encoder.blocks, _of_blocks(noise), strict=False):
        x = run(block, x, None, of_block, recompute=encoder.recompute)
    return x


_Noises = Iterator[Tensor | None]
"""(B, 2) of each block in turn; None: none is given."""


def _of_blocks(noise: Tensor | None) -> _Noises:
    return itertools.repeat(None) if noise is None else iter(noise.unbind(1))


def _stage1(encoder: Encoder, images: Tensor, visible: Tensor | None, noises: _Noises) -> Tensor:
    return _stage(
        encoder.patch_embed1, encoder.blocks1, images, visible, noises, recompute="stage1" in encoder.recompute
    )


def _stage2(encoder: Encoder, x1: Tensor, visible: Tensor | None, noises: _Noises) -> Tensor:
    recompute = "stage2" in encoder.recompute
    return _stage(encoder.patch_embed2, encoder.blocks2, x1, visible, noises, recompute=recompute)


def _stage(
    embed: PatchEmbed, blocks: nn.ModuleList, x: Tensor, visible: Tensor | None, noises: _Noises, *, recompute: bool
) -> Tensor:
    x = _embed(embed, x)
    for block in blocks:
        assert isinstance(block, ConvBlock)
        x = run(partial(_block, block), x, visible, next(noises), recompute=recompute)
    return x


def _stage3_input(encoder: Encoder, x2: Tensor) -> Tensor:
    x = _embed(encoder.patch_embed3, x2)
    position = interpolated(encoder.pos_embed, encoder.config.grid, (x.shape[2], x.shape[3]))
    out: Tensor = encoder.patch_embed4(x.flatten(2).transpose(1, 2)) + position
    return out


def _embed(embed: PatchEmbed, x: Tensor) -> Tensor:
    return functional.gelu(_norm(embed.norm, _convolve(embed.proj, x)))


def _block(block: ConvBlock, x: Tensor, visible: Tensor | None, noise: Tensor | None) -> Tensor:
    first, second = branches(noise)
    y = _convolve(block.conv1, _norm(block.norm1, x))
    y = _depthwise(block.attn, y if visible is None else visible * y)
    x = x + drop_path(_convolve(block.conv2, y), block.drop_path, block.training, first)
    y = _convolve(block.mlp.fc1, _norm(block.norm2, x))
    return x + drop_path(_convolve(block.mlp.fc2, functional.gelu(y)), block.drop_path, block.training, second)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return functional.conv2d(x, conv.weight, conv.bias, stride=conv.stride)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W)."""
    out: Tensor = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return out


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    padding = conv.kernel_size[0] // 2
    return functional.conv2d(x, conv.weight, conv.bias, padding=padding, groups=conv.groups)
