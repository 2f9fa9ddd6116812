"""Probe: what this machine reads and multiplies per second, in a second or two. Called by cli's plan, which keeps it.

The best of several tries: a rate is a ceiling, and a busy neighbour is not the machine's. Weights are many enough not
to stay in a small cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ganglion.clock import Clock
from ganglion.kernels.cpu import PackedLinear, why_not_packed

Layer = Callable[[Tensor], Tensor]

_WIDTH, _INNER = 1024, 3072
_COLD_BYTES = 128 << 20
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_NUM_TRIES = 20
_TRY_S = 0.003  # shorter than what a scheduler gives at a time
_NUM_SLICES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """Bytes read per second, flops per second of products by their rows, microseconds of a call."""

    read_bytes_per_s: float
    flops_per_s: dict[int, float]
    call_us: float


def probe(clock: Clock, *, dtype: str, num_threads: int) -> Probed:
    """Rates of this machine with `num_threads` threads of torch, whose number is put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
            num_weights = max(2, _COLD_BYTES // (_WIDTH * _INNER * kind.itemsize))
            layers = [_layer(kind) for _ in range(num_weights)]
            flops = {rows: _flops_per_s(clock, layers, kind, rows) for rows in _ROWS}
            read = _read_bytes_per_s(clock)
            call_us = _call_us(clock, kind)
    finally:
        torch.set_num_threads(before)
    one_row_reads = flops[1] / 2 * kind.itemsize  # a product of one row is a read, too
    return Probed(read_bytes_per_s=max(read, one_row_reads), flops_per_s=flops, call_us=call_us)


def _layer(kind: torch.dtype) -> Layer:
    """A product as models do it here: its weight laid out for the matrix units where there are any."""
    weight = torch.full((_INNER, _WIDTH), 0.01, dtype=kind)
    if why_not_packed(kind):
        return partial(functional.linear, weight=weight)
    return PackedLinear(weight, None)


def _flops_per_s(clock: Clock, layers: Sequence[Layer], kind: torch.dtype, num_rows: int) -> float:
    x = torch.full((num_rows, _WIDTH), 0.01, dtype=kind)
    layers[-1](x)
    best = 0.0
    for _ in range(_NUM_TRIES):
        start_s, done = clock.now_s(), 0
        while (took_s := clock.now_s() - start_s) < _TRY_S:
            layers[done % len(layers)](x)
            done += 1
        best = max(best, 2.0 * num_rows * _WIDTH * _INNER * done / took_s)
    return best


def _read_bytes_per_s(clock: Clock) -> float:
    """Bytes of long rows through the one reader that every torch has: a product with a vector, in float32."""
    slices = torch.full((_NUM_SLICES, _WIDTH, _COLD_BYTES // 4 // _WIDTH // _NUM_SLICES), 0.01)
    vector = torch.zeros(slices.shape[2])
    best = 0.0
    for at in range(_NUM_TRIES):
        part = slices[at % _NUM_SLICES]
        start_s = clock.now_s()
        torch.mv(part, vector)
        best = max(best, part.nbytes / (clock.now_s() - start_s))
    return best


def _call_us(clock: Clock, kind: torch.dtype) -> float:
    """A small operation on one row, as a step has hundreds of."""
    x = torch.zeros(1, _WIDTH, dtype=kind)
    best_us, num_calls = float("inf"), 400
    for _ in range(_NUM_TRIES):
        start_s = clock.now_s()
        for _ in range(num_calls // 4):
            y = x * 1.5
            y = y + x
            y = y.view(8, -1).transpose(0, 1)
            y = functional.silu(x)
        best_us = min(best_us, (clock.now_s() - start_s) * 1e6 / num_calls)
    return best_us
