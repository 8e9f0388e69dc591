"""The layers that encoder and decoder are made of, under the names of the official code.

Letters: B images, N tokens, C channels. Layers act on tokens, channels last; only the depthwise convolution sees a map.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from model.masking import gather_tokens, scatter_tokens

TRANSFORMER_EPS = 1e-6
"""LayerNorm epsilon of transformer blocks and final norms; convolution blocks have PyTorch's 1e-5."""


class TokenConv(nn.Conv2d):
    """A convolution whose kernel, of side 1, 2 or 4, is also its stride, as a matrix product over Z-ordered tokens.

    Parameters have the shape and the initialisation of the convolution that it stands for.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int) -> None:
        super().__init__(channels_in, channels_out, side, stride=side)
        self.halvings = side.bit_length() - 1

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N / side**2, C_out)."""
        B, N, C = x_BNC.shape
        tokens = 4**self.halvings
        return functional.linear(x_BNC.reshape(B, N // tokens, tokens * C), self._matrix(), self.bias)

    def _matrix(self) -> Tensor:
        """(C_out, tokens * C_in): kernel rows and columns split into bits, and the bits interleaved (Z-order)."""
        n = self.halvings
        if n == 0:
            return self.weight.flatten(1)
        bits = self.weight.view(*self.weight.shape[:2], *(2,) * (2 * n))
        interleaved = [axis for bit in range(n) for axis in (2 + bit, 2 + n + bit)]
        return bits.permute(0, *interleaved, 1).flatten(1)


class PatchEmbed(nn.Module):
    """Tokens of one stage to tokens of the next: convolution, LayerNorm, GELU."""

    def __init__(self, channels_in: int, channels_out: int, side: int) -> None:
        super().__init__()
        self.proj = TokenConv(channels_in, channels_out, side)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N / side**2, C_out)."""
        return functional.gelu(self.norm(self.proj(x_BNC)))


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = TokenConv(dim, hidden_dim, 1)
        self.fc2 = TokenConv(hidden_dim, dim, 1)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x_BNC)))
        return out


class ConvBlock(nn.Module):
    """Masked convolution block (section 3.2): a depthwise convolution mixes visible neighbours, all else is per token.

    The official code multiplies the whole map by the mask before the depthwise convolution. Zeros in the place of
    masked tokens are the same, and everything else is needed for visible tokens only.
    """

    def __init__(self, dim: int, mlp_ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = TokenConv(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.conv2 = TokenConv(dim, dim, 1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, dim * mlp_ratio)

    def forward(self, x_BNC: Tensor, flat: Tensor, shape: tuple[int, int]) -> Tensor:
        """Advance the visible tokens by one block.

        Args:
            x_BNC: Visible tokens.
            flat: Their ``flat_positions`` in the batch of maps.
            shape: Rows and columns of the map.
        """
        x_BHWC = scatter_tokens(self.conv1(self.norm1(x_BNC)), flat, shape)
        x_BHWC = self.attn(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x_BNC = x_BNC + self.conv2(gather_tokens(x_BHWC, flat))
        out: Tensor = x_BNC + self.mlp(self.norm2(x_BNC))
        return out


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        B, N, C = x_BNC.shape
        heads = self.qkv(x_BNC).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        out: Tensor = self.proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return out


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

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=TRANSFORMER_EPS)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x_BNC = x_BNC + self.attn(self.norm1(x_BNC))
        out: Tensor = x_BNC + self.mlp(self.norm2(x_BNC))
        return out


def initialise_linear(module: nn.Module) -> None:
    """For ``apply``: as the official code, which leaves convolutions and norms as PyTorch initialises them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
