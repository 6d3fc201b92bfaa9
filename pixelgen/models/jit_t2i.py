"""JiT_T2I, the text-conditional denoiser: a noisy image, its time and text features -> the predicted clean image.

Shape legend: B batch, P patch size, G = image_size/P, N = G·G image tokens, L text tokens, C text width, D width,
h heads, d = D/h. Module names are those of the published checkpoints, so that their state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelgen.models import DenoiserNetwork
from pixelgen.models.layers import (
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
    from pixelgen.denoisers.jit_t2i import JiTTextConfig


class JiTText(DenoiserNetwork):
    """The denoiser of PixelGen-XXL/16 (arXiv 2602.02493)."""

    config: JiTTextConfig
    pos_embed: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: JiTTextConfig):
        super().__init__()
        c = self.config = config
        grid = c.grid
        self.x_embedder = PatchEmbedder(c.patch_size, c.bottleneck, c.width)
        self.t_embedder = TimestepEmbedder(c.width, max_period=10)
        self.y_embedder = TextEmbedder(c.text_width, c.width)
        self.y_pos_embedding = nn.Parameter(torch.empty(1, c.text_length, c.width))
        self.register_buffer("pos_embed", position_table(c.width, grid)[None])
        self.text_refine_blocks = nn.ModuleList(
            Block(c.width, c.hidden_width, TextAttention(c.width, c.heads)) for _ in range(c.text_depth))
        self.blocks = nn.ModuleList(
            Block(c.width, c.hidden_width, JointAttention(c.width, c.heads)) for _ in range(c.depth))
        self.final_layer = Head(c.width, c.patch_size)

        # Positions run from 0 to G inclusive, as the published weights were trained; x and y alternate.
        positions = torch.arange(grid, dtype=torch.float64) * (grid / max(grid - 1, 1))
        y, x = rotary_angles(c.width // c.heads, positions, positions)
        angles = torch.stack([x, y], dim=-1).flatten(1)  # (N, d/2)
        self.register_buffer("rotary_cos", angles.cos().float(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin().float(), persistent=False)
        self.reset_parameters()

    @property
    def output_weight(self) -> Tensor:
        return self.final_layer.linear.weight

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for embeddings, zero for modulations and the output layer."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.normal_(self.y_pos_embedding, std=0.02)
        for p in self.t_embedder.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        starts_at_zero = [m.adaLN_modulation for m in self.modules() if isinstance(m, Block)]
        for p in nn.ModuleList([*starts_at_zero, self.final_layer.linear]).parameters():
            nn.init.zeros_(p)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, feature_block: int | None = None,
                dropout: Sequence[Masks] = ()) -> tuple[Tensor, Tensor | None]:
        """See the base; `y`: text features (B, L, C); `dropout` is empty."""
        condition = F.silu(self.t_embedder(t))
        text = self.y_embedder(y) + self.y_pos_embedding
        for block in self.text_refine_blocks:
            text = block(text, condition)
        tokens, features = self.x_embedder(x_t) + self.pos_embed, None
        for i, block in enumerate(self.blocks):
            if i == feature_block:
                features = tokens
            tokens = block(tokens, condition, text, self.rotary_cos, self.rotary_sin)
        return self.final_layer(tokens), features


class PatchEmbedder(nn.Module):
    """(B, 3, H, W) -> (B, N, D); inside a patch the channel is slowest."""

    def __init__(self, patch: int, bottleneck: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj1 = nn.Linear(3 * patch**2, bottleneck, bias=False)
        self.proj2 = nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, 3, G, P, G, P)
        return self.proj2(self.proj1(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)))


class TextEmbedder(nn.Module):
    """Text features (B, L, C) -> (B, L, D)."""

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.proj = nn.Linear(text_width, width)
        self.norm = RMSNorm(width)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(self.proj(y))


class Block(nn.Module):
    """Attention and SwiGLU, each normalised, modulated and gated by the time; both start as the identity."""

    def __init__(self, width: int, hidden: int, attention: nn.Module):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = attention
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, *context: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), *context)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TextAttention(nn.Module):
    """Self-attention among the text tokens; no mask, no rotary."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, L, d)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v))


class JointAttention(nn.Module):
    """Image queries over image and text; image queries and keys are rotated, text keys are not."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_x = nn.Linear(width, 3 * width, bias=False)
        self.kv_y = nn.Linear(width, 2 * width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv_x(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
        text_k, text_v = self.kv_y(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, L, d)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.proj(attend(q, torch.cat([k, self.k_norm(text_k)], dim=2), torch.cat([v, text_v], dim=2)))


class Head(nn.Module):
    """(B, N, D) -> (B, 3, H, W): each token becomes its P×P patch, channel slowest."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, 3 * patch**2)

    def forward(self, x: Tensor) -> Tensor:
        grid, p = int(x.shape[1] ** 0.5), self.patch
        x = self.linear(self.norm(x)).unflatten(2, (3, p, p)).unflatten(1, (grid, grid))  # (B, G, G, 3, P, P)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
