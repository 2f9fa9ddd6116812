"""Layers: the parts that policies are built from. Called by `models.policies`. Knows no task, page or request.

Dimension names: b batch row, token, key (tokens attended to), head, dim (of a head), width (of the residual stream),
inner (all heads side by side), low and high (widths before and after a layer), h and w (pixels), c (channels).
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from ganglion.kernels import cpu


class ConvStem(nn.Module):
    """Pixels of one view -> tokens: stride-2 3x3 convolutions, each with a norm over channels and SiLU.

    Token (row, column) stands at pixel `patch_px * (row, column)` and sees the patch_px - 1 pixels on each side of it.
    """

    def __init__(self, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        pairs = list(zip((3, *channels[:-1]), channels, strict=True))
        self.convs = nn.ModuleList(
            nn.Conv2d(low, high, 3, stride=2, padding=1) for low, high in pairs
        )
        self.norms = nn.ModuleList(nn.LayerNorm(high) for _, high in pairs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return next(self.parameters()).dtype

    @property
    def patch_px(self) -> int:
        """Pixels from one token to the next: each convolution halves the picture."""
        return int(2 ** len(self.convs))

    def forward(self, pixels: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b token width"]:
        # channels_last throughout: the permutes below move no bytes, and the norm runs over adjacent numbers
        x = pixels.permute(0, 3, 1, 2).to(dtype=self.dtype, memory_format=torch.channels_last)
        x = x.mul(2.0 / 255.0).sub_(1.0)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.silu(norm(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


def attend(
    query: Float[Tensor, "b token head dim"],
    key: Float[Tensor, "b key head dim"],
    value: Float[Tensor, "b key head dim"],
    mask: Float[Tensor, "1 1 1 key"] | None = None,
) -> Float[Tensor, "b token head*dim"]:
    """Full attention of every token to every key; `mask` is added to the scores."""
    if not torch.is_grad_enabled():
        return cpu.attend(query, key, value, mask).out.flatten(2)
    # the fused op's gradient is five times slower on a CPU than these two products
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    scores = scores if mask is None else scores + mask
    return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).flatten(2)


class Linear(nn.Linear):
    """torch's own, with the sum that follows it in a residual stream. `packing` swaps it for a faster one."""

    def forward_onto(
        self, x: Float[Tensor, "*b low"], base: Float[Tensor, "*b high"]
    ) -> Float[Tensor, "*b high"]:
        """base + forward(x)."""
        out: Tensor = self(x)
        return base + out


class Block(nn.Module):
    """One pre-norm transformer block; the caller decides what its tokens attend to besides themselves."""

    def __init__(self, *, width: int, num_heads: int, head_dim: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * num_heads * head_dim)
        self.attention_out = Linear(num_heads * head_dim, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = Linear(width, mlp_width)
        self.mlp_out = Linear(mlp_width, width)
        nn.init.normal_(self.attention_out.weight, std=0.02)
        nn.init.normal_(self.mlp_out.weight, std=0.02)

    def project(
        self, x: Float[Tensor, "b token width"]
    ) -> tuple[Float[Tensor, "b token head dim"], Float[Tensor, "b token 2 head dim"]]:
        """Query, and key with value, of every token. `split`, not indexing: its gradient is one concatenation."""
        width = self.num_heads * self.head_dim
        query, key_value = self.qkv(self.attention_norm(x)).split((width, 2 * width), dim=-1)
        return (
            query.view(*x.shape[:2], self.num_heads, self.head_dim),
            key_value.view(*x.shape[:2], 2, self.num_heads, self.head_dim),
        )

    def finish(
        self, x: Float[Tensor, "b token width"], attended: Float[Tensor, "b token inner"]
    ) -> Float[Tensor, "b token width"]:
        """Add what was attended to, then the MLP."""
        x = self.attention_out.forward_onto(attended, x)
        hidden = functional.silu(self.mlp_in(self.mlp_norm(x)))
        return self.mlp_out.forward_onto(hidden, x)


def time_features(
    tau: Float[Tensor, "b token"], num_features: int
) -> Float[Tensor, "b token feature"]:
    """Sines and cosines of the flow time, periods from 4 down to 0.01."""
    steps = torch.linspace(0.0, 1.0, num_features // 2, device=tau.device, dtype=torch.float32)
    angles = tau.float()[..., None] * (2 * torch.pi / (4.0 * (0.01 / 4.0) ** steps))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
