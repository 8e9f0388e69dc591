"""ConvMAE (Gao et al. 2022, arXiv:2205.03892): masked pixels predicted from visible patches.

Letters: B images, V views of each (``config.views``), L patches, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from model import dense as reference
from model.blocks import Attention, select
from model.config import CELL_PIXELS, PARTS, PATCH_PIXELS, ConvMAEConfig, check_choice
from model.decoder import Decoder
from model.dense import Features
from model.encoder import Encoder
from model.errors import ModelConfigError
from model.masking import Mask, all_patches, draw_mask
from model.pixels import patch_grid, patch_moments, patchify, square_pixels
from model.vit import ViTEncoder
from model.weights import from_official, to_official


class Output(NamedTuple):
    """The result of a forward pass that pretraining needs."""

    loss: Tensor
    """Scalar float32, the mean over all masked patches of all views: every image counts the same."""
    mask: Tensor
    """(B, V * draws) float32: 1 where masked, 0 where visible; one view after the other."""


class ConvMAE(nn.Module):
    """Encoder, decoder and loss.

    Parameters are initialised as in the official code, from PyTorch's generator: seed that first.

    Args:
        config: The model's shape.
        dense: Compute stages 1 and 2, the prediction and the loss for all patches and multiply by the mask, operation
            by operation as the official code does. Slower, the same values: the reference that tests compare with.
        recompute: Of ``stage1``, ``stage2``, ``stage3``, ``decoder``, those whose blocks keep only their inputs for the
            backward pass and are computed again there: less memory, the same values. Not for the dense form.
        other_sizes: Heights and widths in pixels of images that it takes besides those of ``config.image_size``, to
            whose patches both position embeddings are interpolated. They change neither parameters nor buffers.

    Raises:
        ModelConfigError: If recompute names no part of the model, or no image can have one of the sizes.
    """

    def __init__(
        self,
        config: ConvMAEConfig,
        dense: bool = False,
        recompute: Collection[str] = (),
        other_sizes: Collection[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        for part in recompute:
            check_choice("recompute", part, PARTS)
        self.config = config
        self.configs = {config.image_shape: config} | {size: replace(config, image_size=size) for size in other_sizes}
        """By height and width of the images."""
        self.dense = dense
        self.encoder: Encoder | ViTEncoder
        if config.has_convolutions:
            self.encoder = Encoder(config, recompute)
        else:
            self.encoder = ViTEncoder(config, "stage3" in recompute)
        self.decoder = Decoder(config, "decoder" in recompute)
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused = not dense

    def forward(self, images: Tensor, noise: Tensor) -> Output:
        """Mask, encode, predict and compare.

        Args:
            images: (B, in_channels, H, W) float, normalised; all of one of the sizes that the model takes.
            noise: (B, mask_patches of the configuration of that size), e.g. ``mask_noise(...)``; the smallest values
                stay visible, in the second view the next ones, and so on.

        Raises:
            ModelConfigError: If a shape does not fit the configuration.
        """
        mask = self._mask(images, noise, self.config.views)
        if self.dense:
            loss = self._dense_loss(images.repeat_interleave(self.config.views, dim=0), mask)
        elif self.config.masking == "block":
            loss = self._errors(self._predict(images, mask, mask.hidden), self._targets(images, mask.hidden)).mean()
        else:
            targets = self._normalised(patchify(images)).repeat_interleave(self.config.views, dim=0)
            errors = self._cell_errors(self._errors(self._predict(images, mask, None), targets), patch_grid(images))
            loss = errors.gather(1, mask.hidden).mean()
        return Output(loss, mask.mask.view(images.shape[0], -1))

    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """Predict every patch from the visible ones: (B, L, P), in units of the patch's deviation if ``norm_pix``.

        Where there are several views, from the first.
        """
        return self._predict(images, self._mask(images, noise, 1), None)

    def encode_dense(self, images: Tensor) -> Features:
        """The three feature maps of whole images, for detection and segmentation. No mask, no fusion, no final norm.

        Raises:
            ModelConfigError: If the model has no convolution stages.
        """
        self._config_of(images)
        self.config.require_convolutions()
        assert isinstance(self.encoder, Encoder)
        return reference.features(self.encoder, self._cast(images))

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of the official implementation.

        Args:
            state: Its ``model.state_dict()``.

        Raises:
            WeightsError: If a name is missing or unexpected or a shape differs; it lists all of them.
        """
        self.load_state_dict(from_official(state, self.state_dict()))

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the official implementation."""
        return to_official(self.state_dict())

    def _mask(self, images: Tensor, noise: Tensor, views: int) -> Mask:
        config = self._config_of(images)
        expected = (images.shape[0], config.mask_patches)
        if noise.shape != expected:
            rule = f"must have one draw per maskable patch, shape {expected}"
            raise ModelConfigError("noise", rule, tuple(noise.shape), "draw config.mask_patches values per image")
        return draw_mask(noise, config.kept, views)

    def _config_of(self, images: Tensor) -> ConvMAEConfig:
        """That of the images' size."""
        config = self.configs.get(tuple(images.shape[2:]))  # type: ignore[arg-type]
        if images.ndim != 4 or images.shape[1] != self.config.in_channels or config is None:
            shapes = (f"(batch, {self.config.in_channels}, {height}, {width})" for height, width in self.configs)
            rule = f"must have shape {' or '.join(shapes)}"
            raise ModelConfigError("images", rule, tuple(images.shape), "resize them or set image_size")
        if not images.is_floating_point():
            raise ModelConfigError("images", "must be normalised floats", images.dtype, "pass them through normalise()")
        return config

    def _predict(self, images: Tensor, mask: Mask, wanted: Tensor | None) -> Tensor:
        images, grid = self._cast(images), patch_grid(images)
        every = all_patches(mask.kept.shape[0], grid[0] * grid[1], images.device)
        visible = mask.kept if self.config.masking == "block" else every
        if self.dense:
            assert wanted is None
            return reference.decode(self.decoder, reference.encode(self.encoder, images, mask), visible, grid)
        prediction: Tensor = self.decoder(self.encoder(images, mask.kept), visible, wanted, grid)
        return prediction

    def _cast(self, images: Tensor) -> Tensor:
        """Parameters may be bf16 (DeepSpeed); targets stay as precise as the images are."""
        return images.to(self.decoder.mask_token.dtype)

    def _dense_loss(self, images: Tensor, mask: Mask) -> Tensor:
        """Of an image for each mask."""
        errors = self._errors(self._predict(images, mask, None), self._normalised(patchify(images)))
        is_block = self.config.masking == "block"
        per_draw = errors.mean(-1) if is_block else self._cell_errors(errors, patch_grid(images))
        return (per_draw * mask.mask).sum() / mask.mask.sum()

    def _targets(self, images: Tensor, hidden: Tensor) -> Tensor:
        """What is to be predicted in the place of hidden patches, (B * V, M) -> (B * V, M, P) float32."""
        if self.config.views == 1:
            return self._normalised(square_pixels(images, hidden, PATCH_PIXELS).flatten(2))
        # Every patch is hidden in all views but one: normalised once, it is only copied for each.
        whole, of_images = self._normalised(patchify(images)), hidden.view(images.shape[0], -1)
        return select(whole, of_images).view(*hidden.shape, whole.shape[2])

    def _normalised(self, patches: Tensor) -> Tensor:
        """(B, M, P) pixels -> float32, with ``norm_pix`` of mean 0 and deviation 1 in each patch."""
        patches = patches.float()
        if self.config.norm_pix and patches.numel():  # PyTorch warns of moments of nothing
            mean, deviation = patch_moments(patches)
            patches = (patches - mean) / deviation
        return patches

    def _errors(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """(B * V, M, P) twice -> error of each pixel, in float32."""
        difference = prediction.float() - targets
        return difference.abs() if self.config.loss == "l1" else difference.square()

    def _cell_errors(self, errors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Random masking only: (B * V, L, P) -> mean of each 4x4 cell in raster order, (B * V, 16 * L)."""
        side = PATCH_PIXELS // CELL_PIXELS
        pixels = errors.view(-1, *grid, side, CELL_PIXELS, side, CELL_PIXELS, self.config.in_channels)
        return pixels.mean((4, 6, 7)).transpose(2, 3).flatten(1)
