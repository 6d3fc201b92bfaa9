"""Building blocks of the denoisers.

Shape legend: B batch, N tokens, D width, h heads, d = D/h head size, G patches on a side (N = G·G).
Tables (positions, rotary) are buffers computed in float64 and rounded once, so that every machine has the same ones.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNED = 8  # bf16 numbers in 16 bytes, the unit in which fast matrix kernels of GPUs load
Masks = tuple[Tensor | None, Tensor | None]  # of a block's dropout, after its attention and in its MLP


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Dropout(nn.Module):
    """Zero where `mask` is False, and the rest 1 / (1 - p) times as large; without a mask, the identity.

    Masks are drawn by who trains (`JiT.draw_dropout`), since each sample's must not depend on those beside it.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else x * mask / (1 - self.p)


class SwiGLU(nn.Module):
    """w3(silu(a)·b) with (a, b) = w12(x)."""

    def __init__(self, width: int, hidden: int, bias: bool, dropout: float = 0.0):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.w3.in_features
        if x.is_cuda and hidden % ALIGNED:
            return self.widened(x, mask, -hidden % ALIGNED)
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(F.silu(a) * b, mask))

    def widened(self, x: Tensor, mask: Tensor | None, more: int) -> Tensor:
        """The same with `more` hidden units whose weights are 0, which rounds otherwise: a GPU's fast kernels need
        widths that they can divide, and L/16 has 2730."""
        weight = F.pad(self.w12.weight.unflatten(0, (2, -1)), (0, 0, 0, more)).flatten(0, 1)
        bias = None
        if self.w12.bias is not None:
            bias = F.pad(self.w12.bias.unflatten(0, (2, -1)), (0, more)).flatten()
        a, b = F.linear(x, weight, bias).chunk(2, dim=-1)
        mask = None if mask is None else F.pad(mask, (0, more))
        return F.linear(self.dropout(F.silu(a) * b, mask), F.pad(self.w3.weight, (0, more)), self.w3.bias)


class TimestepEmbedder(nn.Module):
    """Time (B,) in [0, 1] -> (B, D): 256 sinusoids and a two-layer network."""

    def __init__(self, width: int, max_period: float, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.max_period, self.frequencies = max_period, frequencies

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t, self.frequencies, self.max_period))


def sinusoids(t: Tensor, dim: int, max_period: float) -> Tensor:
    """(B,) -> (B, dim): cosines then sines at dim//2 frequencies from 1 to 1/max_period; an odd dim ends with a 0."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def position_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos position embedding (G·G, D), rows first; the first half of D encodes x, the second y."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (G, D/2)
    x = line[None].expand(grid, -1, -1)
    y = line[:, None].expand(-1, grid, -1)
    return torch.cat([x, y], dim=-1).reshape(grid * grid, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm (DiT, arXiv 2212.09748): x·(1 + scale) + shift, the same for all tokens of a sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over (B, h, N, d), heads merged into (B, N, D)."""
    x = F.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)


def rotary_angles(head_size: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Angles of 2-D rotary embedding for a grid: two (G_y·G_x, d/4) tables, for the row and the column of each patch.

    `rows` (G_y,) and `columns` (G_x,) are positions in patches; frequencies fall from 1 to 10000 geometrically.
    """
    count = head_size // 4
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / (head_size / 4))
    y = (rows.double()[:, None] * frequencies)[:, None].expand(-1, len(columns), -1)
    x = (columns.double()[:, None] * frequencies)[None].expand(len(rows), -1, -1)
    return y.reshape(-1, count), x.reshape(-1, count)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis of x (B, h, N, d) by angles whose cos and sin are (N, d/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
