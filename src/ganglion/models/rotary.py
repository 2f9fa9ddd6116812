"""Rotary positions: frequencies of every kind, and the rotation. Called by `decoder` and `mla`. Knows no page or layer.

Dimension names: token, head, dim (of a head), half (of the rotated dims: one frequency each).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ganglion.models.decoder_spec import RopeKind, RopeSpec

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each "token 1 half"


def frequencies(rope: RopeSpec) -> Float[Tensor, " half"]:
    """Radians per position of each pair of dims, float32."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    periods = rope.theta**exponents
    if rope.kind == RopeKind.LINEAR:
        return 1.0 / periods / rope.factor
    if rope.kind == RopeKind.LLAMA3:
        return _llama3(1.0 / periods, rope)
    if rope.kind == RopeKind.YARN:
        share = _yarn_share(rope)
        return 1.0 / (rope.factor * periods) * (1.0 - share) + 1.0 / periods * share
    return 1.0 / periods


def rotation(
    frequency: Float[Tensor, " half"],
    positions: Int[Tensor, " token"],
    *,
    amplitude: float,
    dtype: torch.dtype,
) -> Rotation:
    """Cosine and sine at each token, times `amplitude`, computed in float32."""
    angles = positions[:, None, None].float() * frequency
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def rotate(x: Float[Tensor, "token head dim"], by: Rotation) -> Float[Tensor, "token head dim"]:
    """Rotate dims (i, i + half) of every head; dims beyond twice `half` pass as they are."""
    cosine, sine = by
    half = cosine.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)


def _llama3(plain: Float[Tensor, " half"], rope: RopeSpec) -> Float[Tensor, " half"]:
    """Long waves are stretched, short ones kept, those between mixed (Llama 3.1)."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_tokens / (2 * math.pi / plain)  # within the trained length
    smooth = (turns - low) / (high - low)
    mixed = (1 - smooth) * plain / rope.factor + smooth * plain
    return torch.where(turns < low, plain / rope.factor, torch.where(turns > high, plain, mixed))


def _yarn_share(rope: RopeSpec) -> Float[Tensor, " half"]:
    """1 where a frequency stays as it is, 0 where it is stretched (YaRN, arXiv 2309.00071)."""

    def dim_of(num_turns: float) -> float:
        return (rope.dim * math.log(rope.original_max_tokens / (num_turns * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.is_truncated:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, float(rope.dim - 1))
    high = high + 0.001 if low == high else high
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1.0 - ramp.clamp(0.0, 1.0)
