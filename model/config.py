"""The shape of one ConvMAE, checked where it is built: a configuration that exists can be trained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from model.errors import ModelConfigError

PATCH_PIXELS = 16
"""Side of a patch: the strides 4, 2 and 2 of the three embeddings."""
CELL_PIXELS = 4
"""Side of a cell, the stage-1 token."""

MASKINGS = ("block", "random")
POSITIONS = ("sincos", "learned", "none")
LOSSES = ("l1", "mse")
ENCODER_FIELDS = ("embed_dim", "depth", "num_heads", "mlp_ratio", "kernel_size", "position")
"""Those that, but for the image size, decide what an encoder computes."""
PARTS = ("stage1", "stage2", "stage3", "decoder")
"""Of a model, in the order of the forward pass; MAE has the last two."""

# Far beyond every published model. They are there for configurations that come with a file of others, or with a typing
# error: building such a model, even without memory for its parameters, would not come to an end.
_MOST = {
    "image_size": 16384, "embed_dim": 65536, "depth": 1000, "num_heads": 1024, "mlp_ratio": 256, "decoder_dim": 65536,
    "decoder_depth": 1000, "decoder_num_heads": 1024, "kernel_size": 255, "in_channels": 64,
}  # fmt: skip

_DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
# `base` and the decoder: convmae_convvit_base_patch16_dec512d8b in models_convmae.py of github.com/Alpha-VL/ConvMAE;
# `small`, `large`, `huge`: the other variants of Gao et al. 2022, arXiv:2205.03892. `tiny` is ours. `mae_base`, the
# baseline: mae_vit_base_patch16_dec512d8b in models_mae.py of github.com/facebookresearch/mae.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "image_size": 128, "embed_dim": (48, 96, 192), "depth": (1, 1, 4), "num_heads": 3, "mlp_ratio": (4, 4, 4),
        "decoder_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3,
    },
    "small": {"embed_dim": (128, 256, 384), "depth": (2, 2, 11), "num_heads": 6, "mlp_ratio": (4, 4, 4), **_DECODER},
    "base": {"embed_dim": (256, 384, 768), "depth": (2, 2, 11), "num_heads": 12, "mlp_ratio": (4, 4, 4), **_DECODER},
    "large": {"embed_dim": (384, 768, 1024), "depth": (2, 2, 23), "num_heads": 16, "mlp_ratio": (8, 8, 4), **_DECODER},
    "huge": {"embed_dim": (768, 1024, 1280), "depth": (2, 2, 31), "num_heads": 16, "mlp_ratio": (8, 8, 4), **_DECODER},
    "mae_base": {
        "embed_dim": (0, 0, 768), "depth": (0, 0, 12), "num_heads": 12, "mlp_ratio": (4, 4, 4), "fusion": False,
        **_DECODER,
    },
}  # fmt: skip


@dataclass(frozen=True)
class ConvMAEConfig:
    """Everything that decides the parameters, the mask and the loss of a ConvMAE.

    With no convolution stages, ``embed_dim=(0, 0, C)`` and ``depth=(0, 0, n)``, it is the MAE that the paper compares
    with: a plain ViT with a class token. Sizes have an upper bound (``_MOST``), far beyond every published model.

    Raises:
        ModelConfigError: If a value is of the wrong type, or no such model can exist.
    """

    image_size: int | tuple[int, int] = 224
    """Pixels, one number or (height, width); multiples of 16, at most 16384. A number is stored as the pair."""
    embed_dim: tuple[int, int, int] = (16, 24, 32)
    """Channels of the three encoder stages; the last a multiple of 4 and of ``num_heads``, the first two 0 for MAE."""
    depth: tuple[int, int, int] = (1, 1, 2)
    """Blocks of the three encoder stages; the first two 0 for MAE."""
    num_heads: int = 4
    """Attention heads of stage 3."""
    mlp_ratio: tuple[int, int, int] = (4, 4, 4)
    """Hidden width of each stage's MLP over its channels. The decoder uses the first, as the official code does."""
    decoder_dim: int = 32
    """Channels of the decoder; a multiple of 4 and of ``decoder_num_heads``."""
    decoder_depth: int = 2
    """Blocks of the decoder."""
    decoder_num_heads: int = 4
    """Attention heads of the decoder."""
    mask_ratio: float = 0.75
    """Fraction to hide, in [0, 1). int(draws * (1 - mask_ratio)) are kept, at least one. Where none is hidden, patches
    can be reconstructed, and the loss is the mean over nothing: not a number."""
    views: int = 1
    """How often an image is masked in one step. With more than one the masks are complementary: each patch is visible
    in exactly one view. Then ``mask_ratio`` is 1 - 1 / views (stored so if within 0.001), and views divide the draws.
    """
    masking: str = "block"
    """``block``: whole 16x16 patches (section 3.2 of the paper). ``random``: single 4x4 cells (its ablation)."""
    kernel_size: int = 5
    """Side of the depthwise kernel, odd."""
    fusion: bool = True
    """Whether stages 1 and 2 are added to stage 3 before the decoder."""
    position: str = "sincos"
    """Position embedding of stage 3: frozen sine-cosine, learned, or none. The decoder's is always sine-cosine:
    without it mask tokens would be indistinguishable."""
    loss: str = "mse"
    """``mse`` or ``l1``."""
    norm_pix: bool = True
    """Whether each target patch is normalised by its own mean and unbiased variance."""
    in_channels: int = 3
    """Channels of the images, which are also predicted: 3 for RGB, 1 for gray."""

    def __post_init__(self) -> None:
        if type(self.image_size) is int:
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        _check_types(self)
        _check_most(self)
        _check_stages(self)
        _check_widths(self)
        check_choice("masking", self.masking, MASKINGS)
        check_choice("position", self.position, POSITIONS)
        check_choice("loss", self.loss, LOSSES)
        _check_mask(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ConvMAEConfig:
        """A published size (``small`` to ``huge``), or ``tiny`` for a demonstration on a few CPU cores.

        Args:
            name: One of PRESETS.
            **changes: Fields that shall differ from the preset.

        Raises:
            ModelConfigError: If the name or a field is unknown, or a value is impossible.
        """
        check_choice("preset", name, tuple(PRESETS))
        names = tuple(field.name for field in fields(cls))
        for change in changes:
            check_choice("field", change, names)
        return cls(**{**PRESETS[name], **changes})

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        assert isinstance(self.image_size, tuple)  # __post_init__ made it one
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, H/16 and W/16."""
        height, width = self.image_shape
        return height // PATCH_PIXELS, width // PATCH_PIXELS

    @property
    def has_convolutions(self) -> bool:
        """Whether stages 1 and 2 exist; without them this is an MAE."""
        return self.depth[0] > 0

    def require_convolutions(self) -> None:
        """Raise ModelConfigError unless there are stages that give feature maps."""
        if not self.has_convolutions:
            rule = "must have convolution stages to give feature maps"
            raise ModelConfigError("embed_dim", rule, self.embed_dim, "MAE has none; take a ConvMAE, as preset('base')")

    @property
    def class_tokens(self) -> int:
        """Tokens before those of the patches: MAE has one, ConvMAE none."""
        return 0 if self.has_convolutions else 1

    @property
    def patch_values(self) -> int:
        """P, numbers in a patch, all channels."""
        return PATCH_PIXELS**2 * self.in_channels

    @property
    def patches(self) -> int:
        """L, patches per image."""
        return self.grid[0] * self.grid[1]

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Rows and columns of what is drawn from when masking: patches, or cells where masking is random."""
        height, width = self.image_shape
        return height // self.mask_pixels, width // self.mask_pixels

    @property
    def mask_pixels(self) -> int:
        """Side in pixels of what is drawn from: a patch, or a cell where masking is random."""
        return PATCH_PIXELS if self.masking == "block" else CELL_PIXELS

    @property
    def mask_patches(self) -> int:
        """Random draws that one image's mask needs: the product of ``noise_shape``."""
        return self.noise_shape[0] * self.noise_shape[1]

    @property
    def kept(self) -> int:
        """How many of the draws stay visible in a view."""
        if self.views > 1:
            return self.mask_patches // self.views  # the product below may fall short by rounding
        return int(self.mask_patches * (1 - self.mask_ratio))


_LENGTHS = {"image_size": 2, "embed_dim": 3, "depth": 3, "mlp_ratio": 3}
_ZERO_WITHOUT_CONVOLUTIONS = ("embed_dim", "depth")
SWITCHES = ("fusion", "norm_pix")
"""Fields that are on or off."""
_WHOLE = ("num_heads", "decoder_dim", "decoder_depth", "decoder_num_heads", "kernel_size", "views", "in_channels")


def _check_types(config: ConvMAEConfig) -> None:
    """Types are exact (True is no number of heads); a list, as JSON and YAML have it, is stored as a tuple."""
    for name, length in _LENGTHS.items():
        value = getattr(config, name)
        zeros = 2 if name in _ZERO_WITHOUT_CONVOLUTIONS else 0
        if not (isinstance(value, list | tuple) and len(value) == length and _are_positive(value, zeros)):
            one = "a positive whole number or " if name == "image_size" else ""
            raise ModelConfigError(name, f"must be {one}{length} positive whole numbers", value, "give them as a list")
        object.__setattr__(config, name, tuple(value))
    for name in _WHOLE:
        if not _is_positive_int(getattr(config, name)):
            raise ModelConfigError(name, "must be a positive whole number", getattr(config, name), "give 1 or more")
    for name in SWITCHES:
        if type(getattr(config, name)) is not bool:
            raise ModelConfigError(name, "must be a boolean", getattr(config, name), "give true or false")
    if type(config.mask_ratio) not in (int, float):
        raise ModelConfigError("mask_ratio", "must be a number", config.mask_ratio, "the paper uses 0.75")


def _check_most(config: ConvMAEConfig) -> None:
    for name, most in _MOST.items():
        value = getattr(config, name)
        if max(value if isinstance(value, tuple) else [value]) > most:
            rule = f"must be at most {most}" if name in _WHOLE else f"each must be at most {most}"
            raise ModelConfigError(name, rule, value, f"use {most} or less")


def _are_positive(values: Sequence[object], zeros: int) -> bool:
    """Positive whole numbers; the first `zeros` of them may be 0."""
    return all(type(value) is int and value >= (place >= zeros) for place, value in enumerate(values))


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value > 0


def _check_stages(config: ConvMAEConfig) -> None:
    """All stages, or stage 3 alone."""
    first_two = (*config.embed_dim[:2], *config.depth[:2])
    if not any(first_two):
        for name, value, wanted in (("fusion", config.fusion, False), ("masking", config.masking, "block")):
            if value != wanted:
                rule = f"must be {str(wanted).lower()} without convolution stages, whose features or cells it needs"
                raise ModelConfigError(name, rule, value, f"set {name}={str(wanted).lower()}")
    elif not all(first_two):
        name = "depth" if all(config.embed_dim) else "embed_dim"
        remedy = "for MAE set the first two of both embed_dim and depth to 0"
        raise ModelConfigError(name, "must be 3 positive whole numbers", getattr(config, name), remedy)


def _check_widths(config: ConvMAEConfig) -> None:
    for side in config.image_shape:
        if side % PATCH_PIXELS:
            near = max(PATCH_PIXELS, round(side / PATCH_PIXELS) * PATCH_PIXELS)
            rule = f"each side must be a multiple of {PATCH_PIXELS}"
            raise ModelConfigError("image_size", rule, config.image_size, f"use {near} in place of {side}")
    for name, width, heads_name, heads in (
        ("embed_dim", config.embed_dim[2], "num_heads", config.num_heads),
        ("decoder_dim", config.decoder_dim, "decoder_num_heads", config.decoder_num_heads),
    ):
        if width % heads:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            near = min(divisors, key=lambda n: abs(n - heads))
            rule = f"must divide {name} = {width}"
            raise ModelConfigError(heads_name, rule, heads, f"use {near} heads or another {name}")
        if width % 4:
            rule = "the width of a transformer must be a multiple of 4 for sine-cosine positions"
            raise ModelConfigError(name, rule, width, f"use {width + 4 - width % 4}")
    if config.kernel_size % 2 == 0:
        near = config.kernel_size + 1
        raise ModelConfigError("kernel_size", "must be odd to keep the map's size", config.kernel_size, f"use {near}")


def _check_mask(config: ConvMAEConfig) -> None:
    ratio, draws = config.mask_ratio, config.mask_patches
    if not 0 <= ratio < 1:
        raise ModelConfigError("mask_ratio", "must be in [0, 1)", ratio, "the paper uses 0.75")
    if config.views > 1:
        _check_views(config)
    if config.kept == 0:
        rule = f"must keep at least one of {draws} patches"
        raise ModelConfigError("mask_ratio", rule, ratio, "use a lower ratio or larger images")


_RATIO_ROUNDING = 1e-3
"""0.667 is meant to be two thirds."""


def _check_views(config: ConvMAEConfig) -> None:
    """Each draw is visible in one view; the ratio is stored as exactly what that makes it."""
    views, draws = config.views, config.mask_patches
    ratio = 1 - 1 / views
    if abs(config.mask_ratio - ratio) > _RATIO_ROUNDING:
        agreeing = round(1 / (1 - config.mask_ratio))
        agrees = abs(config.mask_ratio - (1 - 1 / agreeing)) <= _RATIO_ROUNDING
        rule = (
            f"must be 1, or make mask_ratio = {config.mask_ratio:g} be 1 - 1 / views: each patch is visible in one view"
        )
        remedy = f"set mask_ratio={ratio:.4g} or views={agreeing if agrees else 1}"
        raise ModelConfigError("views", rule, views, remedy)
    if draws % views:
        # Downwards from what was asked for, as far as it can be: fewer views hide less.
        near = next(number for number in range(min(views, draws), 0, -1) if draws % number == 0)
        fewer = f"views={near} with mask_ratio={1 - 1 / near:.4g}" if near > 1 else "views=1"
        what = "patches" if config.masking == "block" else "cells"
        rule = f"must divide the {draws} {what} of an image of {config.image_shape[0]} x {config.image_shape[1]} pixels"
        raise ModelConfigError("views", rule, views, f"use {fewer}, or another image_size")
    object.__setattr__(config, "mask_ratio", ratio)


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise ModelConfigError, with the nearest that is valid, unless ``value`` is one of ``valid``."""
    if value in valid:
        return
    near = difflib.get_close_matches(str(value), valid, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(valid)}"
    raise ModelConfigError(name, f"must be one of {', '.join(valid)}", value, remedy)
