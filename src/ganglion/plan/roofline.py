"""Roofline: how fast a language model can go on a machine, and which wall it meets first. Called by cli's plan. Pure.

After GenZ (arXiv 2406.01698): each part of a step takes the longer of its arithmetic and its bytes, at rates that were
measured on this machine for the rows it has; calls into the numeric library cost something each. Knows no engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from math import exp, exp2, log1p, log2

from ganglion.layout import DTYPE_BYTES
from ganglion.plan.footprint import LanguageShape, Part, Weights

CALLS_PER_LAYER = 22  # norms, projections, rotation, pages, attention, residuals
CALLS_PER_MOE_LAYER = 12  # routing and bringing tokens to experts
CALLS_PER_EXPERT = 5
CALLS_PER_STEP = 20  # sampling among them


class Wall(StrEnum):
    """What there would have to be more of."""

    COMPUTE = "compute"
    BANDWIDTH = "bandwidth"
    CAPACITY = "capacity"
    CALLS = "calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A machine, measured: bytes read per second, flops per second of products with so many rows, cost of a call."""

    dtype: str
    num_threads: int
    read_bytes_per_s: float
    flops_per_s: Mapping[int, float]  # rows -> rate
    call_us: float

    @property
    def peak_flops_per_s(self) -> float:
        """The best of them."""
        return max(self.flops_per_s.values())

    @property
    def ridge(self) -> float:
        """Flops per byte at which arithmetic takes as long as reading."""
        return self.peak_flops_per_s / self.read_bytes_per_s

    def flops_at(self, num_rows: float) -> float:
        """Rate of products with that many rows: between measured ones along the logarithm."""
        known = sorted(self.flops_per_s)
        if num_rows <= known[0]:
            return self.flops_per_s[known[0]] * max(num_rows, 1) / known[0]
        for low, high in pairwise(known):
            if num_rows <= high:
                share = log2(num_rows / low) / log2(high / low)
                lower, upper = self.flops_per_s[low], self.flops_per_s[high]
                return lower * exp2(share * log2(upper / lower))
        return self.flops_per_s[known[-1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One kind of step. `bound_per_s`: at peak rates and no calls; `wall` is what holds the bound."""

    what: str
    num_rows: int
    num_tokens: int  # of one row: context of a decode step, prompt of a prefill
    flops: float
    read_bytes: float
    step_ms: float
    tokens_per_s: float
    bound_per_s: float
    wall: Wall
    shares: Mapping[str, float] = field(default_factory=dict)  # of the expected time

    @property
    def intensity(self) -> float:
        """Flops per byte read."""
        return self.flops / self.read_bytes if self.read_bytes else 0.0


@dataclass(slots=True)
class _Tally:
    rates: Rates
    flops: float = 0.0
    read_bytes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def product(self, name: str, num_rows: float, num_values: float, times: float = 1.0) -> None:
        """`times` products of `num_rows` rows with a weight of `num_values` numbers."""
        flops = 2.0 * num_rows * num_values * times
        weight_bytes = num_values * times * DTYPE_BYTES[self.rates.dtype]
        took_s = max(
            flops / self.rates.flops_at(num_rows), weight_bytes / self.rates.read_bytes_per_s
        )
        self._add(name, flops, weight_bytes, took_s)

    def attend(self, flops: float, kv_bytes: float, num_rows: float) -> None:
        """Attention over keys and values that are read once."""
        took_s = max(flops / self.rates.flops_at(num_rows), kv_bytes / self.rates.read_bytes_per_s)
        self._add("attention", flops, kv_bytes, took_s)

    def calls(self, number: float) -> None:
        """Calls into the numeric library."""
        self._add("calls", 0.0, 0.0, number * self.rates.call_us * 1e-6)

    def _add(self, name: str, flops: float, read_bytes: float, took_s: float) -> None:
        self.flops += flops
        self.read_bytes += read_bytes
        self.seconds[name] = self.seconds.get(name, 0.0) + took_s

    def forecast(self, what: str, num_rows: int, num_tokens: int, num_out: int) -> Forecast:
        """The sum of what was tallied, `num_out` tokens made."""
        seconds = sum(self.seconds.values())
        compute_s = self.flops / self.rates.peak_flops_per_s
        read_s = self.read_bytes / self.rates.read_bytes_per_s
        calls_s = self.seconds.get("calls", 0.0)
        wall = Wall.COMPUTE if compute_s >= read_s else Wall.BANDWIDTH
        if calls_s > max(compute_s, read_s):
            wall = Wall.CALLS
        return Forecast(
            what=what,
            num_rows=num_rows,
            num_tokens=num_tokens,
            flops=self.flops,
            read_bytes=self.read_bytes,
            step_ms=seconds * 1e3,
            tokens_per_s=num_out / seconds,
            bound_per_s=num_out / max(compute_s, read_s),
            wall=wall,
            shares={name: took / seconds for name, took in self.seconds.items()},
        )


def decode(
    shape: LanguageShape, weights: Weights, rates: Rates, *, num_rows: int, context: int
) -> Forecast:
    """One new token for each of `num_rows` sequences of `context` tokens."""
    tally = _Tally(rates)
    _weights(tally, shape, weights, num_rows, num_rows)
    kv_bytes = sum(
        group.token_bytes * group.held_tokens(context) for group in shape.kv_groups(rates.dtype)
    )
    per_key = _attention_flops_per_key(shape)
    full = shape.num_layers - len(shape.windowed)
    keys = full * context + len(shape.windowed) * min(context, shape.window)
    tally.attend(
        per_key * keys * num_rows, kv_bytes * num_rows, shape.num_heads / shape.num_kv_heads
    )
    return tally.forecast("decode", num_rows, context, num_rows)


def prefill(shape: LanguageShape, weights: Weights, rates: Rates, *, num_tokens: int) -> Forecast:
    """A whole prompt at once, up to its first new token."""
    tally = _Tally(rates)
    _weights(tally, shape, weights, num_tokens, 1)
    full = shape.num_layers - len(shape.windowed)
    seen = num_tokens * (num_tokens + 1) / 2
    window = min(num_tokens, shape.window)
    seen_windowed = num_tokens * window - window * (window - 1) / 2 if window else 0.0
    keys = full * seen + len(shape.windowed) * seen_windowed
    kv_bytes = sum(group.token_bytes * num_tokens for group in shape.kv_groups(rates.dtype))
    tally.attend(_attention_flops_per_key(shape) * keys, kv_bytes, num_tokens)
    return tally.forecast("prefill", 1, num_tokens, num_tokens)


def experts_touched(shape: LanguageShape, num_tokens: float) -> float:
    """Of one layer, by `num_tokens` tokens, when every expert is as likely as every other."""
    if not shape.num_experts:
        return 0.0
    share = shape.num_active_experts / shape.num_experts
    missed = exp(num_tokens * log1p(-share)) if share < 1.0 else 0.0
    return shape.num_experts * (1.0 - missed)


def _attention_flops_per_key(shape: LanguageShape) -> float:
    """One token of one layer with one key: scores and the weighted sum, all heads."""
    if shape.latent_dim:
        return 2.0 * shape.num_heads * (shape.latent_dim + shape.latent_value_dim)
    return 4.0 * shape.num_heads * shape.head_dim


def _weights(
    tally: _Tally, shape: LanguageShape, weights: Weights, num_tokens: int, num_logits: int
) -> None:
    """All weights once; of the experts those that the tokens are sent to."""
    every = (Part.ATTENTION, Part.FEED_FORWARD, Part.SHARED_EXPERTS, Part.ROUTER, Part.OTHER)
    for part in every:
        if values := weights.values_of(part):
            tally.product(str(part), num_tokens, values)
    head = weights.values_of(Part.HEAD) or weights.values_of(Part.EMBEDDING)
    tally.product(str(Part.HEAD), num_logits, head)
    touched = experts_touched(shape, num_tokens)
    if touched and shape.num_moe_layers:
        expert_values = weights.values_of(Part.EXPERTS) / shape.num_moe_layers / shape.num_experts
        rows = num_tokens * shape.num_active_experts / touched
        tally.product(str(Part.EXPERTS), rows, expert_values, times=touched * shape.num_moe_layers)
    calls = float(CALLS_PER_STEP + CALLS_PER_LAYER * shape.num_layers)
    calls += (CALLS_PER_MOE_LAYER + CALLS_PER_EXPERT * touched) * shape.num_moe_layers
    tally.calls(calls)
