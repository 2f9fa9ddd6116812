"""Rotary positions: frequencies of every kind, and the rotation. Called by `decoder` and `mla`. Knows no page or layer.

Dimension names: token, head, dim (of a head), half (of the rotated dims: one frequency each).
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each "token 1 half"


class RopeKind(StrEnum):
    """How rotary frequencies are stretched beyond the trained length."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of the first `dim` numbers of a head. Fields after `theta` count for the kinds that name them."""

    dim: int
    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0  # linear, llama3, yarn
    original_max_tokens: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    is_truncated: bool = True  # yarn: whether the ramp starts and ends at whole dims
    amplitude: float = 1.0  # yarn: cosine and sine are multiplied by it


def yarn_amplitude(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN sharpens attention at this stretch (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


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
