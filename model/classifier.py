"""The fine-tuning model: the pretrained encoder, whole images, one head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Self

from torch import Tensor, nn

from model import dense
from model.backbone import load_encoder, plain_encoder, set_drop_path
from model.blocks import TRANSFORMER_EPS
from model.config import ConvMAEConfig, check_choice
from model.errors import ModelConfigError
from model.pooled import checked_images
from model.position import interpolated
from model.weights import check_names

KINDS = ("full", "linear")
_HEAD_DEVIATION = {"full": 2e-5, "linear": 0.01}
"""Of the truncated normal from which the head's weights are drawn: main_finetune.py and main_linprobe.py."""
_BATCH_NORM_EPS = 1e-6


class Classifier(nn.Module):
    """Logits of whole images: the mean over the patches after the last block, a LayerNorm, a linear head.

    Args:
        config: That of the pretraining, with the image size whose position embeddings are trained here.
        classes: Outputs of the head.
        kind: ``full``: all of it is trained, the positions too. ``linear``: the head alone, behind a batch norm without
            parameters; what is before it is frozen, and stays in evaluation mode.
        drop_path: Probability of dropping the last block's branches; grows linearly from 0 at the first block. Without
            effect on a ``linear`` one.
        recompute: As for ``Backbone``; for MAE ``stage3`` is all of it.

    Source: models_convvit.py with ``global_pool``, main_finetune.py and main_linprobe.py of
    github.com/Alpha-VL/ConvMAE; for MAE models_vit.py of github.com/facebookresearch/mae, whose mean leaves the class
    token out.
    """

    def __init__(
        self,
        config: ConvMAEConfig,
        classes: int,
        *,
        kind: str = "full",
        drop_path: float = 0.0,
        recompute: Collection[str] = (),
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        if classes < 2:
            raise ModelConfigError("classes", "must be at least two", classes, "one class cannot be told from another")
        self.config, self.kind, self.classes = config, kind, classes
        self.encoder = plain_encoder(config, recompute)
        self.fc_norm = nn.LayerNorm(config.embed_dim[2], eps=TRANSFORMER_EPS)
        linear = nn.Linear(config.embed_dim[2], classes)
        nn.init.trunc_normal_(linear.weight, std=_HEAD_DEVIATION[kind])
        nn.init.zeros_(linear.bias)
        self.head: nn.Module = linear
        self.blocks = set_drop_path(self.encoder, drop_path)
        """Of the encoder."""
        if config.position != "none":
            self.encoder.pos_embed.requires_grad_(True)
        if kind == "linear":
            self.encoder.requires_grad_(False)
            self.fc_norm.requires_grad_(False)
            norm = nn.BatchNorm1d(config.embed_dim[2], affine=False, eps=_BATCH_NORM_EPS)
            self.head = nn.Sequential(norm, linear)

    @property
    def noise_draws(self) -> int:
        """Values of ``noise`` that an image needs: one for each branch of each block that is trained."""
        return 2 * self.blocks if self.kind == "full" else 0

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; nothing is dropped in a frozen encoder."""
        super().train(mode)
        self.encoder.train(mode and self.kind == "full")
        return self

    def features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, C): what the head sees; arguments as of ``forward``."""
        of_blocks = None if noise is None else noise.view(-1, self.blocks, 2)
        tokens = dense.last_tokens(self.encoder, checked_images(images, self.config.in_channels), of_blocks)
        out: Tensor = self.fc_norm(tokens.mean(dim=1))
        return out

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, classes) logits.

        Args:
            images: (B, in_channels, H, W) normalised, H and W multiples of 16.
            noise: (B, noise_draws) in [0, 1) for stochastic depth while training, as of ``sample_noise``; None: from
                PyTorch's generator, where there are draws.

        Raises:
            ModelConfigError: The shape is another one, or the images were not normalised.
        """
        logits: Tensor = self.head(self.features(images, noise))
        return logits

    def load_pretrained(self, state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> None:
        """Take the encoder of a pretrained model; ``fc_norm`` and head stay as they are.

        Args:
            state: As of ``Backbone.load``.
            grid: Rows and columns of the patches of the pretraining; None: those of this model. Positions are
                interpolated from there.

        Raises:
            WeightsError: As ``Backbone.load``.
        """
        before, ahead = grid or self.config.grid, self.config.class_tokens
        for name in ("pos_embed", "encoder.pos_embed"):
            position = state.get(name)
            if position is not None and position.shape[1] == ahead + before[0] * before[1]:
                state = {**state, name: interpolated(position, before, self.config.grid, ahead)}
        load_encoder(self.encoder, state)

    def to_official(self) -> dict[str, Tensor]:
        """The weights under the names of the official fine-tuning; of a linear head without its batch norm.

        The batch norm has no place in the official class: it is folded into the linear layer that follows it.
        """
        weights = {name.removeprefix("encoder."): value for name, value in self.state_dict().items()}
        if self.kind == "full":
            return weights
        weight, bias = self._folded_head()
        return {name: value for name, value in weights.items() if not name.startswith("head.")} | {
            "head.weight": weight, "head.bias": bias
        }  # fmt: skip

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Take a fine-tuned model's weights: by official names, or by ours.

        Raises:
            WeightsError: If a name is missing or unexpected, or a shape differs; lists all of them.
        """
        given = {name.removeprefix("encoder."): value for name, value in state.items()}
        wanted = {name.removeprefix("encoder."): value for name, value in self.state_dict().items()}
        check_names(given, wanted)
        self.load_state_dict({name: given[name.removeprefix("encoder.")] for name in self.state_dict()})

    def _folded_head(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.head, nn.Sequential)
        norm, linear = self.head
        assert isinstance(norm, nn.BatchNorm1d) and isinstance(linear, nn.Linear)
        assert norm.running_mean is not None and norm.running_var is not None
        weight = linear.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        return weight, linear.bias.detach() - weight @ norm.running_mean
