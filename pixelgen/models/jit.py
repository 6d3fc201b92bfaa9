"""JiT, the class-conditional denoiser: a noisy image, its time and a class -> the predicted clean image.

Shape legend: B batch, P patch size, G = image_size/P, N = G·G image tokens, K in-context tokens, D width, h heads,
d = D/h. Module names are those of the published checkpoints, so that their state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelgen.models import DenoiserNetwork
from pixelgen.models.layers import (
    Dropout,
    Masks,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    attend,
    modulate,
    position_table,
    rotary_angles,
    rotate,
)

if TYPE_CHECKING:
    from pixelgen.denoisers.jit import JiTConfig


class JiT(DenoiserNetwork):
    """The denoiser of PixelGen-L/16 and -XL/16 (arXiv 2602.02493; architecture of JiT, arXiv 2511.13720)."""

    config: JiTConfig
    pos_embed: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor
    rotary_context_cos: Tensor
    rotary_context_sin: Tensor

    def __init__(self, config: JiTConfig):
        super().__init__()
        c = self.config = config
        grid, head = c.grid, c.width // c.heads
        self.x_embedder = PatchEmbedder(c.patch_size, c.bottleneck, c.width)
        self.t_embedder = TimestepEmbedder(c.width, max_period=10_000)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.in_context_posemb = nn.Parameter(torch.empty(1, c.in_context_len, c.width))
        self.register_buffer("pos_embed", position_table(c.width, grid)[None])
        middle = range(c.depth // 4, c.depth // 4 * 3)
        self.dropout = [c.dropout if i in middle else 0.0 for i in range(c.depth)]
        self.blocks = nn.ModuleList(Block(c.width, c.hidden_width, c.heads, p) for p in self.dropout)
        self.final_layer = Head(c.width, c.patch_size)

        y, x = rotary_angles(head, torch.arange(grid), torch.arange(grid))
        angles = torch.cat([y, x], dim=-1)  # (N, d/2)
        with_context = torch.cat([angles.new_zeros(c.in_context_len, head // 2), angles])  # angle 0: not rotated
        for name, table in (("rotary", angles), ("rotary_context", with_context)):
            self.register_buffer(f"{name}_cos", table.cos().float(), persistent=False)
            self.register_buffer(f"{name}_sin", table.sin().float(), persistent=False)
        self.reset_parameters()

    @property
    def output_weight(self) -> Tensor:
        return self.final_layer.linear.weight

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for embeddings, zero for modulations and the output layer."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for p in self.x_embedder.parameters():
            nn.init.xavier_uniform_(p.flatten(1)) if p.ndim > 1 else nn.init.zeros_(p)  # fills p through the view
        for table in (self.y_embedder.embedding_table.weight, self.in_context_posemb):
            nn.init.normal_(table, std=0.02)
        for p in self.t_embedder.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        starts_at_zero = [m.adaLN_modulation for m in self.modules() if isinstance(m, Block | Head)]
        for p in nn.ModuleList([*starts_at_zero, self.final_layer.linear]).parameters():
            nn.init.zeros_(p)

    def draw_dropout(self, count: int) -> list[Masks]:
        c, device = self.config, self.pos_embed.device
        image = self.pos_embed.shape[1]

        def mask(i: int, p: float, width: int) -> Tensor | None:
            if p == 0:
                return None
            tokens = image + c.in_context_len * (i >= c.in_context_start)
            return torch.empty(count, tokens, width, dtype=torch.bool, device=device).bernoulli_(1 - p)

        return [(mask(i, p, c.width), mask(i, p, c.hidden_width)) for i, p in enumerate(self.dropout)]

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, feature_block: int | None = None,
                dropout: Sequence[Masks] = ()) -> tuple[Tensor, Tensor | None]:
        """See the base; `y`: labels (B,)."""
        c = self.config
        tokens = self.x_embedder(x_t) + self.pos_embed
        y_emb = self.y_embedder(y)
        condition = self.t_embedder(t) + y_emb
        context, features = 0, None
        cos, sin = self.rotary_cos, self.rotary_sin
        for i, block in enumerate(self.blocks):
            if i == feature_block:
                features = tokens[:, context:]
            if i == c.in_context_start:
                class_tokens = y_emb[:, None] + self.in_context_posemb
                tokens = torch.cat([class_tokens.to(tokens.dtype), tokens], dim=1)
                context = c.in_context_len
                cos, sin = self.rotary_context_cos, self.rotary_context_sin
            tokens = block(tokens, condition, cos, sin, *(dropout[i] if dropout else ()))
        return self.final_layer(tokens[:, context:], condition), features


class PatchEmbedder(nn.Module):
    """(B, 3, H, W) -> (B, N, D), one token a patch, row by row."""

    def __init__(self, patch: int, bottleneck: int | None, width: int):
        super().__init__()
        self.bottleneck = bottleneck
        if bottleneck is None:
            self.proj1 = nn.Conv2d(3, width, patch, stride=patch)
        else:
            self.proj1 = nn.Conv2d(3, bottleneck, patch, stride=patch, bias=False)
            self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj1(x).flatten(2).transpose(1, 2)
        if self.bottleneck is None:
            return tokens
        return F.linear(tokens, self.proj2.weight.flatten(1), self.proj2.bias)  # a 1×1 convolution, token by token


class LabelEmbedder(nn.Module):
    """Labels (B,) in [0, num_classes], the last one the null label -> (B, D)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    """Attention and SwiGLU, each normalised, modulated and gated by the condition; both start as the identity."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden, bias=True, dropout=dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None = None,
                mlp_mask: Tensor | None = None) -> Tensor:
        """The masks, (B, tokens, D) and (B, tokens, hidden), are those of dropout."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin, attn_mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2), mlp_mask)


class Attention(nn.Module):
    """Self-attention with RMS-normalised and rotated queries and keys."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.dropout(self.proj(attend(q, k, v)), mask)


class Head(nn.Module):
    """(B, N, D) -> (B, 3, H, W): each token becomes its P×P patch, channel fastest."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch * patch * 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        x = self.linear(modulate(self.norm_final(x), shift, scale))
        grid, p = int(x.shape[1] ** 0.5), self.patch
        x = x.unflatten(2, (p, p, 3)).unflatten(1, (grid, grid))  # (B, G, G, P, P, 3)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
