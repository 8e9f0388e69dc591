"""The layers that encoder and decoder are made of, under the names of the official code.

Letters: B images, N tokens, C channels. Layers act on tokens, channels last;
convolution stages take the tokens of all images as one list.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.depthwise import DepthwiseConv

TRANSFORMER_EPS = 1e-6
"""LayerNorm epsilon of transformer blocks and final norms; convolution blocks have PyTorch's 1e-5."""


class TokenConv(nn.Conv2d):
    """A convolution whose kernel is also its stride, as a matrix product over the tokens of square units.

    Parameters have the shape and the initialisation of the convolution that it stands for.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int) -> None:
        super().__init__(channels_in, channels_out, side, stride=side)
        self.side = side

    def forward(self, x_NC: Tensor, unit: int = 1) -> Tensor:
        """(N, C) -> (N / side**2, C_out).

        Args:
            x_NC: Tokens, unit after unit, in a unit by row and column.
            unit: Side of a unit in tokens, a multiple of the kernel's; the result has units of unit / side.
        """
        # Rows and columns of the kernel beside the channels; a view where a kernel covers the whole unit.
        halves = (unit // self.side, self.side)
        x = x_NC.view(-1, *halves, *halves, x_NC.shape[-1]).transpose(2, 3)
        return functional.linear(x.reshape(-1, self.side**2 * x_NC.shape[-1]), self._matrix(), self.bias)

    def _matrix(self) -> Tensor:
        """(C_out, side**2 * C_in)."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)


class PatchEmbed(nn.Module):
    """Tokens of one stage to tokens of the next: convolution, LayerNorm, GELU."""

    def __init__(self, channels_in: int, channels_out: int, side: int) -> None:
        super().__init__()
        self.proj = TokenConv(channels_in, channels_out, side)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, x_NC: Tensor, unit: int) -> Tensor:
        """(N, C) -> (N / side**2, C_out), as ``TokenConv``."""
        return functional.gelu(self.norm(self.proj(x_NC, unit)))


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = TokenConv(dim, hidden_dim, 1)
        self.fc2 = TokenConv(hidden_dim, dim, 1)

    def forward(self, x_NC: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x_NC)))
        return out


def drop_path(branch: Tensor, rate: float, training: bool, noise: Tensor | None = None) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): zero a branch for some images, scale it for the others.

    Args:
        branch: (B, ...).
        rate: Probability of zero.
        training: Otherwise nothing happens.
        noise: (B,) in [0, 1), of which the lowest share is dropped; None: from PyTorch's generator.
    """
    if not rate or not training:
        return branch
    if noise is None:
        noise = torch.rand(branch.shape[0], device=branch.device)
    kept = (noise >= rate).to(branch.dtype).div_(1 - rate)
    return branch * kept.view(-1, *[1] * (branch.ndim - 1))


def branches(noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The noise of a block's two branches, each (B,): (B, 2) by column."""
    return (None, None) if noise is None else (noise[:, 0], noise[:, 1])


class ConvBlock(nn.Module):
    """Masked convolution block (section 3.2): a depthwise convolution mixes visible neighbours, all else is per token.

    The official code multiplies the whole map by the mask before the depthwise convolution. Zeros in the place of
    masked tokens are the same, and everything is needed for visible tokens only.
    """

    drop_path = 0.0
    """Rate of stochastic depth; used where whole maps are encoded (``Backbone``)."""

    def __init__(self, dim: int, mlp_ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = TokenConv(dim, dim, 1)
        self.attn = DepthwiseConv(dim, kernel_size)
        self.conv2 = TokenConv(dim, dim, 1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, dim * mlp_ratio)

    def forward(self, x_NC: Tensor, surroundings: Tensor) -> Tensor:
        """Advance the visible tokens by one block; arguments as for ``DepthwiseConv``."""
        x_NC = x_NC + self.conv2(self.attn(self.conv1(self.norm1(x_NC)), surroundings))
        out: Tensor = x_NC + self.mlp(self.norm2(x_NC))
        return out


def select(x_BNC: Tensor, places: Tensor) -> Tensor:
    """Tokens by their places: (B, N, C), (B, M) -> (B, M, C)."""
    return x_BNC.gather(1, places[..., None].expand(-1, -1, x_BNC.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention."""

    fused = True
    """Whether one kernel does it all, else one operation after the other, as the official code."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv_BND: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Args:
            qkv_BND: (B, N, 3 * C) what ``self.qkv`` makes of the tokens.
            wanted: (B, M) tokens to compute; None for all N.

        Returns:
            (B, M, C).
        """
        query, key, value = qkv_BND.chunk(3, dim=-1)
        if wanted is not None:
            query = select(query, wanted)
        attend = functional.scaled_dot_product_attention if self.fused else _attention
        mixed = attend(self._heads(query), self._heads(key), self._heads(value))
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.view(*x_BNC.shape[:2], self.num_heads, x_BNC.shape[2] // self.num_heads).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores: Tensor = query @ key.mT * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x_BNC)))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm transformer block."""

    drop_path = 0.0
    """Rate of stochastic depth."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x_BNC: Tensor, wanted: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Advance tokens by one block.

        Args:
            x_BNC: All tokens.
            wanted: (B, M) those to compute; None for all N.
            noise: (B, 2) of ``drop_path``, for both branches.

        Returns:
            (B, M, C).
        """
        return self.advance(x_BNC, self.qkv(x_BNC), wanted, noise)

    def qkv(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 3 * C): queries, keys and values; each token's depends on it alone."""
        out: Tensor = self.attn.qkv(self.norm1(x_BNC))
        return out

    def advance(self, x_BNC: Tensor, qkv_BND: Tensor, wanted: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """Do what ``forward`` does, given the tokens' ``qkv``."""
        mixed = self.attn(qkv_BND, wanted)
        if wanted is not None:
            x_BNC = select(x_BNC, wanted)
        first, second = branches(noise)
        x_BNC = x_BNC + drop_path(mixed, self.drop_path, self.training, first)
        out: Tensor = x_BNC + drop_path(self.mlp(self.norm2(x_BNC)), self.drop_path, self.training, second)
        return out


def run(block: Callable[..., Tensor], *args: Tensor | None, recompute: bool) -> Tensor:
    """Call a block.

    Args:
        block: A block, or a method of one.
        *args: Its arguments.
        recompute: Keep only the arguments for the backward pass, which calls the block again (activation
            checkpointing, Chen et al. 2016, arXiv:1604.06174).
    """
    out: Tensor = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
    return out


def initialise_linear(module: nn.Module) -> None:
    """Initialise linear layers, for ``apply``; the official code leaves others as PyTorch initialises them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
