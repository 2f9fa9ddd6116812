"""Contract: which ops there are, their signatures, and how far a backend may stray from the reference.

Read by `reference` (the truth), `cpu` (a backend) and `check` (which compares the two). Computes nothing.

Dimension names, in all of kernels/: b batch row, token (asks), key (is asked), head, dim (of a head), page, slot
(row in a page), layer, span (pages of one row), low and high (widths before and after), h and w (pixels), c (channels).
The 2 of a page is keys, values.

| op | signature | meaning |
|---|---|---|
| attend | (q "b token head dim", k "b key head dim", v "b key head dim", mask "#b 1 1 key" or None) -> Attended | every token asks every key; mask is added to the scores, and leaves each row a key |
| merge | (parts: Attended ...) -> Attended | attention to disjoint sets of keys -> attention to their union, exact |
| paged_attend | (q "b token head dim", pages "page slot layer 2 head dim", layer, ids "b span", num_keys " b") -> Attended | keys are the first num_keys slots of the row's pages; none: out 0, lse -inf |
| gather_pages | (pages "page slot *rest", ids "b span") -> "b span slot *rest" | copies of pages |
| linear | (x "*b low", weight "high low", bias " high") -> "*b high" | x weight^T + bias |
| halve | (x "b c h w", weight "high c 3 3", bias " high") -> "b high h2 w2" | 3x3 convolution, stride 2, padding 1 |
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Backend = Mapping[str, Callable[..., Any]]  # a subset of OPS -> its function

# Largest |got - reference| / (1 + |reference|) on standard normal inputs, weights scaled by 1/sqrt(low).
# bfloat16 keeps 8 bits: rounding the result alone costs 2^-9 = 0.002 of it.
# attend and paged_attend may also round the softmax weights to the inputs' dtype, linear and halve the sum before the bias.
OPS: dict[str, dict[torch.dtype, float]] = {
    "attend": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "merge": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "paged_attend": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "gather_pages": {torch.float32: 0.0, torch.bfloat16: 0.0},
    "linear": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "halve": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
}


class Attended(NamedTuple):
    """What attention gives: `lse` is the logarithm of the sum of exp(score), always float32, so parts can be merged."""

    out: Float[Tensor, "b token head dim"]
    lse: Float[Tensor, "b token head"]
